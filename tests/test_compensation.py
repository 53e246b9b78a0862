"""What stays makes up for what goes: least squares against its closed form, exact where nothing is lost."""

import pytest
import torch
from helpers import tiny_llama, token_ids
from test_width import tiny

from optimum_slim.compensation import compensate
from optimum_slim.walk import walk
from optimum_slim.width import narrow


TOKENS = token_ids(16, 24)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def inputs(model, name):
    """What enters a module, (tokens, in) in float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    return seen[0].flatten(0, -2).double()


def test_the_weights_are_those_of_least_squares():
    model, dense = tiny_llama(initializer_range=0.2), tiny_llama(initializer_range=0.2)
    kept = torch.arange(40)
    compensate(model, TOKENS, neurons=[kept] * 2, ridge=1e-9)
    first, second = (f"model.layers.{i}.mlp.down_proj" for i in range(2))
    x, weight = inputs(dense, first), dense.get_submodule(first).weight.double()
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    found = model.get_submodule(first).weight.detach()
    torch.testing.assert_close(found[:, kept].double(), best, rtol=1e-3, atol=1e-3 * float(best.detach().abs().max()))
    assert not found[:, 40:].any()
    x = inputs(model, second)  # measured behind the first layer as it is now
    best = torch.linalg.lstsq(x[:, kept], x @ dense.get_submodule(second).weight.double().T).solution.T
    found = model.get_submodule(second).weight[:, kept]
    torch.testing.assert_close(found.double(), best, rtol=1e-2, atol=1e-2 * float(best.detach().abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2: Conv1D, and neurons only
def test_neurons_that_repeat_others_are_not_missed(kind):
    model = tiny(kind, **({"n_inner": 96} if kind == "gpt2" else {}))
    expected = logits(model)
    for layer in model.get_decoder().layers if kind == "llama" else model.transformer.h:
        ups = (layer.mlp.up_proj, layer.mlp.gate_proj) if kind == "llama" else (layer.mlp.c_fc,)
        for up in ups:
            weight = up.weight.data if kind == "llama" else up.weight.data.T
            weight[48:] = weight[:48]
            if up.bias is not None:
                up.bias.data[48:] = up.bias.data[:48]
    expected = logits(model)
    kept = [torch.arange(48)] * 2
    rows = compensate(model, TOKENS, neurons=kept, ridge=1e-7)
    narrow(model, neurons=kept)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert len(rows) == 2 and all(row["compensated"] < 1e-4 < row["cut"] for row in rows)


def test_fewer_heads_come_closer_and_whoever_shares_the_weights_keeps_them():
    errors = []
    heads = [torch.tensor([0, 2])] * 2
    dense = tiny_llama(initializer_range=0.2)
    for done in (False, True):
        model = tiny_llama(initializer_range=0.2)
        before = model.model.layers[0].self_attn.o_proj.weight
        copy = before.clone()
        rows = compensate(model, TOKENS, heads=heads) if done else []
        narrow(model, heads=heads)
        assert torch.equal(before, copy)
        assert all(row["compensated"] < row["cut"] for row in rows) and len(rows) == 2 * done
        errors.append((logits(model) - logits(dense)).norm())
    assert errors[1] < 0.95 * errors[0]


def test_the_walk_leaves_the_other_weights():
    model = tiny_llama()
    others = {name: p for name, p in model.named_parameters() if "down_proj" not in name}
    compensate(model, TOKENS, neurons=[torch.arange(40)] * 2)
    assert all(model.get_parameter(name) is p for name, p in others.items())
    assert sum(1 for _ in walk(model, TOKENS)) == 2
