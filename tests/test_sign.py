import copy

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from torch.nn.functional import layer_norm, linear
from transformers.pytorch_utils import Conv1D

from optimum_slim import OneBit, SignLinear, slim
from optimum_slim._kernels import pack_signs, unpack_signs
from optimum_slim.packed import rms_norm


def random_signs(in_features=21, out_features=10, bias=True, seed=0, **layout) -> SignLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = SignLinear(in_features, out_features, bias, **layout)
    minus = torch.rand(out_features, in_features, generator=generator) < 0.5
    state = {"weight": pack_signs(minus)}
    for name, (shape, dtype) in layer.packed_tensors().items():
        if name != "weight":
            state[name] = torch.rand(shape, generator=generator).add(0.1).to(dtype)
    layer.load_packed(state)
    if bias:
        layer.bias.data = torch.randn(out_features, generator=generator)
    return layer


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "both scales": {},
    "rows only": {"input_scale": False},
    "one scale": {"input_scale": False, "per_tensor": True, "scale_dtype": torch.float32},
    "no bias": {"bias": False},
    "whole bytes": {"in_features": 24},
}


def test_the_drawn_layout_by_hand():
    minus = torch.zeros(1, 10, dtype=torch.bool)
    minus[0, [0, 3, 9]] = True
    assert pack_signs(minus).tolist() == [[0b0000_1001, 0b0000_0010]]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_forward_is_the_dense_product(layout):
    layer = random_signs(**layout)
    x = inputs(3, layer.in_features)
    torch.testing.assert_close(layer(x), linear(x, layer.dense(), layer.bias), rtol=1e-5, atol=1e-5)


def test_dense_is_the_signs_between_the_scales():
    layer = SignLinear(3, 2, bias=False, scale_dtype=torch.float32)
    minus = torch.tensor([[True, False, False], [False, True, True]])
    scales = {"weight_in": torch.tensor([1.0, 2.0, 4.0]), "weight_out": torch.tensor([3.0, 0.5])}
    layer.load_packed({"weight": pack_signs(minus)} | scales)
    assert layer.dense().tolist() == [[-3.0, 6.0, 12.0], [0.5, -1.0, -2.0]]


def test_layer_algebra():
    """X (S ∘ a bᵀ)ᵀ == ((X ∘ b) Sᵀ) ∘ a, in double precision."""
    generator = torch.Generator().manual_seed(0)
    x, signs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 12), (7, 12)))
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (7, 12))
    signs = signs.sign()
    layer = SignLinear(12, 7, bias=False, scale_dtype=torch.float32)
    layer.load_packed({"weight": pack_signs(signs < 0), "weight_in": b, "weight_out": a})
    expected = x @ (signs * torch.outer(a, b)).T
    torch.testing.assert_close(((x * b) @ signs.T) * a, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x.float()), expected.float(), rtol=1e-5, atol=1e-5)


def test_int8_activations_are_rounded_behind_the_input_scales():
    layer = random_signs(activation_bits=8, bias=False)
    x = inputs(4, 21)
    scaled = x * layer.weight_in.float()
    step = scaled.abs().amax(1, keepdim=True) / 127
    rounded = (scaled / step).round() * step
    signs = torch.where(unpack_signs(layer.weight, 21), -1.0, 1.0)
    torch.testing.assert_close(layer(x), rounded @ signs.T * layer.weight_out.float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x), random_signs(bias=False)(x), atol=1e-4)


def test_post_norm_follows_the_product_and_the_bias_follows_it():
    layer, plain = random_signs(post_norm=True), random_signs(bias=False)
    x = inputs(2, 3, 21)
    torch.testing.assert_close(layer(x), layer_norm(plain(x), (10,)) + layer.bias)
    torch.testing.assert_close((layer(x) - layer.bias).mean(-1), torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_post_norm_does_not_see_a_factor_on_the_output_scales():
    layer, x = random_signs(post_norm=True, scale_dtype=torch.float32), 30 * inputs(4, 21)
    before = layer(x)
    layer.weight_out.data *= 4
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    plain = random_signs(scale_dtype=torch.float32, bias=False)
    before = plain(x)
    plain.weight_out.data *= 4
    torch.testing.assert_close(plain(x), 4 * before)


def test_a_norm_over_the_inputs():
    layer, plain, x = random_signs(norm_eps=1e-5), random_signs(), inputs(4, 21)
    assert layer.packed_tensors()["weight_norm"] == ((21,), torch.float32)
    layer.load_packed({name: getattr(plain, name) for name in plain.packed_tensors()} | {"weight_norm": x[0].abs()})
    layer.bias = plain.bias
    torch.testing.assert_close(layer(x), plain(rms_norm(x, x[0].abs(), 1e-5)))


def test_stored_bits_are_a_bit_a_weight_and_16_for_each_row_and_column():
    assert SignLinear(256, 64, bias=False).stored_bits() == 256 * 64 * (1 + 16 * (1 / 256 + 1 / 64))
    assert SignLinear(4096, 4096, bias=False, device="meta").stored_bits() / 4096**2 == 1.0078125
    assert SignLinear(9, 5, bias=False).stored_bits() == 5 * 2 * 8 + 16 * (9 + 5)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(10, 2, dtype=torch.uint8)),
        ("weight", torch.zeros(10, 3)),
        ("weight_in", torch.ones(10)),
        ("weight_out", torch.ones(1)),
    ],
)
def test_state_that_does_not_fit_is_refused(name, tensor):
    layer = random_signs()
    state = {key: getattr(layer, key) for key in layer.packed_tensors()} | {name: tensor}
    with pytest.raises(ValueError, match=f"{name} has"):
        layer.load_packed(state)


def test_bits_past_the_last_column_are_refused():
    layer = random_signs()
    layer.validate()
    layer.weight.data[3, -1] |= 1 << 5
    with pytest.raises(ValueError, match="past the last column"):
        layer.validate()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_reaches_the_input_and_nothing_else(layout):
    layer = random_signs(**layout)
    x = inputs(2, layer.in_features).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None and layer.weight_out.grad is None and not layer.weight.requires_grad


def test_deepcopy_and_dtype_casts_keep_the_bits():
    layer = random_signs(post_norm=True)
    clone = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(clone.weight, layer.weight) and clone.weight.dtype == torch.uint8
    y = clone(inputs(2, 21).bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(inputs(2, 21)), rtol=0.05, atol=0.05)


def test_to_linear_gives_back_the_kind_of_layer_it_replaced():
    conv, step = Conv1D(10, 24), OneBit()
    packed = step.empty(conv)
    packed.load_packed(step.pack("conv", conv.weight.T))
    packed.bias = conv.bias
    dense = packed.to_linear(torch.float32)
    assert type(dense) is Conv1D and dense.weight.shape == conv.weight.shape
    x = inputs(2, 24)
    torch.testing.assert_close(dense(x), packed(x), rtol=1e-5, atol=1e-5)
    assert type(random_signs().to_linear(torch.float32)) is nn.Linear


def test_a_layer_with_post_norm_is_no_linear_layer():
    with pytest.raises(ValueError, match=r"SignLinear.*normalizes its outputs.*variant='plain'"):
        random_signs(post_norm=True).to_linear(torch.float32)


def test_whole_model_compiles_without_graph_breaks():
    model = tiny_llama(num_hidden_layers=1)
    slim(model, OneBit(variant="paper"))
    ids = token_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
