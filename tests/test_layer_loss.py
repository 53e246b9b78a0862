"""The loss without layers is that of the model really cut, and no more layers run than must."""

import copy
import math
from itertools import combinations

import pytest
import torch
from helpers import tiny_llama, token_ids
from walk_models import assert_untouched, tiny_model

from optimum_slim import perplexity
from optimum_slim.importance import Importance
from optimum_slim.layer_loss import LAYER_METRICS, least_layers, loss_increase, losses_without, with_losses
from optimum_slim.methods.depth import greedy_order
from optimum_slim.surgery import drop_layers
from optimum_slim.walk import decoder_layers


LAYERS = 6
TOKENS = token_ids(5, 12, vocabulary=97)


def planted(*layers, **changes):
    """A tiny Llama in which these layers do nothing."""
    model = tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.2, **changes)
    for layer in layers:
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    return model


def loss_of(model, tokens=TOKENS, without=()):
    """Of a copy that has really lost these layers."""
    cut = copy.deepcopy(model)
    drop_layers(cut, without)
    return math.log(perplexity(cut, tokens.flatten(), tokens.shape[1]))


def scores(**changes):
    settings = dict.fromkeys(("neurons", "heads", "channels", "energy")) | {"aggregate": ("l2", "mean"), "tokens": 1}
    return Importance(**(settings | {"layers": torch.rand(LAYERS)} | changes))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi3", "qwen3"])
def test_the_loss_is_that_of_the_model_really_cut(kind):
    model = tiny_model(kind)
    blocks = [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (3, 3)]
    found = losses_without(model, TOKENS, blocks)
    expected = [loss_of(model, without=range(*block)) for block in blocks]
    assert found == pytest.approx(expected, rel=1e-5) and len({f"{loss:.4f}" for loss in found}) == len(blocks)
    assert_untouched(model)


def test_a_layer_that_does_nothing_costs_nothing():
    increase = loss_increase(planted(2, 3), TOKENS, [2, 1])
    assert increase[0, 2] == increase[0, 3] == increase[1, 2] == 0
    assert (increase[0, [0, 1, 4, 5]] != 0).all() and increase.dtype == torch.float32
    assert increase[1, 1] == increase[0, 1] and increase[1, 3] == increase[0, 4]
    measured = ~increase.isnan()
    assert measured[0].all() and measured[1].tolist() == [True] * 5 + [False] and not measured[2:].any()


def test_only_what_lies_behind_a_block_runs():
    model, calls = planted(), []
    for layer in decoder_layers(model)[1]:
        layer.self_attn.register_forward_hook(lambda *arguments: calls.append(1))
    losses_without(model, TOKENS[:2], [(i, i + 1) for i in range(LAYERS)])
    whole, behind, kind_of_output = LAYERS, sum(range(LAYERS)), LAYERS
    assert len(calls) == 2 * (whole + behind + kind_of_output)


def test_few_samples_are_enough():
    model = planted()
    assert torch.equal(loss_increase(model, TOKENS, samples=2)[0], loss_increase(model, TOKENS[:2])[0])
    expected = loss_of(model, TOKENS[:2], [1]) - loss_of(model, TOKENS[:2])
    assert loss_increase(model, TOKENS, samples=2)[0, 1].item() == pytest.approx(expected, abs=1e-5)


def test_modes_stay_and_training_is_off_meanwhile():
    model = planted(attention_dropout=0.9).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    first, second = (loss_increase(model, TOKENS)[0] for _ in range(2))
    assert torch.equal(first, second) and [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("count", range(1, LAYERS))
def test_the_block_is_the_best_of_all_that_keep_the_ends(count):
    model = planted()
    increase = loss_increase(model, TOKENS, [count])
    found = least_layers(scores(loss_increase=increase), count, "contiguous")
    starts = range(1, LAYERS - count) if count < LAYERS - 1 else [0]
    losses = {start: loss_of(model, without=range(start, start + count)) for start in starts}
    best = min(losses, key=losses.__getitem__)
    assert found == list(range(best, best + count)) and LAYERS - 1 not in found


def test_layers_one_by_one():
    model = planted(1)
    found = scores(layers=torch.tensor([5.0, 4, 3, 2, 1, 0]), loss_increase=loss_increase(model, TOKENS))
    order = sorted(range(LAYERS), key=lambda layer: loss_of(model, without=[layer]))
    assert least_layers(found, 3, "loss") == sorted(order[:3])
    assert least_layers(found, 3, "block_influence") == [3, 4, 5]
    for metric in LAYER_METRICS:
        assert least_layers(scores(), 0, metric) == []


def test_what_was_measured_is_not_measured_again():
    model, found = planted(), scores(loss_increase=loss_increase(planted(), TOKENS, [1, 3]))
    assert with_losses(found, model, None, {2}, "block_influence") is found
    assert with_losses(found, model, None, {2}, "loss") is found
    assert with_losses(found, model, None, {3}, "contiguous") is found
    more = with_losses(found, model, TOKENS, {2, 3}, "contiguous").loss_increase
    assert not more[1, : LAYERS - 1].isnan().any() and more[3:].isnan().all()
    for row in (0, 2):
        torch.testing.assert_close(more[row], found.loss_increase[row], equal_nan=True, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"without blocks of \[2, 4\] layers.*--layer-losses 2 4"):
        with_losses(found, model, None, {2, 3, 4}, "contiguous")


@pytest.mark.parametrize("sizes", [[0], [LAYERS], [1, 9]], ids=str)
def test_blocks_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=f"of the {LAYERS} layers of this model; pass 1 to {LAYERS - 1}"):
        loss_increase(planted(), TOKENS, sizes)


def test_tokens_must_be_a_matrix():
    with pytest.raises(ValueError, match="non-empty matrix"):
        losses_without(planted(), TOKENS[0], [(0, 1)])


def test_greedy_removal_is_the_best_pair_with_its_first_layer():
    model = planted()
    order, values = greedy_order(model, TOKENS, 2, range(LAYERS))
    pairs = {pair: loss_of(model, without=pair) for pair in combinations(range(LAYERS), 2) if order[0] in pair}
    assert set(min(pairs, key=pairs.__getitem__)) == set(order)
    assert math.log(values[1]) == pytest.approx(min(pairs.values()), rel=1e-5)
