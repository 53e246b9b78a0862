"""The C kernel of sign layers: every instruction set of this machine against the reference."""

import pytest
import torch
from sanitized import run_sanitized

from optimum_slim import _kernels as kernels
from optimum_slim._kernels import cpu, sign_cpu, sign_reference


LIBRARY, BEST, _ORIGIN = cpu.load_library()
AVAILABLE = cpu.PATHS[: cpu.PATHS.index(BEST) + 1] if LIBRARY is not None else ()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Half an ulp of the result; bf16 products of many tokens may also round the weight and the bias.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}
TOKENS = (1, 2, 3, 4, 7, 16, 17, 40)


@pytest.fixture(params=["reference", *cpu.PATHS])
def path(request, monkeypatch):
    """Run the test on one CPU path; skip those this processor lacks."""
    found = (None, "reference", "test") if request.param == "reference" else (LIBRARY, request.param, "test")
    if request.param != "reference" and request.param not in AVAILABLE:
        pytest.skip(f"{request.param} is not available here (best: {BEST})")
    for module in (cpu, sign_cpu):
        monkeypatch.setattr(module, "load_library", lambda: found)
    if LIBRARY is not None:
        LIBRARY.slim_use_isa(cpu.PATHS.index(request.param) if found[0] else 0)
    yield request.param
    if LIBRARY is not None:
        LIBRARY.slim_use_isa(cpu.PATHS.index(BEST))


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_signs(outs, columns):
    return kernels.pack_signs(torch.rand(outs, columns) < 0.5)


