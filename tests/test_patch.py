"""The linear map in place of removed layers: least squares, and its merge into the weights."""

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_slim import Depth, slim
from optimum_slim.distance import boundaries
from optimum_slim.patch import fit_patches, merge_patch


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=128, n_positions=64)).eval()


@pytest.mark.parametrize("build", [lambda: tiny_llama(num_hidden_layers=4), gpt2])
def test_the_map_is_the_least_squares_solution_and_merges_exactly(build):
    model, ids = build(), token_ids(12, 16)
    stack = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
    states = [x.flatten(0, 1) for x in boundaries(model, ids)]
    seen = []
    writer = stack[0].mlp.down_proj if hasattr(stack[0].mlp, "down_proj") else stack[0].mlp.c_proj
    hook = writer.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, -2)))
    boundaries(model, ids)
    hook.remove()
    (patch,) = fit_patches(model, ids, [(1, 3)], ridge=0.0, batch_size=5)
    target = seen[0] + states[3] - states[1]
    root = states[3].norm(dim=1, keepdim=True).rsqrt()  # a token weighs 1 / |x_b|
    expected = torch.linalg.lstsq((root * seen[0]).double(), (root * target).double()).solution
    assert torch.allclose(patch.matrix.double(), expected, atol=1e-3)
    left = (root * (seen[0] @ patch.matrix - target)).square().sum() / (root * (states[3] - states[1])).square().sum()
    assert patch.left == pytest.approx(left.item(), rel=1e-3) and patch.left < 1
    old = writer.weight
    kept = old.detach().clone()
    merge_patch(writer, patch)
    assert torch.equal(old, kept) and writer.weight is not old
    merged = boundaries(model, ids)[1].flatten(0, 1)
    assert torch.allclose(merged, states[1] - seen[0] + seen[0] @ patch.matrix, atol=1e-4)


def test_layers_that_only_add_a_linear_map_of_the_mlp_output_are_replaced_without_loss():
    """If the gap is a linear function of m, the patched model equals the whole one."""
    model, ids = tiny_llama(num_hidden_layers=4), token_ids(12, 16)
    stack = model.model.layers
    stack[0].self_attn.o_proj.weight.data.zero_()
    with torch.no_grad():  # layer 1 becomes a map of the stream that is linear in m up to its norm's scale: nearly so
        stack[1].self_attn.o_proj.weight.zero_()
        stack[1].mlp.down_proj.weight.mul_(1e-3)
    (patch,) = fit_patches(model, ids, [(1, 2)], ridge=0.0)
    plain = fit_patches(model, ids, [(1, 2)], ridge=1e6)[0]
    assert patch.left < 0.9 and plain.left == pytest.approx(1, abs=1e-3)


def test_ridge_pulls_towards_the_identity():
    model, ids = tiny_llama(num_hidden_layers=4), token_ids(12, 16)
    eye = torch.eye(64)
    distances = [
        (fit_patches(model, ids, [(1, 3)], ridge=ridge)[0].matrix - eye).norm().item() for ridge in (1e-3, 1.0, 1e3)
    ]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-2 * distances[0]


def test_a_gap_at_the_first_layer_is_refused():
    with pytest.raises(ValueError, match="layer 0 has none before it"):
        fit_patches(tiny_llama(), token_ids(), [(0, 1)], ridge=0.0)


def test_a_layer_with_a_norm_behind_its_mlp_is_refused():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(**settings, num_key_value_heads=2, head_dim=16, vocab_size=128)).eval()
    with pytest.raises(ValueError, match="use linear_patch=False"):
        fit_patches(model, token_ids(), [(1, 2)], ridge=0.0)


def test_the_step_closes_part_of_the_gap():
    ids = token_ids(48, 32)
    whole = tiny_llama(num_hidden_layers=6)
    errors = []
    for linear_patch in (False, True):
        model = tiny_llama(num_hidden_layers=6)
        slim(model, Depth(layers=(2, 3), linear_patch=linear_patch), data=ids)
        with torch.no_grad():
            errors.append((model(ids).logits - whole(ids).logits).norm().item())
    assert errors[1] < 0.95 * errors[0]
