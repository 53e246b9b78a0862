"""Scores of widths and layers against brute force from stored activations."""

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_slim.distance import block_influence
from optimum_slim.importance import AGGREGATES, Aggregate, Importance, importance, watch_points


TOKENS = token_ids(5, 12)


def stored(model, names):
    """What enters (projections) or leaves (norms) the modules, (samples, tokens, units)."""
    found, hooks = {}, []
    for name, axis in names.items():

        def keep(module, args, output, name=name, axis=axis):
            found[name] = output if axis == "channels" else args[0]

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(x, samples, tokens):
    each = {"mean": x.abs().mean(1), "l2": x.norm(dim=1), "variance": x.var(1, unbiased=False)}[tokens]
    return {"mean": each.mean(0), "l2": each.norm(dim=0), "variance": each.var(0, unbiased=False)}[samples]


@pytest.mark.parametrize("samples", AGGREGATES)
@pytest.mark.parametrize("tokens", AGGREGATES)
def test_scores_are_those_of_stored_activations(samples, tokens):
    model = tiny_llama(num_attention_heads=8)
    activations = stored(model, watch_points(model))
    found = importance(model, TOKENS, aggregate=(samples, tokens), batch_size=2)
    layer = "model.layers.1"
    neurons = by_hand(activations[f"{layer}.mlp.down_proj"], samples, tokens)
    torch.testing.assert_close(found.neurons[1], neurons, rtol=1e-4, atol=1e-6)
    heads = by_hand(activations[f"{layer}.self_attn.o_proj"], samples, tokens).view(8, 8).norm(dim=1)
    torch.testing.assert_close(found.heads[1], heads, rtol=1e-4, atol=1e-6)
    norms = [x for name, x in activations.items() if "norm" in name]
    assert len(norms) == 4
    channels = sum(by_hand(x, samples, tokens) for x in norms)
    torch.testing.assert_close(found.channels, channels, rtol=1e-4, atol=1e-6)


def test_the_order_and_the_batches_of_samples_do_not_matter():
    model = tiny_llama()
    first, second = importance(model, TOKENS), importance(model, TOKENS.flip(0), batch_size=3)
    for name in ("neurons", "heads", "channels", "layers", "energy"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.layers, block_influence(model, TOKENS), rtol=1e-4, atol=1e-6)


def test_dead_units_score_zero_and_an_identity_layer_too():
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[0].mlp.up_proj.weight.data[7] = 0
    found = importance(model, TOKENS)
    assert found.neurons[0].argmin() == 7 and found.neurons[0, 7] == 0
    assert abs(found.layers[1]) < 1e-6 < found.layers[0]


def test_energy_is_the_mean_square_of_the_stream():
    model = tiny_llama()
    model.model.embed_tokens.weight.data[:, 5] = 9
    found = importance(model, TOKENS)
    assert found.energy.argmax() == 5 and found.energy.shape == (64,)


def test_a_model_without_separate_heads_has_scores_for_the_rest():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_inner=48, vocab_size=128, n_positions=64))
    found = importance(model.eval(), TOKENS)
    assert found.neurons.shape == (2, 48) and found.heads is None


def test_scores_are_saved_and_read_back(tmp_path):
    found = importance(tiny_llama(), TOKENS, aggregate=("mean", "l2"))
    found.save(tmp_path / "scores.safetensors")
    again = Importance.load(tmp_path / "scores.safetensors")
    assert (again.aggregate, again.tokens) == (("mean", "l2"), 60) and torch.equal(again.heads, found.heads)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no importance scores"):
        Importance.load(tmp_path / "other.safetensors")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="aggregate"):
        Aggregate("max", "mean")
    with pytest.raises(ValueError, match="tokens"):
        importance(tiny_llama(), torch.zeros(4, dtype=torch.int64))