def error(found, expected):
    """Root of the mean squared error, relative to that of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-3))


def check(x, *arguments):
    y, expected = kernels.sign_linear(x, *arguments), kernels.sign_linear_reference(x, *arguments)
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert error(y, expected) < TOLERANCE[x.dtype], f"{len(x)} tokens"


SHAPES = [(1, 1), (2, 3), (5, 64), (66, 31), (64, 33), (130, 513), (3, 1030), (257, 600)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("bits", [0, 8])
def test_shapes(path, shape, bits):
    outs, columns = shape
    weight, scale_in, scale_out, bias = (
        random_signs(*shape),
        torch.randn(columns),
        torch.randn(outs),
        torch.randn(outs),
    )
    for tokens in TOKENS:
        x = torch.randn(tokens, columns)
        check(x, weight, scale_in, scale_out, bias, bits)
        check(x, weight, None, torch.rand(1), None, bits)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [0, 8])
def test_dtypes(path, dtype, bits):
    weight = random_signs(45, 150)
    for of_scales in FLOATS:
        scale_in, scale_out, bias = (torch.randn(size).to(of_scales) for size in (150, 45, 45))
        for tokens in (1, 5, 20):
            x = torch.randn(tokens, 150).to(dtype)
            check(x, weight, scale_in, scale_out, bias, bits)
            check(x, weight, None, scale_out[:1], bias, bits)
        for wanted in FLOATS:
            for first in (scale_in, None):
                dense = kernels.sign_dense(weight, first, scale_out, 150, wanted)
                assert torch.equal(dense, sign_reference.sign_dense(weight, first, scale_out, 150, wanted))


@pytest.mark.parametrize("columns", [4096, 20001, 70000])
@pytest.mark.parametrize("minus", [False, True])
def test_long_sums_are_exact(path, columns, minus):
    weight = kernels.pack_signs(torch.full((5, columns), minus))
    for tokens in (1, 2, 5):
        x = torch.full((tokens, columns), -127.0)
        y = kernels.sign_linear(x, weight, None, torch.ones(1), None, 8)
        assert torch.equal(y, torch.full((tokens, 5), (127.0 if minus else -127.0) * columns))


def test_integers_are_exact(path):
    minus = torch.rand(75, 330) < 0.5
    for tokens in TOKENS:
        x = torch.randint(-127, 128, (tokens, 330)).float()
        x[:, 0] = 127.0  # the largest magnitude: the codes are the values
        y = kernels.sign_linear(x, kernels.pack_signs(minus), None, torch.ones(75), None, 8)
        assert torch.equal(y.long(), x.long() @ (1 - 2 * minus.long()).T), f"{tokens} tokens"


def test_scaled_activations_are_rounded_not_the_plain_ones(path):
    x, scale_in = torch.tensor([[100.0, 1.0, 1.0]]), torch.tensor([0.01, 127.0, -126.6])
    for tokens in (1, 6):
        weight = kernels.pack_signs(torch.tensor([[False, False, False], [True, False, True]]))
        y = kernels.sign_linear(x.expand(tokens, 3), weight, scale_in, torch.ones(1), None, 8)
        torch.testing.assert_close(y, torch.tensor([[1.0, 253.0]]).expand(tokens, 2))


@pytest.mark.parametrize("bits", [0, 8])
def test_threads_agree_bit_for_bit(path, bits):
    if path == "reference":
        pytest.skip("PyTorch's own products may differ with the number of threads")
    weight, scale_in, scale_out = random_signs(1501, 700), torch.randn(700), torch.randn(1501)
    for tokens in (1, 3, 12):
        for dtype in (torch.float32, torch.bfloat16):
            x, results = torch.randn(tokens, 700).to(dtype), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernels.sign_linear(x, weight, scale_in, scale_out, None, bits))
            assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [0, 8])
def test_not_finite_activations_are_not_hidden(path, bad, bits):
    weight = random_signs(9, 100)
    for tokens in (1, 6):
        x = torch.ones(tokens, 100)
        x[-1, 40] = bad
        y = kernels.sign_linear(x, weight, torch.full((100,), 0.5), torch.ones(9), None, bits)
        assert torch.isfinite(y[:-1]).all()
        if bits == 0:
            expected = kernels.sign_linear_reference(x, weight, torch.full((100,), 0.5), torch.ones(9), None, 0)
            torch.testing.assert_close(y, expected, equal_nan=True)
        assert not torch.isfinite(y[-1]).any()


@pytest.mark.parametrize("bits", [0, 8])
def test_strided_and_misaligned_tensors(path, bits):
    weight, scale_in, scale_out = random_signs(33, 70), torch.randn(70), torch.randn(33)
    shifted = torch.zeros(weight.numel() + 3, dtype=torch.uint8)[3:].view_as(weight).copy_(weight)
    for x in (
        torch.randn(70, 5).T,
        torch.randn(5, 140)[:, ::2],
        torch.randn(1, 70).expand(5, 70),
        torch.randn(351)[1:].view(5, 70),
        torch.randn(351, dtype=torch.float16)[1:].view(5, 70),
    ):
        expected = kernels.sign_linear(x.contiguous().clone(), weight, scale_in, scale_out, None, bits)
        spread = torch.stack([scale_in, scale_in], dim=1)[:, 0]
        for packed in (shifted, weight.T.contiguous().T):
            y = kernels.sign_linear(x, packed, spread, scale_out, None, bits)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dx(path, dtype, monkeypatch):
    monkeypatch.setattr(sign_cpu, "_SCRATCH_BYTES", 4 * 40 * 90)
    for scale_in, scale_out in ((torch.randn(90), torch.randn(67)), (None, torch.rand(1))):
        arguments = (torch.randn(4, 67).to(dtype), random_signs(67, 90), scale_in, scale_out, 90)
        dx, expected = kernels.sign_linear_dx(*arguments), kernels.sign_linear_dx_reference(*arguments)
        assert dx.dtype == dtype and error(dx, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [0, 8])
def test_many_tokens_use_little_scratch(path, bits, monkeypatch):
    """Rows come in pieces, whose last may be short and, as ternary codes, no multiple of four."""
    monkeypatch.setattr(sign_cpu, "_SCRATCH_BYTES", 64 * 64)
    monkeypatch.setattr(sign_cpu, "_prefers_dense", lambda *_: True)
    weight = random_signs(150, 64)
    pieces = sign_cpu._dense_chunks([weight, None, torch.ones(150)], 64, torch.float32) if path != "reference" else ()
    assert all(len(dense) == last - first <= 16 for first, last, dense in pieces)
    for dtype in FLOATS:
        x = torch.randn(50, 64).to(dtype)
        check(x, weight, torch.randn(64), torch.randn(150), torch.randn(150), bits)
        check(x, weight, None, torch.rand(1), None, bits)


def test_dense_chunks_only_where_they_are_faster(monkeypatch):
    for of_bfloat16 in (False, True):
        monkeypatch.setattr(sign_cpu, "_multiplies_bfloat16", lambda dtype, found=of_bfloat16: found)
        assert not sign_cpu._prefers_dense(1, torch.bfloat16, "avx2")
        assert sign_cpu._prefers_dense(1000, torch.bfloat16, "avx2") == of_bfloat16
        assert sign_cpu._prefers_dense(1000, torch.bfloat16, "portable")


PROGRAM = r"""
int main(void) {
    static const int64_t shapes[][2] = {{1, 1}, {3, 70}, {5, 64}, {70, 330}, {35, 576}, {9, 520}};
    int runs = 0;
    for (int isa = 0; isa <= BEST; isa++)
    for (int shape = 0; shape < 6; shape++)
    for (int type = 0; type < 3; type++)
    for (int form = 0; form < 4; form++) {
        const int64_t outs = shapes[shape][0], columns = shapes[shape][1], bytes = (columns + 7) / 8;
        const size_t unit = type == FP32 ? 4 : 2, scales = form & 1 ? 1 : (size_t)outs;
        const int64_t numbers[] = {outs, columns, form & 1, type, type, type, type};
        uint8_t *weight = filled((size_t)(outs * bytes)), *codes = malloc((size_t)((outs + 3) / 4 * columns));
        void *scale_in = form & 2 ? filled((size_t)columns * unit) : NULL, *scale_out = filled(scales * unit);
        void *bias = form ? filled((size_t)outs * unit) : NULL, *dense = malloc((size_t)(outs * columns) * unit);
        for (int64_t tokens = 1; tokens <= MAX_TOKENS + 1; tokens += 16) {
            void *x = filled((size_t)(tokens * columns) * unit), *y = malloc((size_t)(tokens * outs) * unit);
            for (int bits = 0; bits <= 8; bits += 8)
                if (slim_sign_linear(x, weight, scale_in, scale_out, bias, y, numbers, tokens, bits, isa, 1)) return 1;
            free(x), free(y);
            runs++;
        }
        if (slim_sign_dense(weight, scale_in, scale_out, dense, numbers, 0, outs, isa, 1)) return 1;
        slim_sign_ternary(weight, codes, 0, outs, columns, isa, 1);
        free(weight), free(codes), free(scale_in), free(scale_out), free(bias), free(dense);
    }
    printf("done %d\n", runs);
    return 0;
}
"""


@pytest.mark.slow
def test_nothing_outside_of_the_tensors_is_read(tmp_path):
    if LIBRARY is None:
        pytest.skip("needs a C compiler")
    run_sanitized(tmp_path, "sign.c", PROGRAM, f"-DBEST={cpu.PATHS.index(BEST)}")
