"""The lens against models really cut behind each layer, and against identities."""

import copy
import csv
import importlib
import io

import peft
import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from walk_models import assert_untouched, tiny_model

from optimum_slim import BitNet, Lens, lens, slim
from optimum_slim.evaluate import mean_loss
from optimum_slim.losses import next_token_loss
from optimum_slim.packed import PackedLinear
from optimum_slim.surgery import drop_layers


TOKENS = token_ids(5, 12, vocabulary=97)
LAYERS = 6


def planted(*layers, **changes):
    """A tiny Llama in which these layers do nothing."""
    model = tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.3, **changes)
    for layer in layers:
        nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
        nn.init.zeros_(model.model.layers[layer].mlp.down_proj.weight)
    return model


def by_cutting(model, tokens=TOKENS):
    """The lens, one position after the other, from copies that have really lost the layers behind."""
    count, found = model.config.num_hidden_layers, []
    for kept in range(1, count + 1):
        cut = copy.deepcopy(model)
        drop_layers(cut, range(kept, count))
        with torch.no_grad():
            found.append(cut(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).double().log_softmax(-1))
    labels = tokens[:, 1:].flatten()
    likeliest = [[int(row.argmax()) for row in layer] for layer in found]
    right = [[token == last for token, last in zip(layer, likeliest[-1], strict=True)] for layer in likeliest]
    by_position = list(zip(*right, strict=True))
    first = [row.index(True) for row in by_position]
    settled = [next(layer for layer in range(count) if all(row[layer:])) for row in by_position]

    def share(flags):
        flags = list(flags)
        return sum(flags) / len(flags)

    wanted = Lens(
        positions=len(labels),
        agreement=tuple(share(row) for row in right),
        settled=tuple(share(start <= layer for start in settled) for layer in range(count)),
        first=tuple(share(start == layer for start in first) for layer in range(count)),
        loss=tuple(-float(layer[range(len(labels)), labels].mean()) for layer in found),
        top_probability=tuple(float(layer.max(-1).values.exp().mean()) for layer in found),
    )
    return wanted, 1 + share(first), 1 + share(settled)


