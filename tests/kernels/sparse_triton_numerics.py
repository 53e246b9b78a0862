"""The sparse Triton kernels against the reference, in Triton's interpreter: run by test_triton_interpreter.py."""

import os


os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import triton_shim

from optimum_slim._kernels import (
    pack_codes,
    pack_mask,
    pack_values,
    sparse_linear_dx_reference,
    sparse_linear_reference,
)
from optimum_slim._kernels import sparse_triton as launcher
from optimum_slim._kernels.sparse_reference import sparse_dense


triton_shim.install()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
FORMS = ["flat", "rows", "2:4", "1:4"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_mask(form: str, out_features: int, columns: int) -> torch.Tensor:
    """Half the columns kept; flat ones also have an empty row, a full one, and rows of any other count."""
    noise = torch.rand(out_features, columns)
    if form == "flat":
        mask = noise < 0.5
        mask[0], mask[-1] = False, True
        return mask
    if form == "rows":
        return noise.argsort(1).argsort(1) < columns // 2
    groups = torch.nn.functional.pad(noise, (0, -columns % 4), value=-1).unflatten(1, (-1, 4))
    groups[:, -1, columns % 4 or 4 :] = -torch.arange(1.0, 1 + -columns % 4)  # past the end: the first ones first
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(int(form[0])).indices, True)
    return mask.flatten(1)[:, :columns]


def pack(form, mask, bits=0, group_size=None, value_dtype=torch.float32):
    """((weight, values, rows, scale, zero), (keep, bits, group_size)) of random weights under `mask`."""
    keep = 0 if form in ("flat", "rows") else int(form[0])
    ragged, columns = form == "flat", mask.shape[1]
    weight = pack_mask(mask.clone(), keep)
    if bits == 0:
        values, rows = pack_values(torch.randn(mask.shape).to(value_dtype), mask.clone(), keep, ragged=ragged)
        return (weight, values, rows, None, None), (keep, 0, columns)
    codes = torch.randint(2**bits, mask.shape, dtype=torch.uint8)
    values, rows = pack_codes(codes, mask.clone(), bits, keep, ragged=ragged)
    grid = (len(mask), -(-columns // (group_size or columns)))
    scale, zero = torch.rand(grid) + 0.1, torch.randint(2**bits, grid, dtype=torch.uint8)
    return (weight, values, rows, scale, zero), (keep, bits, group_size or columns)


def layer(form, out_features, columns, **options):
    return pack(form, make_mask(form, out_features, columns), **options)


def assert_close(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    found, expected = found.double(), expected.double()
    error = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    assert error < tolerance, f"relative RMS error {error:.2e}"


def check_linear(x, packed, bias=None):
    tensors, numbers = packed
    arguments = (x, *tensors, bias, *numbers)
    assert_close(launcher.sparse_linear_triton(*arguments), sparse_linear_reference(*arguments))


@pytest.mark.parametrize("bits", [0, 4], ids=["values", "codes"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_shapes(dtype, form, tokens, bits):
    packed = layer(form, 6, 300, bits=bits, value_dtype=dtype)
    check_linear(torch.randn(tokens, 300).to(dtype), packed, torch.randn(6).to(dtype))


@pytest.mark.parametrize("columns", [1, 3, 31, 33, 256])
@pytest.mark.parametrize("bits", [0, 3], ids=["values", "codes"])
@pytest.mark.parametrize("form", FORMS)
def test_odd_columns(form, bits, columns):
    check_linear(torch.randn(2, columns), layer(form, 4, columns, bits=bits))


@pytest.mark.parametrize("out_features", [1, 2, 5])
@pytest.mark.parametrize("tokens", [2, 6])
def test_few_rows(tokens, out_features):
    check_linear(torch.randn(tokens, 64), layer("flat", out_features, 64), torch.randn(out_features))


@pytest.mark.parametrize(("tokens", "columns"), [(1, 4500), (16, 700)])
@pytest.mark.parametrize("form", FORMS)
def test_split_columns(form, tokens, columns):
    packed = layer(form, 3, columns, value_dtype=torch.bfloat16)
    per_split = launcher.choose_sparse_tiles(tokens, 3, columns, nvidia=True).columns_per_split(columns)
    assert columns > 2 * per_split
    check_linear(torch.randn(tokens, columns).bfloat16(), packed, torch.randn(3))


@pytest.mark.parametrize("bits", [0, 4], ids=["values", "codes"])
@pytest.mark.parametrize("tokens", [1, 9, 17])
@pytest.mark.parametrize("kept", [False, True], ids=["all dropped", "all kept"])
def test_no_weight_and_every_weight(kept, tokens, bits):
    packed = pack("flat", torch.full((4, 160), kept), bits=bits)
    check_linear(torch.randn(tokens, 160), packed, torch.randn(4))


@pytest.mark.parametrize("group_size", [None, 128, 40, 50])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["flat", "2:4", "1:4"])
def test_bits_and_groups(form, bits, group_size):
    packed = layer(form, 4, 140, bits=bits, group_size=group_size)
    for tokens in (1, 9, 17):
        check_linear(torch.randn(tokens, 140), packed)


@pytest.mark.parametrize("form", ["flat", "2:4"])
def test_index_and_values_that_no_word_begins_at(form):
    (weight, values, *rest), numbers = layer(form, 6, 256, bits=4)
    moved = torch.empty(weight.numel() + 1, dtype=torch.uint8)[1:].view(weight.shape).copy_(weight)
    values = torch.empty(values.numel() + 1, dtype=torch.uint8)[1:].view(values.shape).copy_(values)
    assert moved.data_ptr() % 4 and values.data_ptr() % 4
    check_linear(torch.randn(2, 256), ((moved, values, *rest), numbers))


def test_padding_after_the_last_row_of_codes():
    (weight, values, *rest), numbers = layer("flat", 7, 100, bits=4)
    padded = torch.cat([values, values.new_full((7,), 255)])
    check_linear(torch.randn(2, 100), ((weight, padded, *rest), numbers))


@pytest.mark.parametrize("tokens", [1, 9, 17])
def test_values_of_another_dtype_than_x(tokens):
    check_linear(torch.randn(tokens, 200).bfloat16(), layer("flat", 10, 200, value_dtype=torch.float16))


def test_batched_and_strided_activations():
    packed = tensors, numbers = layer("2:4", 10, 200)
    x = torch.randn(2, 200, 3).transpose(1, 2)
    check_linear(x, packed)
    assert launcher.sparse_linear_triton(x[:0], *tensors, None, *numbers).shape == (0, 3, 10)


@pytest.mark.parametrize("bits", [0, 4], ids=["values", "codes"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient(dtype, form, bits):
    tensors, numbers = layer(form, 4, 100, bits=bits)
    dy = torch.randn(3, 4).to(dtype)
    found = launcher.sparse_linear_dx_triton(dy, *tensors, 100, *numbers)
    assert_close(found, sparse_linear_dx_reference(dy, *tensors, 100, *numbers))


@pytest.mark.parametrize("group_size", [None, 16, 50])
@pytest.mark.parametrize("form", FORMS)
def test_expanding_is_exact(form, group_size):
    for bits, dtype in ((0, torch.float16), (4, torch.float32), (4, torch.bfloat16)):
        tensors, numbers = layer(form, 4, 100, bits=bits, group_size=group_size)
        found = launcher.expand_sparse(*tensors, 100, *numbers, dtype)
        assert torch.equal(found, sparse_dense(*tensors, 100, *numbers, dtype))
