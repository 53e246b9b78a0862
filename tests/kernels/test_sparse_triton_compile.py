"""Compile every launch of the sparse Triton kernels for GPUs that are not there, and hold the binaries to a budget.

As test_triton_compile.py does for the ternary kernels. What a sparse layer may spend before arithmetic costs more than
memory, in instructions issued per weight (kept or not) at batch 1 on an H100 (29.6 T lane-instructions and 3.35 TB a
second): 9.9 at 50 % or 2:4 in bf16 (1.125 bytes a weight), 6.4 at 70 %, 3.3 with 4 bits; the dense bf16 layer, at two
bytes a weight, takes as long as 17.7. Above the first number a kernel is limited by arithmetic, above the last it
cannot win.

    python tests/kernels/test_sparse_triton_compile.py [FILE]     prints the measured table, or writes it to FILE
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch


if sys.platform != "linux":
    pytest.skip("Triton runs on Linux only", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton_static import SHARED_MEMORY, TARGETS, compile_launch, measure, record

from optimum_slim._kernels import index_bytes
from optimum_slim._kernels import sparse_triton as launcher


pytestmark = pytest.mark.slow

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def layer(keep, bits, group_size, size):
    """(weight, values, rows, scale, zero), (keep, bits, group_size) of a layer of size x size, half (1:4: a quarter)
    of it kept, uninitialised."""
    kept = size * (keep or 2) // 4
    length = kept * bits // 8 if bits else kept
    shape = (size, length) if keep else (size * length,)
    weight = torch.empty(size, index_bytes(size, keep), dtype=torch.uint8)
    rows = None if keep else torch.empty(size + 1, dtype=torch.int32)
    if not bits:
        return (weight, torch.empty(shape, dtype=BF16), rows, None, None), (keep, 0, size)
    grid = (size, -(-size // (group_size or size)))
    codes, zero = torch.empty(shape, dtype=torch.uint8), torch.empty(grid, dtype=torch.uint8)
    return (weight, codes, rows, torch.empty(grid, dtype=FP16), zero), (keep, bits, group_size or size)


def linear(tokens, keep, bits=0, group_size=None, dtype=BF16, size=4096):
    tensors, numbers = layer(keep, bits, group_size, size)
    x = torch.empty(tokens, size, dtype=dtype)
    return lambda: launcher.sparse_linear_triton(x, *tensors, None, *numbers)


def expand(keep, bits=0, group_size=None, dtype=BF16, size=4096):
    tensors, numbers = layer(keep, bits, group_size, size)
    return lambda: launcher.expand_sparse(*tensors, size, *numbers, dtype)


# name: (call, budget of instructions per weight on sm_80, sm_90, gfx942), with what Triton 3.6 and 3.9 make of it
CASES = {
    "50 %, M=1": (linear(1, 0), (17.5, 18.0, None)),
    "50 %, M=4": (linear(4, 0), (16.5, 16.5, None)),
    "50 %, M=16": (linear(16, 0), (17.0, 17.0, None)),
    "50 %, fp32, M=16": (linear(16, 0, dtype=FP32), (38.5, 39.5, None)),
    "50 % + 4 bits, M=1": (linear(1, 0, 4), (17.0, 17.0, None)),
    "50 % + 4 bits, group 128, M=1": (linear(1, 0, 4, 128), (19.0, 19.0, None)),
    "50 % + 4 bits, M=16": (linear(16, 0, 4), (18.0, 18.0, None)),
    "2:4, M=1": (linear(1, 2), (9.0, 9.0, None)),
    "2:4, fp16, M=4": (linear(4, 2, dtype=FP16), (12.5, 12.5, None)),
    "2:4, M=16": (linear(16, 2), (11.5, 12.0, None)),
    "2:4 + 4 bits, M=1": (linear(1, 2, 4), (11.5, 11.5, None)),
    "2:4 + 8 bits, M=1": (linear(1, 2, 8), (10.5, 10.5, None)),
    "2:4 + 4 bits, M=16": (linear(16, 2, 4), (14.5, 15.0, None)),
    "1:4, M=1": (linear(1, 1), (8.0, 8.0, None)),
    "expand 50 %": (expand(0), (15.0, 14.5, None)),
    "expand 50 % + 4 bits": (expand(0, 4), (17.5, 17.5, None)),
    "expand 2:4": (expand(2), (9.0, 9.0, None)),
    "expand 2:4 + 4 bits": (expand(2, 4), (10.5, 13.0, None)),
    "expand 50 % + 4 bits, group 100": (expand(0, 4, 100, size=4000), (49.5, 52.0, None)),
}


def figures(name, target):
    """Compile one case; returns (compiled kernel, Figures)."""
    with mock.patch.object(launcher, "speaks_ptx", lambda x: target.startswith("sm_")):
        kernel, arguments = record(CASES[name][0])[0]
    compiled = compile_launch(kernel, arguments, TARGETS[target])
    weights = 8 * arguments["ROWS"] * arguments["ELEMENTS"]
    return compiled, measure(compiled, weights=weights)


@pytest.fixture(scope="module", autouse=True)
def cold_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("triton"))
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_budget(name, target, capfd):
    compiled, found = figures(name, target)
    assert "error:" not in capfd.readouterr().err
    assert found.spills == 0
    assert found.registers <= (255 if target.startswith("sm_") else 512)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    budget = CASES[name][1][list(TARGETS).index(target)]
    if budget is not None:
        assert found.per_weight is not None and found.per_weight <= budget


@pytest.mark.parametrize("name", ["50 %, M=1", "50 %, M=16", "expand 50 %"])
def test_counting_bits_is_one_instruction(name):
    assert "popc.b32" in figures(name, "sm_80")[0].asm["ptx"]
    assert "v_bcnt_u32" in figures(name, "gfx942")[0].asm["amdgcn"]


def table() -> str:
    import triton

    lines = [
        "# Sparse Triton kernels, compiled figures",
        "",
        f"Compiled with Triton {triton.__version__} for GPUs that were not there; nothing here was run or timed.",
        "4096 x 4096 (group 100: 4000 x 4000), bf16 unless named. `instr/weight` is the hot loop's instructions per",
        "weight, kept or not; on an H100 at M = 1 a kernel stays limited by memory below 9.9 (50 % or 2:4 in bf16) or",
        "3.3 (with 4 bits), and a dense bf16 layer takes as long as 17.7. AMD loops are split by branches, so",
        "theirs is a lower bound.",
        "Written by `python tests/kernels/test_sparse_triton_compile.py FILE`.",
        "",
        "| kernel | target | registers | spills | shared kB | matrix instruction | instr/weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        for target in TARGETS:
            compiled, found = figures(name, target)
            per_weight = "" if found.per_weight is None else f"{found.per_weight:.1f}"
            lines.append(
                f"| {name} | {target} | {found.registers} | {found.spills} | {compiled.metadata.shared / 1024:.1f} "
                f"| {found.matrix} | {per_weight} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        text = table()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text, end="")