def assert_same(found, wanted):
    assert found.positions == wanted.positions
    for name in ("agreement", "settled", "first", "loss", "top_probability"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2", "phi3", "qwen3"])
def test_each_layer_predicts_what_the_model_cut_behind_it_does(kind):
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, (wanted, first, settled) = lens(model, TOKENS), by_cutting(model)
    assert_same(found, wanted)
    assert (found.first_layer, found.settled_layer) == (pytest.approx(first), pytest.approx(settled))
    assert 1 < found.first_layer < 3 and found.agreement[0] < 1 and len({f"{x:.4f}" for x in found.loss}) == 3
    assert_untouched(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_prediction_that_is_given_up_again_is_not_settled():
    model = planted()
    found, (wanted, first, settled) = lens(model, TOKENS), by_cutting(model)
    assert_same(found, wanted)
    assert found.first_layer == pytest.approx(first) and found.settled_layer == pytest.approx(settled)
    assert found.first_layer < found.settled_layer and found.settled[0] < found.agreement[0]
    assert list(found.settled) == sorted(found.settled) and sum(found.first) == pytest.approx(1)


def test_behind_layers_that_do_nothing_all_is_final():
    model = planted(4, 5)
    found = lens(model, TOKENS)
    assert found.agreement[3:] == found.settled[3:] == (1.0,) * 3 and found.first[4:] == (0.0, 0.0)
    assert found.agreement[2] < 1 and found.first_layer <= found.settled_layer <= 4
    for values in (found.loss, found.top_probability):
        assert values[3] == values[4] == values[5] != values[2]
    idle = lens(planted(*range(LAYERS)), TOKENS)
    assert idle.first_layer == idle.settled_layer == 1 and idle.first == (1.0,) + (0.0,) * 5


def test_the_last_layer_is_the_model_itself():
    model = planted()
    found = lens(model, TOKENS)
    assert found.agreement[-1] == found.settled[-1] == 1 and found.positions == 5 * 11
    assert found.loss[-1] == pytest.approx(mean_loss(model, TOKENS.flatten(), 12), rel=1e-6)
    assert found.loss[-1] == pytest.approx(next_token_loss(model, TOKENS).item(), rel=1e-6)


def test_batches_and_pieces_do_not_matter_and_logits_are_few(monkeypatch):
    model, rows = planted(), []
    whole = lens(model, TOKENS)
    for size in (1, 2, 64):
        assert_same(lens(model, TOKENS, batch_size=size), whole)
    monkeypatch.setattr(importlib.import_module("optimum_slim.lens"), "POSITIONS_AT_ONCE", 4)
    counted = model.lm_head.register_forward_hook(lambda head, args, output: rows.append(output[..., 0].numel()))
    assert_same(lens(model, TOKENS), whole)
    counted.remove()
    assert sorted(set(rows)) == [3, 4] and sum(rows) == 55 * LAYERS


def test_each_layer_runs_once_for_each_batch():
    model, calls = planted(), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *arguments: calls.append(1))
    lens(model, TOKENS, batch_size=2)
    assert len(calls) == 3 * LAYERS


def test_modes_stay_and_training_is_off_meanwhile():
    model = planted(attention_dropout=0.9).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert lens(model, TOKENS) == lens(model, TOKENS)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_packed_models():
    model = planted()
    dense = lens(model, TOKENS)
    slim(model, BitNet(force=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    found = lens(model, TOKENS)
    assert_untouched(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        hidden = model(TOKENS, output_hidden_states=True).hidden_states
        exits = [model.lm_head(model.model.norm(states)) for states in hidden[1:-1]] + [model.lm_head(hidden[-1])]
    expected = [
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item() for logits in exits
    ]
    assert found.loss == pytest.approx(expected, rel=1e-5) and found.loss != pytest.approx(dense.loss, rel=1e-3)
    assert found.agreement == pytest.approx(
        [(logits.argmax(-1) == exits[-1].argmax(-1))[:, :-1].float().mean().item() for logits in exits]
    )


def test_adapted_models():
    model = planted()
    dense = lens(model, TOKENS)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config).train()
    found = lens(adapted, TOKENS)
    assert_untouched(adapted)
    assert adapted.training and found.loss != pytest.approx(dense.loss, rel=1e-3)
    merged = adapted.eval().merge_and_unload()
    assert_same(found, lens(merged, TOKENS))


def test_the_table_as_rows_as_csv_and_as_markdown():
    found = Lens(10, (0.2, 0.6, 1.0), (0.1, 0.6, 1.0), (0.2, 0.5, 0.3), (5.0, 4.5, 4.0), (0.25, 0.5, 0.75))
    row = {"layer": 2, "agreement": 0.6, "settled": 0.6, "first": 0.5, "loss": 4.5, "top_probability": 0.5}
    assert found.table()[1] == row and [row["layer"] for row in found.table()] == [1, 2, 3]
    read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(found.to_csv()))]
    assert read == found.table()
    assert "| 2 | 0.6000 | 0.6000 | 0.5000 | 4.5000 | 0.5000 |\n" in found.to_markdown()
    assert found.first_layer == pytest.approx(0.2 + 2 * 0.5 + 3 * 0.3) and found.settled_layer == pytest.approx(2.3)
    said = "the final token is first predicted by layer 2.1 of 3 on average, and stays from layer 2.3 on"
    assert found.summary() == said


WRONG = {
    "vector": (TOKENS[0], {}, r"non-empty matrix \(samples, length\), found shape \(12,\)"),
    "nothing": (TOKENS[:0], {}, "non-empty matrix"),
    "floats": (TOKENS.float(), {}, "must be token ids in int64, found torch.float32"),
    "single tokens": (TOKENS[:, :1], {}, "pass at least 2 tokens"),
    "too long": (token_ids(1, 129), {}, r"129 tokens are longer than the 128 positions.*pass tokens\[:, :128\]"),
    "padding": (TOKENS.index_fill(1, torch.tensor([3]), -100), {}, "go from -100 to .*knows the ids 0 to 127"),
    "other vocabulary": (TOKENS + 100, {}, "knows the ids 0 to 127; tokenize with the model's own"),
    "batch": (TOKENS, {"batch_size": 0}, "batch_size must be at least 1, found 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_said_and_changes_nothing(name):
    tokens, settings, message = WRONG[name]
    model = planted().train()
    with pytest.raises(ValueError, match=message):
        lens(model, tokens, **settings)
    assert model.training
    assert_untouched(model)


def test_states_that_change_between_layers_are_refused():
    model = planted()
    hook = model.model.layers[2].register_forward_hook(lambda layer, args, output: output + 1)
    with pytest.raises(ValueError, match="changes the hidden states between its decoder layers"):
        lens(model, TOKENS)
    hook.remove()
    assert_untouched(model)


def test_models_that_predict_no_tokens_are_refused():
    with pytest.raises(ValueError, match="No decoder layers found"):
        lens(nn.Linear(2, 2), TOKENS)
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        lens(planted().model, TOKENS)
