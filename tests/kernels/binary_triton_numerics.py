"""The sign and binary Triton kernels against the reference, in the interpreter: run by test_triton_interpreter.py."""

import os


os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import triton_shim

from optimum_slim._kernels import binary_triton, sign_triton, triton_planes
from optimum_slim._kernels.binary_reference import binary_dense, binary_linear_dx_reference, binary_linear_reference
from optimum_slim._kernels.sign_reference import (
    pack_signs,
    sign_dense,
    sign_linear_dx_reference,
    sign_linear_reference,
)


triton_shim.install()

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FP32, FP16, BF16]
TOLERANCE = {FP32: 2e-6, FP16: 1e-3, BF16: 5e-3}
FORMS = ["plain", "offset", "columns", "columns offset"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    found, expected = found.double(), expected.double()
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative RMS error {error:.2e}"


def sign_layer(outs, columns, vectors=True, dtype=FP32):
    """(weight, scale_in, scale_out): with a number for every input and output, or with one for all."""
    weight = pack_signs(torch.rand(outs, columns) < 0.5)
    if vectors:
        return weight, torch.randn(columns).to(dtype), torch.rand(outs).to(dtype) + 0.1
    return weight, None, torch.rand(1).to(dtype) + 0.1


def binary_layer(form, outs, columns, group_size, dtype=FP32):
    """(weight, salient, scale, offset, columns) of a random layer, a tenth of it salient."""
    weight = torch.stack([pack_signs(torch.rand(outs, columns) < 0.5) for _ in range(2)], dim=1)
    salient = pack_signs(torch.rand(columns) < 0.1)
    groups = -(-columns // group_size)
    offset = torch.randn(outs, groups, 3).to(dtype) * 0.2 if "offset" in form else None
    factors = torch.rand(2, columns).to(dtype) + 0.5 if "columns" in form else None
    return weight, salient, torch.rand(outs, groups, 4).to(dtype) + 0.1, offset, factors


def check_sign(x, layer, bits, bias=None):
    arguments = (x, *layer, bias, bits)
    assert_close(sign_triton.sign_linear_triton(*arguments), sign_linear_reference(*arguments))


def check_binary(x, layer, group_size, bias=None):
    arguments = (x, *layer, bias, group_size)
    assert_close(binary_triton.binary_linear_triton(*arguments), binary_linear_reference(*arguments))


@pytest.mark.parametrize("columns", [1, 300, 512])
def test_planes_hold_every_eighth_column(columns):
    x, factors = torch.randn(3, columns).bfloat16(), torch.randn(1, columns)
    planes, _ = triton_planes.arrange(x, factors, variants=2)
    rows = planes.transpose(2, 3).flatten(2)
    assert torch.equal(rows[0, :, :columns], (x * factors).bfloat16())
    assert torch.equal(rows[1, :, :columns], x)
    assert rows.shape[2] % 512 == 0 and not rows[..., columns:].any()


def test_planes_of_int8_are_rounded_as_the_reference_does():
    x, factors = torch.randn(4, 300), torch.rand(1, 300)
    x[1] = 0
    x[2], factors[0, :150] = torch.arange(300).remainder(100) - 49.5, 1  # many halves
    x[2, 0] = 127
    planes, x_scale = triton_planes.arrange(x, factors, int8=True)
    scaled = x * factors
    s = 127 / scaled.abs().amax(1).clamp(min=1e-5)
    assert torch.equal(x_scale, 1 / s)
    expected = (scaled * s[:, None]).round().clamp(-128, 127)
    assert torch.equal(planes[0].transpose(1, 2).flatten(1)[:, :300].float(), expected)


@pytest.mark.parametrize("bits", [0, 8], ids=["w1a16", "w1a8"])
@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs(dtype, tokens, bits):
    layer = sign_layer(60, 300, vectors=tokens == 3, dtype=dtype)
    check_sign(torch.randn(tokens, 300).to(dtype), layer, bits, torch.randn(60).to(dtype))


@pytest.mark.parametrize("bits", [0, 8], ids=["w1a16", "w1a8"])
@pytest.mark.parametrize(("outs", "columns"), [(1, 1), (70, 512), (36, 3000)])
def test_signs_of_odd_and_whole_and_split_rows(outs, columns, bits):
    if columns == 3000:
        assert triton_planes.choose_plane_tiles(2, outs, columns // 8, nvidia=False).splits > 1
    check_sign(torch.randn(2, columns).bfloat16(), sign_layer(outs, columns), bits, torch.randn(outs))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_binary(form, dtype):
    layer = binary_layer(form, 60, 300, 128, dtype)
    check_binary(torch.randn(3, 300).to(dtype), layer, 128, torch.randn(60).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_binary_of_many_tokens(dtype):
    layer = binary_layer("columns offset", 20, 100, 48)
    check_binary(torch.randn(17, 100).to(dtype), layer, 48, torch.randn(20).to(dtype))


@pytest.mark.parametrize("group_size", [8, 256, 384, 512, 700])
def test_binary_groups(group_size):
    check_binary(torch.randn(2, 520).half(), binary_layer("offset", 10, 520, group_size, FP16), group_size)


@pytest.mark.parametrize(("outs", "columns", "group_size"), [(1, 1, 1), (70, 512, 128), (36, 1300, 128)])
def test_binary_of_odd_and_whole_and_split_rows(outs, columns, group_size):
    if columns == 1300:
        assert triton_planes.choose_plane_tiles(2, outs, columns // 8, nvidia=False, step=64).splits > 1
    layer = binary_layer("plain", outs, columns, group_size)
    check_binary(torch.randn(2, columns).bfloat16(), layer, group_size, torch.randn(outs))


def test_batched_and_strided_activations():
    x = torch.randn(2, 200, 3).bfloat16().transpose(1, 2)
    signs, layer = sign_layer(10, 200), binary_layer("plain", 10, 200, 128)
    check_sign(x, signs, 8)
    check_binary(x, layer, 128)
    assert sign_triton.sign_linear_triton(x[:0], *signs, None, 0).shape == (0, 3, 10)
    assert binary_triton.binary_linear_triton(x[:0], *layer, None, 128).shape == (0, 3, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradients(dtype):
    dy = torch.randn(3, 20).to(dtype)
    arguments = (dy, *sign_layer(20, 100, dtype=dtype), 100)
    assert_close(sign_triton.sign_linear_dx_triton(*arguments), sign_linear_dx_reference(*arguments))
    arguments = (dy, *binary_layer("offset", 20, 100, 40, dtype), 100, 40)
    assert_close(binary_triton.binary_linear_dx_triton(*arguments), binary_linear_dx_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_expanding_is_exact(form, dtype):
    layer = sign_layer(9, 100, vectors="columns" in form, dtype=FP16)
    assert torch.equal(sign_triton.expand_signs(*layer, 100, dtype), sign_dense(*layer, 100, dtype))
    for group_size in (100, 48):
        layer = binary_layer(form, 9, 100, group_size, FP16)
        found = binary_triton.expand_binary(*layer, 100, group_size, dtype)
        assert torch.equal(found, binary_dense(*layer, 100, group_size, dtype))
