"""Compile every launch of the Triton kernels for GPUs that are not there, and hold the binaries to a budget.

What a binary shows without a GPU: no spilled registers, shared memory within the chip's limit, the tensor-core
instruction, 16-byte loads, and the instructions issued per decoded weight. To stay limited by memory at batch 1 a
2-bit kernel may issue about 2.4 of those on an A100, 2.2 on an H100, 1.9 on an MI300X (lanes * clock / weights that
the memory delivers per second).

    python tests/kernels/test_triton_compile.py [FILE]     prints the measured table, or writes it to FILE
"""

import importlib.util
import os
import struct
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

from triton_ptx import run_ptx
from triton_static import SHARED_MEMORY, TARGETS, compile_launch, measure, record

from optimum_slim._kernels import triton as launcher
from optimum_slim._kernels import triton_unpack


pytestmark = pytest.mark.slow

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def linear(tokens, dtype, act_bits, group_size=None, size=4096):
    """A call of ternary_linear_triton of size x size; with `group_size` it has an offset, else one scale per row."""
    scale = torch.empty(size, -(-size // group_size) if group_size else 1)
    offset = torch.empty_like(scale) if group_size else None
    x, weight = torch.empty(tokens, size, dtype=dtype), torch.empty(size // 4, size, dtype=torch.uint8)
    return lambda: launcher.ternary_linear_triton(x, weight, scale, offset, None, size, group_size or size, act_bits)


def gradient(tokens, dtype, group_size, size=4096):
    scale = torch.empty(size, -(-size // group_size))
    dy, weight = torch.empty(tokens, size, dtype=dtype), torch.empty(size // 4, size, dtype=torch.uint8)
    return lambda: launcher.ternary_linear_dx_triton(dy, weight, scale, torch.empty_like(scale), group_size)


# name: (call, kernel, matrix instruction?, budget of instructions per weight on sm_80, sm_90, gfx942)
CASES = {
    "quantizer, per token": (linear(1, BF16, 8), "quantize_activations_kernel", False, (None, None, None)),
    "quantizer, group 128": (linear(1, BF16, 8, 128), "quantize_activations_kernel", False, (None, None, None)),
    "sum of splits": (linear(1, BF16, 8), "sum_splits_kernel", False, (None, None, None)),
    "decode W2A8, row": (linear(1, BF16, 8), "ternary_linear_kernel", True, (0.7, 0.7, 1.8)),
    "decode W2A8, group 128": (linear(1, BF16, 8, 128), "ternary_linear_kernel", True, (1.6, 1.6, 3.8)),
    "decode W2A8, row, M=16": (linear(16, BF16, 8), "ternary_linear_kernel", True, (0.8, 0.8, 1.8)),
    "decode W2A16 bf16, row": (linear(1, BF16, 0), "ternary_linear_kernel", True, (2.0, 2.0, 5.5)),
    "decode W2A16 bf16, group 128": (linear(1, BF16, 0, 128), "ternary_linear_kernel", True, (2.4, 2.5, 6.0)),
    "decode W2A16 fp16, group 128": (linear(1, FP16, 0, 128), "ternary_linear_kernel", True, (2.4, 2.5, 6.0)),
    "prefill W2A8, row": (linear(512, BF16, 8), "ternary_linear_kernel", True, (1.4, 1.1, 5.5)),
    "prefill W2A8, group 128": (linear(512, BF16, 8, 128), "ternary_linear_kernel", True, (3.3, 3.1, 3.2)),
    "prefill W2A8, short last group": (linear(512, BF16, 8, 128, 576), "ternary_linear_kernel", True, (2.4, 2.3, 4.0)),
    "prefill W2A16 bf16, row": (linear(512, BF16, 0), "ternary_linear_kernel", True, (4.0, 3.0, 12.0)),
    "prefill W2A16 bf16, group 128": (linear(512, BF16, 0, 128), "ternary_linear_kernel", True, (4.2, 3.9, 5.8)),
    "fp32, group 128": (linear(512, FP32, 0, 128), "ternary_linear_kernel", False, (None, None, None)),
    "dx bf16, group 128": (gradient(512, BF16, 128), "ternary_dx_kernel", True, (8.0, 4.1, 22.5)),
    "dx fp16, group 100": (gradient(512, FP16, 100), "ternary_dx_kernel", False, (None, None, None)),
}


def figures(name, target):
    """Compile one case; returns (launch arguments, compiled kernel, Figures)."""
    call, kernel_name, _, _ = CASES[name]
    with mock.patch.object(launcher, "speaks_ptx", lambda x: target.startswith("sm_")):
        launches = record(call)
    kernel, arguments = next(launch for launch in launches if launch[0].__name__ == kernel_name)
    compiled = compile_launch(kernel, arguments, TARGETS[target])
    weights = 4 * arguments.get("BLOCK_P", 0) * arguments.get("BLOCK_K", 0)
    return compiled, measure(compiled, weights=weights, multiplications=weights * arguments.get("BLOCK_M", 0))


@pytest.fixture(scope="module", autouse=True)
def cold_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("triton"))
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_budget(name, target, capfd):
    _, _, matrix, budgets = CASES[name]
    compiled, found = figures(name, target)
    assert "error:" not in capfd.readouterr().err
    assert found.spills == 0
    assert found.registers <= (255 if target.startswith("sm_") else 512)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    if matrix:
        assert found.matrix != "none"
        assert found.load_bytes == 16
        assert found.per_weight is not None and found.per_weight <= budgets[list(TARGETS).index(target)]


def test_inline_ptx_reaches_nvidia_and_only_nvidia():
    name = "decode W2A8, row"
    assert "0x0C0C0C0C" in figures(name, "sm_80")[0].asm["ptx"]
    assert "0C0C0C0C" not in figures(name, "gfx942")[0].asm["llir"]


@pytest.mark.parametrize(
    ("ptx", "dtype"),
    [(triton_unpack._INT8_PTX, None), (triton_unpack._BF16_PTX, BF16), (triton_unpack._FP16_PTX, FP16)],
    ids=["int8", "bf16", "fp16"],
)
def test_unpacking_ptx_over_all_bytes(ptx, dtype):
    """Interpret the PTX on every byte of four legal codes, in every one of the four places of a register."""
    legal = [byte for byte in range(256) if all(byte >> 2 * plane & 3 != 3 for plane in range(4))]
    outputs = 4 if dtype is None else 8
    for i, byte in enumerate(legal):
        word = [byte, legal[i - 1], legal[i - 17], legal[i - 40]]
        registers = run_ptx(ptx.value, outputs, int.from_bytes(bytes(word), "little"))
        for plane in range(4):
            codes = [b >> 2 * plane & 3 for b in word]
            if dtype is None:
                found = list(struct.pack("<I", registers[plane]))
                assert found == [code << (2 * plane if plane < 3 else 0) for code in codes]
            else:
                bits = struct.pack("<2I", *registers[2 * plane : 2 * plane + 2])
                found = torch.frombuffer(bytearray(bits), dtype=dtype).tolist()
                assert found == [code - 1 for code in codes]


def table() -> str:
    import triton

    lines = [
        "# Triton kernels, compiled figures",
        "",
        f"Compiled with Triton {triton.__version__} for GPUs that were not there; nothing here was run or timed.",
        "4096 x 4096 (short last group: 576 x 576), M = 1 (decode) or 512 (prefill, dx) unless named; groups have an",
        "offset too, rows have none. `instr/weight` is the hot loop's instructions per decoded weight; a kernel stays",
        "limited by memory at M = 1 below about 2.4 (A100), 2.2 (H100), 1.9 (MI300X).",
        "Written by `python tests/kernels/test_triton_compile.py FILE`.",
        "",
        "| kernel | target | registers | spills | shared kB | matrix instruction | load bytes | instr/weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        for target in TARGETS:
            compiled, found = figures(name, target)
            shared = compiled.metadata.shared / 1024
            per_weight = "" if found.per_weight is None else f"{found.per_weight:.2f}"
            lines.append(
                f"| {name} | {target} | {found.registers} | {found.spills} | {shared:.1f} | {found.matrix} "
                f"| {found.load_bytes} | {per_weight} |"
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
