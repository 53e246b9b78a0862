"""Compile the launches of the sign and binary Triton kernels for GPUs that are not there, and check the binaries.

As test_triton_compile.py does for the ternary kernels, with few cases. What a layer may spend before arithmetic costs
more than memory, in instructions issued per weight at batch 1 on an H100 (29.6 T lane-instructions and 3.35 TB a
second): 1.1 for one bit, 3.2 for two with four scales and three offsets per 128 columns in 16 bits; the dense bf16
layer takes as long as 17.7.

    python tests/kernels/test_binary_triton_compile.py [FILE]     prints the measured table, or writes it to FILE
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

from optimum_slim._kernels import binary_triton, binary_triton_kernels, sign_triton, triton_planes


FP16, BF16 = torch.float16, torch.bfloat16
PTX_TYPES = {"bf16": BF16, "fp16": FP16}


def signs(tokens, bits, dtype=BF16, size=4096):
    vector = torch.empty(size, dtype=FP16)
    x, weight = torch.empty(tokens, size, dtype=dtype), torch.empty(size, size // 8, dtype=torch.uint8)
    return lambda: sign_triton.sign_linear_triton(x, weight, vector, vector, None, bits)


def binary(tokens, offset=False, columns=False, group_size=128, dtype=BF16, size=4096):
    def halves(*shape):
        return torch.empty(shape, dtype=FP16)

    groups = size // group_size
    weight, salient = torch.empty(size, 2, size // 8, dtype=torch.uint8), torch.empty(size // 8, dtype=torch.uint8)
    layer = weight, salient, halves(size, groups, 4), halves(size, groups, 3) if offset else None
    x, factors = torch.empty(tokens, size, dtype=dtype), halves(2, size) if columns else None
    return lambda: binary_triton.binary_linear_triton(x, *layer, factors, None, group_size)


# name: (call, kernel, budget of instructions per weight on sm_80, sm_90, gfx942: None is not compiled, 0 no budget)
CASES = {
    "sign, arrange, int8": (signs(1, 8), "arrange_kernel", (0, 0, 0)),
    "sign, W1A16": (signs(1, 0), "sign_linear_kernel", (1.9, 1.9, 3.6)),
    "sign, W1A8": (signs(1, 8), "sign_linear_kernel", (1.3, 1.3, 5.1)),
    "sign, W1A8, M=512": (signs(512, 8), "sign_linear_kernel", (2.3, 2.2, 16.0)),
    "sign, expand": (signs(17, 0), "sign_expand_kernel", (0, 0, 0)),
    "binary, fp16": (binary(1, dtype=FP16), "binary_linear_kernel", (4.5, 4.6, 24.0)),
    "binary, offset, M=16": (binary(16, offset=True), "binary_linear_kernel", (4.9, 5.0, None)),
    "binary, row": (binary(1, group_size=4096), "binary_linear_kernel", (4.1, 4.1, None)),
    "binary, columns": (binary(1, columns=True), "binary_linear_kernel", (6.5, 6.5, None)),
    "binary, expand": (binary(17, offset=True, columns=True), "binary_expand_kernel", (0, 0, 0)),
}
COMPILED = [(name, target) for name in CASES for i, target in enumerate(TARGETS) if CASES[name][2][i] is not None]


def figures(name, target):
    """Compile one case; returns (compiled kernel, Figures)."""
    call, kernel_name, _ = CASES[name]
    speaks_ptx = mock.Mock(return_value=target.startswith("sm_"))
    with (
        mock.patch.object(sign_triton, "speaks_ptx", speaks_ptx),
        mock.patch.object(binary_triton, "speaks_ptx", speaks_ptx),
    ):
        kernel, arguments = next(launch for launch in record(call) if launch[0].__name__ == kernel_name)
    compiled = compile_launch(kernel, arguments, TARGETS[target])
    weights = 8 * arguments.get("BLOCK_N", 0) * arguments.get("BLOCK_P", 0) * arguments.get("TILES", 1)
    products = weights * arguments.get("BLOCK_M", 0) * (2 if arguments.get("COLUMNS") else 1)
    return compiled, measure(compiled, weights=weights, multiplications=products)


@pytest.fixture(scope="module", autouse=True)
def cold_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("triton"))
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), COMPILED)
def test_budget(name, target, capfd):
    budget = CASES[name][2][list(TARGETS).index(target)]
    compiled, found = figures(name, target)
    assert "error:" not in capfd.readouterr().err
    assert found.spills == 0
    assert found.registers <= (255 if target.startswith("sm_") else 512)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    if budget:
        assert found.matrix != "none"
        assert found.load_bytes >= 8
        assert found.per_weight is not None and found.per_weight <= budget
    if target.startswith("sm_") and "linear_kernel" in CASES[name][1]:
        lookups = [line for line in compiled.asm["ttgir"].splitlines() if "elementwise_inline_asm" in line]
        assert lookups and all("kWidth = 4" in line for line in lookups if "packed_element = 4" in line)


def eight_bytes(byte):
    """`byte` and three others in the four places of a register."""
    return [byte, (byte * 7 + 3) % 256, byte ^ 255, (byte * 13 + 101) % 256]


def word(values):
    return int.from_bytes(bytes(values), "little")


def planes_of(registers, dtype):
    """Eight planes of four floats from sixteen registers of two."""
    return torch.frombuffer(bytearray(struct.pack("<16I", *registers)), dtype=dtype).view(8, 4)


@pytest.mark.parametrize(
    ("ptx", "dtype"),
    [(triton_planes._BF16_PTX, BF16), (triton_planes._FP16_PTX, FP16), (triton_planes._INT8_PTX, None)],
)
def test_ptx_of_signs_over_all_bytes(ptx, dtype):
    for byte in range(256):
        values = eight_bytes(byte)
        registers = run_ptx(ptx.value, 8 if dtype is None else 16, word(values))
        if dtype is None:
            found = torch.frombuffer(bytearray(struct.pack("<8I", *registers)), dtype=torch.int8).view(8, 4)
        else:
            found = planes_of(registers, dtype)
        assert found.tolist() == [[1 - 2 * (value >> j & 1) for value in values] for j in range(8)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_ptx_of_tables_over_all_bytes(dtype):
    """Two tables, one for the first two bytes of a register and one for the others."""
    kernels = binary_triton_kernels
    make = (kernels._BF16_TABLE if dtype == BF16 else kernels._FP16_TABLE).value
    entries = torch.arange(1, 17).float().view(2, 8) * 1.0173 - 9
    tables = [run_ptx(make, 4, *struct.unpack("<8I", struct.pack("<8f", *row.tolist()))) for row in entries]
    expected = entries.to(dtype)
    for byte in range(256):
        s, t, z = (eight_bytes(value % 256) for value in (byte, byte * 5 + 17, byte * 11 + 59))
        words = [tables[i // 2][part] for part in range(4) for i in range(4)]
        found = planes_of(run_ptx(kernels._LOOKUP.value, 16, word(s), word(t), word(z), *words), dtype)
        for j in range(8):
            for i in range(4):
                entry = (s[i] >> j & 1) + 2 * (t[i] >> j & 1) + 4 * (z[i] >> j & 1)
                assert found[j, i] == expected[i // 2, entry]


def table() -> str:
    import triton

    lines = [
        "# Sign and binary Triton kernels, compiled figures",
        "",
        f"Compiled with Triton {triton.__version__} for GPUs that were not there; nothing here was run or timed.",
        "4096 x 4096, M = 1 and bf16 unless named, groups of 128 columns; scales, offsets and factors in fp16.",
        "`instr/weight` is the hot loop's instructions per weight; on an H100 at M = 1 a kernel stays limited by",
        "memory below 1.1 (signs) or 3.2 (binary with offsets), and a dense bf16 layer takes as long as 17.7.",
        "Written by `python tests/kernels/test_binary_triton_compile.py FILE`.",
        "",
        "| kernel | target | registers | spills | shared kB | matrix instruction | load bytes | instr/weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, target in COMPILED:
        compiled, found = figures(name, target)
        per_weight = "" if found.per_weight is None else f"{found.per_weight:.2f}"
        lines.append(
            f"| {name} | {target} | {found.registers} | {found.spills} | {compiled.metadata.shared / 1024:.1f} "
            f"| {found.matrix} | {found.load_bytes} | {per_weight} |"
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
