"""The C kernel of binary layers: every instruction set of this machine against the reference."""

import pytest
import torch
from sanitized import run_sanitized

from optimum_slim import _kernels as kernels
from optimum_slim._kernels import binary_cpu, binary_reference, cpu


LIBRARY, BEST, _ORIGIN = cpu.load_library()
AVAILABLE = cpu.PATHS[: cpu.PATHS.index(BEST) + 1] if LIBRARY is not None else ()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Half an ulp of the result; bf16 products of many tokens may also round the weight and the bias.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}
FORMS = ["plain", "offset", "columns", "offset+columns"]


@pytest.fixture(params=["reference", *cpu.PATHS])
def path(request, monkeypatch):
    """Run the test on one CPU path; skip those this processor lacks."""
    found = (None, "reference", "test") if request.param == "reference" else (LIBRARY, request.param, "test")
    if request.param != "reference" and request.param not in AVAILABLE:
        pytest.skip(f"{request.param} is not available here (best: {BEST})")
    monkeypatch.setattr(binary_cpu, "load_library", lambda: found)
    return request.param


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_packed(outs, columns, group_size, form, *, dtype=torch.float32, salient=0.15):
    """The arguments of `binary_linear` between x and bias."""
    groups = -(-columns // group_size)
    return (
        kernels.pack_signs(torch.rand(outs, 2, columns) < 0.5),
        kernels.pack_signs(torch.rand(columns) < salient),
        torch.rand(outs, groups, 4).to(dtype),
        torch.randn(outs, groups, 3).to(dtype) if "offset" in form else None,
        torch.randn(2, columns).to(dtype) if "columns" in form else None,
    )


def error(found, expected):
    """Root of the mean squared error, relative to that of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-3))


def check(x, packed, bias, group_size):
    y = kernels.binary_linear(x, *packed, bias, group_size)
    expected = kernels.binary_linear_reference(x, *packed, bias, group_size)
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert error(y, expected) < TOLERANCE[x.dtype], f"{len(x)} tokens"


def check_dense(packed, columns, group_size):
    for wanted in FLOATS:
        arguments = (*packed, columns, group_size, wanted)
        assert torch.equal(kernels.binary_dense(*arguments), binary_reference.binary_dense(*arguments)), wanted


SHAPES = [
    (1, 1, 1),
    (2, 3, 8),
    (5, 64, 64),
    (17, 70, 8),
    (33, 127, 127),
    (20, 513, 128),
    (16, 1100, 512),
    (9, 330, 96),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("form", FORMS)
def test_shapes(path, shape, form):
    outs, columns, group_size = shape
    packed, bias = make_packed(outs, columns, group_size, form), torch.randn(outs)
    for tokens in (1, 3, 15, 16):
        check(torch.randn(tokens, columns), packed, bias, group_size)
    check_dense(packed, columns, group_size)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(path, dtype, form):
    for of_scales in FLOATS:
        packed = make_packed(21, 200, 64, form, dtype=of_scales)
        for tokens in (1, 9):
            check(torch.randn(tokens, 200).to(dtype), packed, torch.randn(21).to(of_scales), 64)
        check_dense(packed, 200, 64)


@pytest.mark.parametrize("group_size", [8, 24, 32, 40, 64, 128, 256, 330, 1000])
def test_groups(path, group_size):
    for form in FORMS:
        packed = make_packed(19, 330, group_size, form)
        for tokens in (1, 4, 30):
            check(torch.randn(tokens, 330), packed, None, group_size)
        check_dense(packed, 330, group_size)


@pytest.mark.parametrize("salient", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_salient_columns(path, form, salient):
    packed = make_packed(19, 330, 64, form, salient=salient)
    for tokens in (1, 30):
        check(torch.randn(tokens, 330), packed, None, 64)
    check_dense(packed, 330, 64)


@pytest.mark.parametrize("column", range(0, 36, 5))
def test_each_column_meets_its_activation(path, column):
    packed = make_packed(9, 36, 32, "offset+columns", salient=0.3)
    x = torch.zeros(1, 36)
    x[0, column] = 1.0
    dense = binary_reference.binary_dense(*packed, 36, 32)
    torch.testing.assert_close(kernels.binary_linear(x, *packed, None, 32)[0], dense[:, column])


def test_threads_agree_bit_for_bit(path):
    if path == "reference":
        pytest.skip("PyTorch's own products may differ with the number of threads")
    packed = make_packed(1001, 512, 128, "offset+columns")
    for tokens in (1, 3):
        for dtype in FLOATS:
            x, results = torch.randn(tokens, 512).to(dtype), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernels.binary_linear(x, *packed, None, 128))
            assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("salient", [0.0, 1.0])
def test_not_finite_activations_are_not_hidden(path, bad, salient):
    for form in FORMS:
        packed = make_packed(9, 100, 32, form, salient=salient)
        for tokens in (1, 10):
            x = torch.ones(tokens, 100)
            x[-1, 40] = bad
            y = kernels.binary_linear(x, *packed, None, 32)
            assert torch.isfinite(y[:-1]).all() and not torch.isfinite(y[-1]).any()


def test_strided_and_misaligned_tensors(path):
    packed = make_packed(33, 70, 32, "offset+columns")
    weight = packed[0]
    shifted = torch.zeros(weight.numel() + 3, dtype=torch.uint8)[3:].view_as(weight).copy_(weight)
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in packed]
    for x in (
        torch.randn(70, 5).T,
        torch.randn(5, 140)[:, ::2],
        torch.randn(1, 70).expand(5, 70),
        torch.randn(351)[1:].view(5, 70),
        torch.randn(351, dtype=torch.float16)[1:].view(5, 70),
    ):
        expected = kernels.binary_linear(x.contiguous().clone(), *packed, None, 32)
        for arguments in (strided, (shifted, *packed[1:])):
            y = kernels.binary_linear(x, *arguments, None, 32)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dx(path, form, dtype, monkeypatch):
    monkeypatch.setattr(binary_cpu, "_SCRATCH_BYTES", 4 * 40 * 90)
    arguments = (torch.randn(4, 67).to(dtype), *make_packed(67, 90, 32, form), 90, 32)
    dx, expected = kernels.binary_linear_dx(*arguments), kernels.binary_linear_dx_reference(*arguments)
    assert dx.dtype == dtype and error(dx, expected) < TOLERANCE[dtype]


def test_many_tokens_use_little_scratch(monkeypatch):
    packed = make_packed(100, 64, 64, "offset")
    monkeypatch.setattr(binary_cpu, "_SCRATCH_BYTES", 4 * 40 * 64)
    if LIBRARY is not None:
        chunks = binary_cpu._dense_chunks(list(packed), 64, 64, torch.float32)
        assert [(first, last, len(part)) for first, last, part in chunks] == [(0, 40, 40), (40, 80, 40), (80, 100, 20)]
    check(torch.randn(50, 64), packed, torch.randn(100), 64)


PROGRAM = r"""
int main(void) {
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 70, 8}, {5, 64, 32}, {18, 330, 96}, {35, 576, 64}, {9, 99, 99}};
    int runs = 0;
    for (int isa = 0; isa <= BEST; isa++)
    for (int shape = 0; shape < 6; shape++)
    for (int type = 0; type < 3; type++)
    for (int form = 0; form < 4; form++) {
        const int64_t outs = shapes[shape][0], columns = shapes[shape][1], size = shapes[shape][2];
        const int64_t bytes = (columns + 7) / 8, groups = (columns + size - 1) / size;
        const size_t unit = type == FP32 ? 4 : 2;
        const int64_t numbers[] = {outs, columns, groups, size, type, type, type, type, type};
        uint8_t *weight = filled((size_t)(outs * 2 * bytes)), *salient = filled((size_t)bytes);
        void *scale = filled((size_t)(outs * groups * 4) * unit);
        void *offset = form & 1 ? filled((size_t)(outs * groups * 3) * unit) : NULL;
        void *factors = form & 2 ? filled((size_t)(2 * columns) * unit) : NULL;
        void *bias = form ? filled((size_t)outs * unit) : NULL, *dense = malloc((size_t)(outs * columns) * unit);
        for (int64_t tokens = 1; tokens <= MAX_TOKENS; tokens += 7) {
            void *x = filled((size_t)(tokens * columns) * unit), *y = malloc((size_t)(tokens * outs) * unit);
            if (slim_binary_linear(x, weight, salient, scale, offset, factors, bias, y, numbers, tokens, isa, 1))
                return 1;
            free(x), free(y);
            runs++;
        }
        if (slim_binary_dense(weight, salient, scale, offset, factors, dense, numbers, 0, outs, isa, 1)) return 1;
        free(weight), free(salient), free(scale), free(offset), free(factors), free(bias), free(dense);
    }
    printf("done %d\n", runs);
    return 0;
}
"""


@pytest.mark.slow
def test_nothing_outside_of_the_tensors_is_read(tmp_path):
    if LIBRARY is None:
        pytest.skip("needs a C compiler")
    run_sanitized(tmp_path, "binary.c", PROGRAM, f"-DBEST={cpu.PATHS.index(BEST)}")
