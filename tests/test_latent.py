"""Layers in training for few bits: each equation, lambda, the gradient, and the packed layers they become."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_slim import PT2LLM, SignLinear, TernaryLinear
from optimum_slim._kernels import unpack_signs, unpack_ternary
from optimum_slim.latent import AbsmeanLinear, GridLinear, Share, SignsLinear, absmean, centred_signs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent(kind, share=1.0, rows=10, columns=24, dtype=torch.float32, norm_eps=None, activation_bits=8, **layout):
    """A layer in training of one of the three kinds, with random weights."""
    weight, bias = random(rows, columns), nn.Parameter(random(rows, seed=1).to(dtype), requires_grad=False)
    settings = {"activation_bits": activation_bits, "norm_eps": norm_eps, "dtype": dtype, "device": "meta"} | layout
    norm = None if norm_eps is None else random(columns, seed=2).abs() + 0.5
    if kind == "b1":
        packed = SignLinear(columns, rows, input_scale=False, per_tensor=True, scale_dtype=torch.float32, **settings)
        return SignsLinear(packed, weight, bias, Share(share), norm)
    if kind == "b1.58":
        return AbsmeanLinear(TernaryLinear(columns, rows, **settings), weight, bias, Share(share), norm)
    grid = {"group_size": 10, "offset": True, "scale_dtype": torch.float16}
    start = PT2LLM(group_size=10).compress(weight, torch.eye(columns))
    packed = TernaryLinear(columns, rows, **settings, **grid)
    return GridLinear(packed, weight, bias, Share(share), norm, start=start)


KINDS = ("b1.58", "b1", "grid")


def test_codes_are_odd_and_do_not_depend_on_the_scale():
    weight = random(40, 30)
    codes, gamma = absmean(weight)
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    assert gamma == weight.abs().mean()
    assert torch.equal(absmean(-weight)[0], -codes)
    scaled, larger = absmean(8 * weight)
    assert torch.equal(scaled, codes) and larger == 8 * gamma


def test_quantizing_again_keeps_the_codes_and_shrinks_the_scale_by_the_density():
    codes, gamma = absmean(random(40, 30))
    again, shrunk = absmean(gamma * codes)
    assert torch.equal(again, codes)
    assert shrunk.item() == pytest.approx((gamma * codes.abs().mean()).item())
    constant = 0.3 * torch.where(random(6, 5) < 0, -1.0, 1.0)
    codes, gamma = absmean(constant)
    assert torch.allclose(gamma * codes, constant)


def test_signs_are_centred_scaled_and_minus_at_zero():
    weight = torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 4.0]])  # of mean 2
    minus, beta = centred_signs(weight)
    assert minus.tolist() == [[False, True, True], [True, True, False]]
    assert beta.item() == 2
    layer = SignLinear(3, 2, bias=False, input_scale=False, per_tensor=True, scale_dtype=torch.float32, device="meta")
    layer = SignsLinear(layer, weight, None, Share()).packed()
    assert layer.dense().tolist() == [[2, -2, -2], [-2, -2, 2]]
    assert unpack_signs(layer.weight, 3).tolist() == minus.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_leads_from_the_latent_layer_to_the_quantized_one(kind):
    layer, x = latent(kind).train(), random(5, 24, seed=3)
    with torch.no_grad():
        layer.share.value = 0.0
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.share.value = 1.0
        group = 10 if kind == "grid" else 24
        quantized = int8_activations(x, group)
        expected = F.linear(quantized, layer.quantized(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer.effective_weight(), layer.quantized())
        layer.share.value = 0.25
        weight = 0.75 * layer.weight + 0.25 * layer.quantized()
        torch.testing.assert_close(layer(x), F.linear(0.75 * x + 0.25 * quantized, weight, layer.bias))
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-6, atol=1e-6)


def int8_activations(x, group):
    """int8 for each token and group, written out."""
    parts = []
    for part in x.split(group, dim=-1):
        s = 127 / part.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        parts.append((part * s).round().clamp(-128, 127) / s)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_straight_through(kind, share):
    layer, x, upstream = latent(kind, share).train(), random(5, 24, seed=3), random(5, 10, seed=4)
    x.requires_grad_()
    layer(x).backward(upstream)
    with torch.no_grad():
        quantized = int8_activations(x, 10 if kind == "grid" else 24)
        inputs = x.lerp(quantized, share)
        multiplied = layer.weight.lerp(layer.quantized(), share)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ inputs)
    torch.testing.assert_close(x.grad, upstream @ multiplied)
    if kind == "grid":
        of_offset = (upstream.T @ inputs)[:, :10].sum(1)  # of the first group
        torch.testing.assert_close(layer.offset.grad[:, 0], share * of_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["plain", "norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_layer_does_what_the_one_in_training_did(kind, norm_eps, dtype):
    layer, x = latent(kind, norm_eps=norm_eps, dtype=dtype).eval(), random(2, 7, 24, seed=3).to(dtype)
    with torch.no_grad():
        expected, packed = layer(x), layer.packed()
        assert torch.equal(packed.dense(), layer.quantized())
        found = packed(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("reciprocal", [True, False], ids=["bitlinear", "autobitlinear"])
def test_the_integer_path_gives_the_fake_quantized_product(reciprocal):
    layer, x = latent("b1.58", reciprocal_scale=reciprocal).eval(), random(6, 24, seed=3)
    state = layer.packed_state()
    codes = unpack_ternary(state["weight"], 10).to(torch.int32)
    s = 127 / x.abs().amax(-1, keepdim=True)
    sums = (x * s).round().to(torch.int32) @ codes.T
    assert sums.dtype == torch.int32
    gamma = 1 / state["weight_scale"] if reciprocal else state["weight_scale"]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), sums * gamma / s + layer.bias, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.packed()(x), sums * gamma / s + layer.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_tokens_and_zero_weights_do_no_harm(kind):
    layer, x = latent(kind, norm_eps=1e-5).train(), random(4, 24, seed=3)
    x[1] = 0
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y[1], layer.bias)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, layer.weight, layer.norm))
    nothing = latent(kind)
    with torch.no_grad():
        nothing.weight.zero_()
        assert torch.isfinite(nothing(x)).all() and torch.isfinite(nothing.packed().dense()).all()


def test_a_grid_starts_with_the_codes_scales_and_offsets_it_is_given():
    layer = latent("grid")
    start = PT2LLM(group_size=10).compress(random(10, 24), torch.eye(24))
    state = layer.packed_state()
    assert all(torch.equal(state[name], start[name]) for name in start)
    moved = (layer.weight - random(10, 24)).abs()
    assert (moved == 0).float().mean() > 0.3  # most weights are where they were
    assert (moved <= layer.scale.repeat_interleave(10, dim=1)[:, :24]).all()
