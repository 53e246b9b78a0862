"""The Triton kernels against the reference, in Triton's interpreter: run by test_triton_interpreter.py, see there."""

import os


os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import triton
import triton.language as tl
import triton_shim

from optimum_slim._kernels import pack_ternary, ternary_linear_dx_reference, ternary_linear_reference
from optimum_slim._kernels import triton as launcher


triton_shim.install()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SCALES = ["tensor", "row", "group128_offset", "group96"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(kind: str, out_features: int, columns: int, dtype=torch.float32):
    """(weight, scale, offset, group_size) of a random layer."""
    weight = pack_ternary(torch.randint(-1, 2, (out_features, columns), dtype=torch.int8))
    if kind == "tensor":
        return weight, torch.rand(1, dtype=dtype) + 0.1, None, columns
    group_size = columns if kind == "row" else int(kind.removeprefix("group").removesuffix("_offset"))
    shape = (out_features, -(-columns // group_size))
    offset = torch.randn(shape).to(dtype) * 0.2 if kind.endswith("offset") else None
    return weight, torch.rand(shape, dtype=dtype) + 0.1, offset, group_size


def assert_close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    found, expected = found.double(), expected.double()
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative RMS error {error:.2e}"


def check_linear(x, out_features, kind, act_bits, bias=None, scale_dtype=torch.float32):
    weight, scale, offset, group_size = layer(kind, out_features, x.shape[-1], scale_dtype)
    arguments = (x, weight, scale, offset, bias, out_features, group_size, act_bits)
    assert_close(launcher.ternary_linear_triton(*arguments), ternary_linear_reference(*arguments))


@pytest.mark.parametrize("act_bits", [0, 8], ids=["w2a16", "w2a8"])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_shapes(dtype, kind, tokens, act_bits):
    check_linear(torch.randn(tokens, 300).to(dtype), 130, kind, act_bits, bias=torch.randn(130).to(dtype))


@pytest.mark.parametrize("act_bits", [0, 8], ids=["w2a16", "w2a8"])
@pytest.mark.parametrize("kind", ["row", "group128_offset", "group256", "group100", "group40", "group7"])
def test_whole_tiles_and_odd_groups(kind, act_bits):
    check_linear(torch.randn(2, 60 if kind == "group7" else 512), 256, kind, act_bits)


@pytest.mark.parametrize("act_bits", [0, 8], ids=["w2a16", "w2a8"])
@pytest.mark.parametrize("kind", ["tensor", "row", "group128_offset", "group100"])
def test_split_columns(kind, act_bits):
    check_linear(torch.randn(2, 1900).bfloat16(), 36, kind, act_bits, bias=torch.randn(36))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_in_half_precision(scale_dtype):
    check_linear(torch.randn(3, 256), 64, "group128_offset", 8, scale_dtype=scale_dtype)


def test_batched_and_strided_activations():
    x = torch.randn(2, 200, 5).transpose(1, 2)
    check_linear(x, 40, "row", 8)
    weight, scale, _, group_size = layer("row", 40, 200)
    empty = launcher.ternary_linear_triton(x[:0], weight, scale, None, None, 40, group_size, 8)
    assert empty.shape == (0, 5, 40)


@pytest.mark.parametrize("out_features", [1, 2, 3, 5])
def test_padding_rows(out_features):
    check_linear(torch.randn(2, 64), out_features, "row", 8)


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient(dtype, kind, tokens):
    weight, scale, offset, group_size = layer(kind, 130, 300)
    dy = torch.randn(tokens, 130).to(dtype)
    found = launcher.ternary_linear_dx_triton(dy, weight, scale, offset, group_size)
    assert_close(found, ternary_linear_dx_reference(dy, weight, scale, offset, group_size))


@pytest.mark.parametrize("group_size", [None, 128, 100], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizer_is_exact(dtype, group_size):
    x = torch.randn(4, 700).to(dtype)
    x[1] = 0
    x[2, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 63.5])  # s = 1: halves round to even
    x[2, 8:] = torch.arange(692).remainder(100) - 49.5
    segments = launcher.cut_columns(700, group_size, launcher.Tiles(16, 64, 128, 4, 4, splits=3))
    q, x_scale, x_sum = launcher.quantize_activations(x, segments, int8=True, per_token=group_size is None)
    block = group_size or 700
    groups = torch.nn.functional.pad(x.float(), (0, -700 % block)).unflatten(-1, (-1, block))
    s = 127 / groups.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    expected = (groups * s).round().clamp(-128, 127)
    assert torch.equal(q.float(), expected.flatten(1)[:, :700])
    assert torch.equal(x_scale, 1 / s.squeeze(-1))
    for i in range(segments.count):
        part = q[:, i * segments.size : (i + 1) * segments.size]
        assert torch.equal(x_sum[:, i], part.sum(1, dtype=torch.int32))


@triton.jit
def bf16_kernel(a, b, rounded, product, matrix, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(rounded + i, tl.load(a + i).to(tl.bfloat16))
    x, y = tl.load(a + i).to(tl.bfloat16), tl.load(b + i)
    tl.store(product + i, -(x * y) + (x > y).to(tl.bfloat16))
    square = i[:, None] * 16 + tl.arange(0, 16)[None, :]
    left = tl.load(b + square)
    tl.store(matrix + square, tl.dot(left, tl.trans(left)))


def test_shim_rounds_and_computes_bf16_as_torch():
    a, b = torch.randn(16) * 100, torch.randn(256).bfloat16()
    rounded, product, matrix = torch.empty(16).bfloat16(), torch.empty(16).bfloat16(), torch.empty(16, 16)
    bf16_kernel[(1,)](a, b, rounded, product, matrix, BLOCK=16)
    x, y = a.bfloat16(), b[:16]
    assert torch.equal(rounded, x)
    assert torch.equal(product, -(x * y) + (x > y).bfloat16())
    square = b.float().view(16, 16)
    torch.testing.assert_close(matrix, square @ square.T)
