"""The C kernel of sparse layers: every instruction set of this machine against the reference."""

import pytest
import torch
from sanitized import run_sanitized

from optimum_slim import _kernels as kernels
from optimum_slim._kernels import cpu, sparse_cpu, sparse_reference


LIBRARY, BEST, _ORIGIN = cpu.load_library()
AVAILABLE = sparse_cpu.SPARSE_PATHS[: sparse_cpu.sparse_isa(BEST) + 1] if LIBRARY is not None else ()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(params=["reference", *sparse_cpu.SPARSE_PATHS])
def path(request, monkeypatch):
    """Run the test on one CPU path; skip those this processor lacks."""
    if request.param == "reference":
        monkeypatch.setattr(sparse_cpu, "load_library", lambda: (None, "reference", "test"))
    elif request.param not in AVAILABLE:
        pytest.skip(f"{request.param} is not available here")
    else:
        monkeypatch.setattr(sparse_cpu, "sparse_isa", lambda _path: AVAILABLE.index(request.param))
    return request.param


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_mask(outs, columns, form):
    """Flat rows have an empty and a full one, where there are three."""
    if form in ("1:4", "2:4"):
        keep, groups = int(form[0]), -(-columns // 4)
        order = torch.rand(outs, groups, 4)
        order[:, -1] -= 4 * (torch.arange(4) < columns - 4 * (groups - 1))  # columns there are come first
        chosen = order.argsort(-1)[..., :keep]
        mask = torch.zeros(outs, groups, 4, dtype=torch.bool).scatter_(2, chosen, True)
        return mask.flatten(1)[:, :columns].contiguous()
    if form == "uniform":
        chosen = torch.rand(outs, columns).argsort(1)[:, : (columns + 1) // 2]
        return torch.zeros(outs, columns, dtype=torch.bool).scatter_(1, chosen, True)
    mask = torch.rand(outs, columns) < 0.4
    if outs > 2:
        mask[1], mask[2] = False, True
    return mask


def pack(mask, form, dtype=torch.float32, bits=0, group_size=None):
    """The packed arguments of `sparse_linear` between x and bias, and the numbers after it."""
    keep, ragged = {"1:4": 1, "2:4": 2}.get(form, 0), form == "flat"
    outs, columns = mask.shape
    weight, group_size = kernels.pack_mask(mask, keep), group_size or columns
    if not bits:
        values, rows = kernels.pack_values(torch.randn(outs, columns).to(dtype), mask, keep, ragged=ragged)
        return (weight, values, rows, None, None), (keep, 0, group_size)
    codes = torch.randint(0, 2**bits, (outs, columns), dtype=torch.uint8)
    values, rows = kernels.pack_codes(codes, mask, bits, keep, ragged=ragged)
    scale = (torch.rand(outs, -(-columns // group_size)) + 0.1).to(dtype)
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8)
    return (weight, values, rows, scale, zero), (keep, bits, group_size)


def error(found, expected):
    """Root of the mean squared error, relative to that of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-3))


def check(mask, form, x, *, dtype=torch.float32, bits=0, group_size=None, tokens=(1, 2, 4, 7, 11, 30)):
    packed, numbers = pack(mask, form, dtype, bits, group_size)
    bias = torch.randn(len(mask)).to(dtype)
    for count in tokens:
        arguments = (x[:count], *packed, bias, *numbers)
        y, expected = kernels.sparse_linear(*arguments), kernels.sparse_linear_reference(*arguments)
        assert y.dtype == x.dtype and y.shape == expected.shape
        assert error(y, expected) < TOLERANCE[x.dtype], f"{count} tokens"
    dense = (*packed, mask.shape[1], *numbers)
    for wanted in FLOATS:
        assert torch.equal(kernels.sparse_dense(*dense, wanted), sparse_reference.sparse_dense(*dense, wanted)), wanted


FORMS = ["flat", "uniform", "1:4", "2:4"]
SHAPES = [(1, 1), (2, 3), (5, 64), (3, 70), (64, 127), (7, 330), (130, 128), (65, 576)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(path, shape, bits, form):
    check(random_mask(*shape, form), form, torch.randn(30, shape[1]), bits=bits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [0, 2, 3, 4, 5, 6, 7, 8])
def test_dtypes(path, bits, form):
    mask = random_mask(21, 200, form)
    for dtype in FLOATS:
        for of_x in FLOATS:
            check(mask, form, torch.randn(30, 200).to(of_x), dtype=dtype, bits=bits, tokens=(1, 3, 30))


@pytest.mark.parametrize("group_size", [1, 7, 8, 16, 48, 64, 128, 256, 1000])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups(path, bits, group_size):
    for form in ("flat", "2:4"):
        for of_x in (torch.float32, torch.bfloat16):
            x = torch.randn(30, 330).to(of_x)
            check(random_mask(9, 330, form), form, x, bits=bits, group_size=group_size, tokens=(1, 6, 30))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("form", ["flat", "uniform"])
def test_everything_or_nothing_kept(path, form, bits, kept):
    mask = torch.full((5, 150), kept)
    packed, numbers = pack(mask, form, torch.bfloat16, bits)
    assert packed[1].numel() > 0 or not kept
    x, bias = torch.randn(3, 150, dtype=torch.bfloat16), torch.randn(5)
    y = kernels.sparse_linear(x, *packed, bias, *numbers)
    if kept:
        assert error(y, kernels.sparse_linear_reference(x, *packed, bias, *numbers)) < TOLERANCE[x.dtype]
    else:
        assert torch.equal(y, bias.bfloat16().expand(3, 5))


def test_zero_point_beyond_the_codes(path):
    """`zero` is a whole byte: codes of 2 bits may be shifted by up to 255."""
    mask = random_mask(6, 130, "flat")
    for bits in (2, 4, 6):
        (weight, values, rows, scale, _), numbers = pack(mask, "flat", torch.float32, bits)
        zero = torch.tensor([0, 16, 31, 100, 200, 255], dtype=torch.uint8)[:, None]
        for x in (torch.randn(3, 130), torch.randn(3, 130, dtype=torch.bfloat16)):
            arguments = (x, weight, values, rows, scale, zero, None, *numbers)
            expected = kernels.sparse_linear_reference(*arguments)
            assert error(kernels.sparse_linear(*arguments), expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("bits", [0, 4])
def test_threads_agree_bit_for_bit(path, bits):
    packed, numbers = pack(random_mask(501, 700, "flat"), "flat", torch.bfloat16, bits)
    for tokens in (1, 3, 12):
        for dtype in FLOATS:
            x = torch.randn(tokens, 700).to(dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernels.sparse_linear(x, *packed, None, *numbers))
            assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_and_misaligned_tensors(path):
    mask = random_mask(33, 70, "flat")
    (weight, values, rows, _, _), numbers = pack(mask, "flat")
    shifted = torch.zeros(weight.numel() + 3, dtype=torch.uint8)[3:].view_as(weight).copy_(weight)
    for x in (
        torch.randn(70, 5).T,
        torch.randn(5, 140)[:, ::2],
        torch.randn(1, 70).expand(5, 70),
        torch.randn(351)[1:].view(5, 70),
        torch.randn(351, dtype=torch.float16)[1:].view(5, 70),
    ):
        expected = kernels.sparse_linear(x.contiguous().clone(), weight, values, rows, None, None, None, *numbers)
        strided = torch.stack([values, values], dim=1)[:, 0]
        for index in (shifted, weight.T.contiguous().T):
            y = kernels.sparse_linear(x, index, strided, rows, None, None, None, *numbers)
            if path == "reference":  # a dense product, whose order of summation follows the memory's alignment
                torch.testing.assert_close(y, expected)
            else:
                assert torch.equal(y, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [0, 4])
def test_dx(path, form, bits, monkeypatch):
    monkeypatch.setattr(sparse_cpu, "_SCRATCH_BYTES", 4 * 40 * 90)
    packed, numbers = pack(random_mask(67, 90, form), form, torch.bfloat16, bits)
    for dtype in FLOATS:
        arguments = (torch.randn(4, 67).to(dtype), *packed, 90, *numbers)
        dx, expected = kernels.sparse_linear_dx(*arguments), kernels.sparse_linear_dx_reference(*arguments)
        assert dx.dtype == dtype and error(dx, expected) < TOLERANCE[dtype]


def test_many_tokens_use_little_scratch(monkeypatch):
    packed, numbers = pack(random_mask(100, 64, "flat"), "flat")
    monkeypatch.setattr(sparse_cpu, "_SCRATCH_BYTES", 4 * 40 * 64)
    chunks = sparse_cpu._dense_chunks(list(packed), 64, *numbers, torch.float32)
    assert [(first, last, len(dense)) for first, last, dense in chunks] == [(0, 40, 40), (40, 80, 40), (80, 100, 20)]
    arguments = (torch.randn(50, 64), *packed, torch.randn(100), *numbers)
    torch.testing.assert_close(kernels.sparse_linear(*arguments), kernels.sparse_linear_reference(*arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [0, 3, 8])
def test_malformed_bytes_are_read_as_zeros_past_the_end(path, form, bits):
    """A mask that claims more values than there are; `rows` that point anywhere."""
    if path == "reference":
        pytest.skip("the reference refuses such bytes")
    (weight, values, rows, scale, zero), numbers = pack(random_mask(20, 130, form), form, torch.float32, bits)
    weight = torch.full_like(weight, 0xE4 if numbers[0] else 0xFF)
    cut = values[:0] if rows is not None else values
    starts = [rows]
    if rows is not None:
        starts += [torch.full_like(rows, number) for number in (-5, len(values), 2**31 - 1)]
    for start in starts:
        for held in (values, cut):
            for tokens in (1, 30):
                x = torch.ones(tokens, 130)
                y = kernels.sparse_linear(x, weight, held, start, scale, zero, None, *numbers)
                assert y.shape == (tokens, 20)
                if held.numel() == 0 and not bits:
                    assert torch.equal(y, torch.zeros(tokens, 20))


def test_paths_follow_those_of_the_library():
    if LIBRARY is None:
        pytest.skip("needs the C library")
    assert [sparse_cpu.sparse_isa(name) for name in cpu.PATHS[:2]] == [0, 1]
    assert (LIBRARY.slim_sparse_best_isa() == 0) == (BEST == "portable")


PROGRAM = r"""
int main(void) {
    static const int64_t shapes[][2] = {{1, 1}, {3, 70}, {5, 64}, {7, 330}, {2, 576}}, sizes[] = {7, 16, 64, 1 << 20};
    int runs = 0;
    for (int isa = 0; isa <= slim_sparse_best_isa(); isa++)
    for (int shape = 0; shape < 5; shape++)
    for (int keep = 0; keep < 3; keep++)
    for (int bits = 0; bits <= 8; bits += bits ? 1 : 2)
    for (int type = 0; type < 3; type++)
    for (int flat = 0; flat < (keep ? 1 : 2); flat++) {
        const int64_t outs = shapes[shape][0], columns = shapes[shape][1], size = sizes[next() % 4];
        const int64_t groups = bits ? (columns + size - 1) / size : 1, kept = next() % (columns + 1);
        const int64_t stride = flat ? 0 : bits ? (kept * bits + 7) / 8 : kept;
        const int64_t total = flat ? next() % 999 : outs * stride;
        Sparse p = {.columns = columns, .keep = keep};
        uint8_t *index = filled((size_t)(outs * index_bytes(&p)));
        uint8_t *values = filled((size_t)total * (bits ? 1 : type == FP32 ? 4 : 2));
        int32_t *rows = flat ? filled((size_t)(outs + 1) * 4) : NULL;
        uint8_t *scale = filled((size_t)(outs * groups) * (type == FP32 ? 4 : 2));
        uint8_t *zero = filled((size_t)(outs * groups));
        for (int64_t i = 0; flat && i < outs; i += 2) rows[i] = (int32_t)(next() % 999);
        for (int64_t tokens = 1; tokens < 12; tokens += 3) {
            const int64_t numbers[] = {outs, columns, groups, size, stride, total, keep, bits, type, type, type, type};
            const size_t unit = type == FP32 ? 4 : 2;
            void *x = filled((size_t)(tokens * columns) * unit), *y = malloc((size_t)(tokens * outs) * unit);
            void *bias = filled((size_t)outs * unit), *dense = malloc((size_t)(outs * columns) * unit);
            if (slim_sparse_linear(x, index, values, rows, scale, zero, bias, y, numbers, tokens, isa, 1)) return 1;
            if (slim_sparse_dense(index, values, rows, scale, zero, dense, numbers, 0, outs, isa, 1)) return 1;
            free(x), free(y), free(bias), free(dense);
            runs++;
        }
        free(index), free(values), free(rows), free(scale), free(zero);
    }
    printf("done %d\n", runs);
    return 0;
}
"""


@pytest.mark.slow
def test_nothing_outside_of_the_tensors_is_read(tmp_path):
    run_sanitized(tmp_path, "sparse.c", PROGRAM)
