"""`BinaryLinear`: what goes in comes out, damage is noticed, and bytes are as few as promised."""

import copy

import pytest
import torch
from binary_problems import random_levels
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_slim import BinaryLinear


FORMS = [(False, False), (True, False), (False, True), (True, True)]
SHAPES = [(6, 40, 16), (5, 37, 16), (1, 3, 8), (4, 130, 128), (7, 24, None)]


def layer_of(rows=6, columns=40, size=16, offset=True, scaled=True, seed=0, **settings):
    """A layer and the levels it holds."""
    dtype = settings.get("scale_dtype", torch.float16)
    levels = random_levels(rows, columns, min(size or columns, columns), offset, scaled, seed, dtype)
    settings = {"bias": False, "group_size": size} | settings
    layer = BinaryLinear(columns, rows, offset=offset, columns=scaled, **settings)
    layer.load_packed(layer.packed_state(levels))
    return layer, levels


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_what_goes_in_comes_out(offset, scaled, rows, columns, size):
    layer, levels = layer_of(rows, columns, size, offset, scaled)
    dense = levels.dense()
    assert torch.equal(layer.dense(), dense) and torch.equal(layer.levels().dense(), dense)
    assert torch.equal(layer.dense(torch.bfloat16), dense.to(torch.bfloat16))
    assert torch.equal(layer.salient(), levels.salient)
    layer.validate()
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_scales_keep_their_dtype(dtype):
    layer, levels = layer_of(scale_dtype=dtype)
    assert {layer.weight_scale.dtype, layer.weight_offset.dtype, layer.weight_columns.dtype} == {dtype}
    assert torch.equal(layer.dense(), levels.dense())


def test_bias_gradient_and_copies():
    layer, levels = layer_of(bias=True)
    with torch.no_grad():
        layer.bias.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = nn.functional.linear(x, levels.dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, levels.dense().sum(0).expand(2, -1), rtol=1e-4, atol=1e-5)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone.weight, layer.weight) and not clone.weight_scale.requires_grad


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_dense_again(transposed):
    layer, levels = layer_of(bias=True, transposed=transposed)
    linear = layer.to_linear(torch.float32)
    assert type(linear) is (Conv1D if transposed else nn.Linear)
    assert torch.equal(linear.weight.T if transposed else linear.weight, levels.dense())


@pytest.mark.parametrize("name", ["weight", "weight_salient"])
def test_bits_past_the_last_column_are_noticed(name):
    layer, _ = layer_of(5, 37)
    sound = getattr(layer, name).data.clone()
    for bit in (5, 7):
        damaged = sound.clone()
        damaged.view(-1)[-1] |= 1 << bit
        getattr(layer, name).data = damaged
        with pytest.raises(ValueError, match=r"past the last column.*damaged"):
            layer.validate()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(6, 5, dtype=torch.uint8)),
        ("weight", torch.zeros(6, 2, 5)),
        ("weight_salient", torch.zeros(6, dtype=torch.uint8)),
        ("weight_scale", torch.zeros(6, 3, 3)),
        ("weight_scale", torch.zeros(6, 3, 4, dtype=torch.uint8)),
        ("weight_offset", torch.zeros(6, 3, 4)),
        ("weight_columns", torch.zeros(40)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_state_that_does_not_fit_is_refused(name, tensor):
    layer, _ = layer_of()
    state = {key: getattr(layer, key) for key in layer.packed_tensors()}
    with pytest.raises(ValueError, match=f"{name} has"):
        layer.load_packed(state | {name: tensor})
    del state[name]
    with pytest.raises(ValueError, match="do not fit"):
        layer.load_packed(state)


@pytest.mark.parametrize("size", [0, 4, 12, -8])
def test_group_sizes_that_no_byte_ends_at_are_refused(size):
    with pytest.raises(ValueError, match=f"group_size must be a multiple of 8.*40 inputs.*found {size}"):
        BinaryLinear(40, 6, group_size=size)


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_stored_bits_are_the_bytes_of_the_tensors(offset, scaled, rows, columns, size):
    layer, _ = layer_of(rows, columns, size, offset, scaled)
    tensors = [getattr(layer, key) for key in layer.packed_tensors()]
    assert layer.stored_bits() == 8 * sum(t.numel() * t.element_size() for t in tensors)


def test_bits_of_a_large_layer():
    for offset, columns, expected in ((False, False, 2.5), (True, False, 2.875), (False, True, 2.5 + 32 / 4096)):
        layer = BinaryLinear(4096, 4096, False, offset=offset, columns=columns, device="meta")
        assert layer.stored_bits() / 4096**2 == pytest.approx(expected + 1 / 4096, abs=1e-9)


def test_nominal_bits_and_repr():
    layer, levels = layer_of()
    assert layer.nominal_bits() == pytest.approx(1 + float(levels.salient.float().mean()))
    assert "in_features=40, out_features=6, bias=False, group_size=16, offset=True, columns=True" in repr(layer)
