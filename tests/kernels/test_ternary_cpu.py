"""The C kernel: every instruction set of this machine against the reference, and how the library is found."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from optimum_slim import _kernels as kernels
from optimum_slim._kernels import build, cpu, reference


LIBRARY, BEST, _ORIGIN = cpu.load_library()
AVAILABLE = cpu.PATHS[: cpu.PATHS.index(BEST) + 1] if LIBRARY is not None else ()


@pytest.fixture(params=["reference", *cpu.PATHS])
def path(request, monkeypatch):
    """Run the test on one CPU path; skip those this processor lacks."""
    if request.param == "reference":
        monkeypatch.setattr(cpu, "load_library", lambda: (None, "reference", "test"))
    elif request.param not in AVAILABLE:
        pytest.skip(f"{request.param} is not available here (best: {BEST})")
    else:
        LIBRARY.slim_use_isa(cpu.PATHS.index(request.param))
        monkeypatch.setattr(cpu, "load_library", lambda: (LIBRARY, request.param, "test"))
    yield request.param
    if LIBRARY is not None:
        LIBRARY.slim_use_isa(cpu.PATHS.index(BEST))


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_codes(out_features, columns):
    return torch.randint(-1, 2, (out_features, columns), dtype=torch.int8)


SHAPES = [(1, 1), (2, 3), (3, 31), (5, 64), (66, 65), (64, 127), (130, 128), (100, 200), (257, 600), (576, 576)]
TOKENS = [1, 2, 3, 4, 5, 7, 13, 33, 200]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_integers_are_exact(path, shape):
    out_features, columns = shape
    codes = random_codes(out_features, columns)
    packed = kernels.pack_ternary(codes)
    for tokens in TOKENS:
        x = torch.randint(-127, 128, (tokens, columns)).float()
        x[:, 0] = 127.0  # absmax 127: the scale is 1 and the codes are the values
        expected = x.long() @ codes.long().T
        y = kernels.ternary_linear(x, packed, torch.ones(1), None, None, out_features, columns, 8)
        assert torch.equal(y.long(), expected), f"{tokens} tokens"


@pytest.mark.parametrize("group_size", [1, 7, 32, 64, 96, 100, 128, 256, 1000])
@pytest.mark.parametrize("bits", [0, 8])
def test_groups(path, group_size, bits):
    out_features, columns = 75, 330
    groups = -(-columns // group_size)
    packed = kernels.pack_ternary(random_codes(out_features, columns))
    scale, offset = torch.rand(out_features, groups) + 0.1, torch.randn(out_features, groups)
    bias = torch.randn(out_features)
    for tokens in (1, 3, 4, 9, 40):
        x = torch.randn(tokens, columns)
        for shift, add in ((None, None), (offset, bias)):
            arguments = (x, packed, scale, shift, add, out_features, group_size, bits)
            expected = reference.ternary_linear_reference(*arguments)
            torch.testing.assert_close(kernels.ternary_linear(*arguments), expected, rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["per_tensor", "per_row", "per_group"])
def test_dtypes(path, dtype, scale_dtype, kind):
    out_features, columns = 91, 1300
    group_size = 128 if kind == "per_group" else columns
    shape = (1,) if kind == "per_tensor" else (out_features, -(-columns // group_size))
    packed = kernels.pack_ternary(random_codes(out_features, columns))
    scale = torch.rand(shape).to(scale_dtype)
    offset = None if kind == "per_tensor" else torch.randn(shape).to(scale_dtype)
    bias = torch.randn(out_features).to(dtype)
    for tokens in (1, 6, 30):
        x = torch.randn(tokens, columns, dtype=dtype)
        for bits in (0, 8):
            arguments = (packed, scale, offset, bias, out_features, group_size, bits)
            y, expected = kernels.ternary_linear(x, *arguments), reference.ternary_linear_reference(x, *arguments)
            assert y.dtype == dtype
            error = (y.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
            # Half an ulp of the result; bf16 weight-only products of many tokens may also round the weight.
            assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("columns", [4096, 20001, 70000])
@pytest.mark.parametrize("code", [1, -1])
@pytest.mark.parametrize("value", [127.0, -127.0])
def test_long_sums_do_not_overflow(path, columns, code, value):
    packed = kernels.pack_ternary(torch.full((5, columns), code, dtype=torch.int8))
    for tokens in (1, 5):
        y = kernels.ternary_linear(
            torch.full((tokens, columns), value), packed, torch.ones(1), None, None, 5, columns, 8
        )
        assert torch.equal(y, torch.full((tokens, 5), code * value * columns))


def test_threads_agree_bit_for_bit(path):
    out_features, columns = 500, 700
    packed = kernels.pack_ternary(random_codes(out_features, columns))
    scale, offset = torch.rand(out_features, 6), torch.randn(out_features, 6)
    for bits, tokens in ((8, 1), (8, 3), (8, 130), (0, 2)):
        x = torch.randn(tokens, columns)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.ternary_linear(x, packed, scale, offset, None, out_features, 128, bits))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_rounding_and_scale_follow_the_reference(path):
    """Codes are compared one by one: an identity-like weight reads each of them out."""
    columns = 96
    packed = kernels.pack_ternary(torch.eye(columns, dtype=torch.int8))
    x = torch.randn(300, columns) * torch.logspace(-7, 4, 300)[:, None]
    x[0] = 0.0
    x[1, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 63.5])
    for chunk in x.split([1, 1, 1, 297]):
        arguments = (chunk, packed, torch.ones(1), None, None, columns, columns, 8)
        s = 127 / chunk.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        codes = (kernels.ternary_linear(*arguments) * s).round()
        assert torch.equal(codes, (chunk * s).round())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_activations_are_not_hidden(path, bad):
    packed = kernels.pack_ternary(torch.ones(8, 100, dtype=torch.int8))
    for tokens in (1, 6):
        x = torch.ones(tokens, 100)
        x[-1, 40] = bad
        y = kernels.ternary_linear(x, packed, torch.ones(1), None, None, 8, 100, 8)
        assert torch.isnan(y[-1]).all() and torch.isfinite(y[:-1]).all()


@pytest.mark.parametrize("bits", [0, 8])
def test_strided_and_misaligned_tensors(path, bits):
    out_features, columns = 33, 70
    packed = kernels.pack_ternary(random_codes(out_features, columns))
    shifted = torch.zeros(packed.numel() + 3, dtype=torch.uint8)[3:].view_as(packed).copy_(packed)
    scale = torch.rand(out_features, 3)
    for x in (
        torch.randn(columns, 5).T,
        torch.randn(5, 2 * columns)[:, ::2],
        torch.randn(1, columns).expand(5, columns),
        torch.randn(5 * columns + 1)[1:].view(5, columns),
        torch.randn(5 * columns + 1, dtype=torch.float16)[1:].view(5, columns),
    ):
        expected = kernels.ternary_linear(x.contiguous().clone(), packed, scale, None, None, out_features, 32, bits)
        y = kernels.ternary_linear(x, shifted, scale, None, None, out_features, 32, bits)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        strided = scale.T.contiguous().T
        columns_first = packed.T.contiguous().T
        again = kernels.ternary_linear(x, columns_first, strided, None, None, out_features, 32, bits)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [100, 128, 300])
def test_dequantize_and_dx(path, dtype, group_size):
    out_features, columns = 67, 300
    groups = -(-columns // group_size)
    packed = kernels.pack_ternary(random_codes(out_features, columns))
    scale = torch.rand(out_features, groups, dtype=torch.float16)
    offset = torch.randn(out_features, groups, dtype=torch.bfloat16)
    arguments = (packed, scale, offset, out_features, group_size, dtype)
    assert torch.equal(kernels.dequantize(*arguments), reference.dequantize(*arguments))
    dy = torch.randn(4, out_features, dtype=dtype)
    dx = kernels.ternary_linear_dx(dy, packed, scale, offset, group_size)
    expected = reference.ternary_linear_dx_reference(dy, packed, scale, offset, group_size)
    torch.testing.assert_close(dx, expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


def test_dense_products_use_little_scratch(monkeypatch):
    monkeypatch.setattr(cpu, "_SCRATCH_BYTES", 4 * 40 * 64)
    assert [last - first for first, last in cpu._row_chunks(100, 64)] == [40, 40, 20]
    packed = kernels.pack_ternary(random_codes(100, 64))
    arguments = (torch.randn(50, 64), packed, torch.rand(1), None, torch.randn(100), 100, 64, 0)
    torch.testing.assert_close(kernels.ternary_linear(*arguments), reference.ternary_linear_reference(*arguments))


PROGRAM = """
import json, sys, warnings
import torch
kernels = __import__(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    packed = kernels.pack_ternary(torch.ones(8, 64, dtype=torch.int8))
    for _ in range(3):
        y = kernels.ternary_linear(torch.ones(2, 64), packed, torch.ones(1), None, None, 8, 64, 8)
assert torch.allclose(y, torch.full((2, 8), 64.0))
messages = [str(w.message) for w in caught if "optimum-slim" in str(w.message)]
try:
    maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
except OSError:
    maps = ["unknown"]
print(json.dumps([kernels.backend_report()["cpu"], messages, len(maps)]))
"""


def run_fresh(tmp_path, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("CC", "OPTIMUM_SLIM_CPU", "XDG_CACHE_HOME")}
    clean |= {"OPTIMUM_SLIM_CACHE": str(tmp_path), **environment}
    package = build.FOLDER
    clean["PYTHONPATH"] = str(package.parent)
    command = [sys.executable, "-c", PROGRAM, package.name]
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=False)


def bundled():
    return (build.FOLDER / build.library_name()).exists()


@pytest.mark.slow
@pytest.mark.skipif(bundled(), reason="a library built with the wheel is used")
def test_without_a_compiler_the_reference_answers_and_says_so_once(tmp_path):
    result = run_fresh(tmp_path, PATH=str(tmp_path), CC="no-such-compiler")
    assert result.returncode == 0, result.stderr
    report, messages, _ = json.loads(result.stdout.splitlines()[-1])
    assert report.startswith("reference (no C compiler found")
    assert len(messages) == 1 and "apt install gcc" in messages[0]


@pytest.mark.slow
@pytest.mark.skipif(LIBRARY is None, reason="needs a C compiler")
def test_library_is_built_once_and_shares_the_openmp_of_torch(tmp_path):
    for _ in range(2):
        result = run_fresh(tmp_path)
        assert result.returncode == 0, result.stderr
        report, messages, pools = json.loads(result.stdout.splitlines()[-1])
        assert report.startswith(f"C kernel, {BEST}") and not messages and pools <= 1
    if not bundled():
        (library,) = tmp_path.iterdir()
        assert library.name in report


def test_forced_path(monkeypatch):
    load = cpu.load_library.__wrapped__
    monkeypatch.setenv("OPTIMUM_SLIM_CPU", "sse9")
    with pytest.raises(ValueError, match="names no CPU path; use one of portable, avx2, avx512vnni, reference"):
        load()
    monkeypatch.setenv("OPTIMUM_SLIM_CPU", "reference")
    assert load() == (None, "reference", "OPTIMUM_SLIM_CPU=reference")


@pytest.mark.parametrize("flags", [["-O2", "-std=c11"], ["-O2", "-fopenmp"]], ids=["plain", "openmp"])
def test_source_compiles_without_warnings(tmp_path, flags):
    compiler = next(build.compilers(), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    command = [compiler, *flags, "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", str(tmp_path / "t.so")]
    result = subprocess.run([*command, *map(str, build.sources()), "-lm"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_compiler_without_openmp_or_broken(tmp_path):
    compiler = next(build.compilers(), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    picky = tmp_path / "picky-cc"
    picky.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {compiler} "$@"\n')
    picky.chmod(0o755)
    build.compile_library(str(picky), tmp_path / "test.so")
    library = cpu._bind(tmp_path / "test.so")
    assert library.slim_has_openmp() == 0
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(build.CompilerMissing, match="no headers"):
        build.compile_library(str(broken), tmp_path / "other.so")
    assert not (tmp_path / "other.so").exists()


def test_report_names_what_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = kernels.backend_report()
    assert set(report) == {"cpu", "cuda", "other"}
    assert BEST in report["cpu"]
