"""Scores of experts and of the neurons in each, against the experts' own forward on one of them at a time."""

import copy

import pytest
import torch
from helpers import token_ids
from moe_models import experts_of, sparse
from test_importance import by_hand
from test_width import tiny

from optimum_slim.importance import AGGREGATES, Importance, importance


TOKENS = token_ids(5, 12)
WIDTHS = {  # as wide as the hidden states, so that the down projection can be the identity
    "mixtral": ("neurons", {"intermediate_size": 64}),
    "qwen3_moe": ("expert_neurons", {"moe_intermediate_size": 64}),
    "deepseek_v3": ("expert_neurons", {"moe_intermediate_size": 64}),
    "gpt_oss": ("neurons", {"intermediate_size": 64}),
}


@torch.no_grad()
def alone(model):
    """Outputs of each expert of the last layer, weighted: (experts, tokens, hidden), and which tokens it gets."""
    module, seen = experts_of(model)[0], []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(args))
    model(TOKENS)
    hook.remove()
    hidden, index, weights = seen[0]
    experts = range(module.down_proj.shape[0])
    outputs = torch.stack([module(hidden, index, weights * (index == expert)) for expert in experts])
    return outputs, torch.stack([(index == expert).any(1) for expert in experts])


def entering(model):
    """What enters the down projections of the last layer's experts: (experts, samples, tokens, neurons)."""
    model = copy.deepcopy(model)
    module = experts_of(model)[0]
    module.down_proj.data.copy_(torch.eye(64))
    if module.has_bias:
        module.down_proj_bias.data.zero_()
    return alone(model)[0].unflatten(1, TOKENS.shape)


@pytest.mark.parametrize("kind", WIDTHS)
def test_scores_are_those_of_each_expert_run_alone(kind):
    axis, settings = WIDTHS[kind]
    model = sparse(kind, **settings)
    found = importance(model, TOKENS, batch_size=2)
    outputs, routed = alone(model)
    expected = outputs.norm(dim=-1).sum(1) / routed.sum(1).clamp(min=1)
    assert 0 < routed.float().mean() < 1
    torch.testing.assert_close(found.experts[1], expected, rtol=1e-4, atol=1e-6)
    neurons = torch.stack([by_hand(x, "l2", "mean") for x in entering(model)])
    torch.testing.assert_close(getattr(found, axis)[1], neurons, rtol=1e-4, atol=1e-6)
    if kind in ("qwen3_moe", "deepseek_v3"):
        assert not found.experts[0].any() and not found.expert_neurons[0].any()  # a dense layer
        assert found.neurons[0].all() and not found.neurons[1].any()


@pytest.mark.parametrize("samples", AGGREGATES)
@pytest.mark.parametrize("tokens", AGGREGATES)
def test_neurons_are_aggregated_as_those_of_one_wide_layer(samples, tokens):
    model = sparse("qwen3_moe", moe_intermediate_size=64)
    found = importance(model, TOKENS, aggregate=(samples, tokens), batch_size=3)
    expected = torch.stack([by_hand(x, samples, tokens) for x in entering(model)])
    torch.testing.assert_close(found.expert_neurons[1], expected, rtol=1e-4, atol=1e-6)


def test_shared_experts_are_scored_by_what_enters_their_down_projection():
    model, seen = sparse("deepseek_v3"), []
    shared = model.model.layers[1].mlp.shared_experts.down_proj
    hook = shared.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    found = importance(model, TOKENS)
    assert found.shared_neurons.shape == (2, 64) and not found.shared_neurons[0].any()
    torch.testing.assert_close(found.shared_neurons[1], by_hand(seen[0], "l2", "mean"), rtol=1e-4, atol=1e-6)


def test_batches_and_the_order_of_samples_do_not_matter_and_scores_are_read_back(tmp_path):
    model = sparse("deepseek_v3")
    first, second = importance(model, TOKENS), importance(model, TOKENS.flip(0), batch_size=3)
    first.save(tmp_path / "scores.safetensors")
    again = Importance.load(tmp_path / "scores.safetensors")
    for name in ("experts", "expert_neurons", "shared_neurons"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-6)
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_an_expert_that_no_token_reaches_scores_zero():
    model = sparse("gpt_oss")
    experts_of(model)[1].bias.data[2] = -1e4
    found = importance(model, TOKENS)
    assert found.experts[1, 2] == 0 and (found.experts[1] > 0).sum() == 3 and not found.neurons[1, 2].any()


def test_experts_that_compute_otherwise_than_they_say_have_no_scores():
    model = sparse("qwen3_moe")
    module = experts_of(model)[0]
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)
    found = importance(model, TOKENS)
    assert found.experts is None and found.expert_neurons is None and found.neurons is not None


def test_experts_that_do_not_say_how_they_compute_have_no_scores():
    model = tiny("llama4_text", num_local_experts=4, intermediate_size_mlp=80, head_dim=16)
    found = importance(model, TOKENS)
    assert found.experts is None and found.neurons is None and found.heads is not None
