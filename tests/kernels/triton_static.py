"""Compile a Triton launch for a GPU that is not there, and read registers, spills and the hot loop off the binary.

`record` catches what the launcher would launch, with every argument, so that the compiled variant has exactly the
specialization (alignment, arguments equal to 1, absent tensors) of the real call. NVIDIA binaries are disassembled
with the cuobjdump of the Triton wheel; AMD figures come from the assembly text.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_MATRIX = re.compile(r"\b(?:I|H)MMA\.(16)(8)(8|16|32)|\b(?:I|H)GMMA\.(\d+)x(\d+)x(\d+)|v_mfma_\w+?_(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel needs: per thread, per weight in the hot loop, and its widest weight load in bytes."""

    registers: int
    spills: int
    matrix: str
    load_bytes: int
    loop: int
    per_weight: float | None


def record(call: Callable[[], object]) -> list[tuple]:
    """The launches of `call` as (kernel, arguments by name), in order; nothing runs."""
    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        call()
    return launches


def compile_launch(kernel, arguments: dict, target: GPUTarget):
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = _TYPES[value.dtype] if is_tensor else "i32"
        if not parameter.do_not_specialize and (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source, target=target, options={name: arguments[name] for name in _OPTIONS if name in arguments}
    )


def measure(compiled, *, weights: int = 0, multiplications: int = 0) -> Figures:
    """Read the figures off a compiled kernel.

    Args:
        weights: codes that one program decodes per step of the hot loop, for `per_weight`.
        multiplications: products of that step, to see how often the compiler unrolled the loop; 0 for a kernel without
            matrix instructions, whose longest loop is then the hot one, one step long.
    """
    amd = "amdgcn" in compiled.asm
    threads = compiled.metadata.num_warps * (64 if amd else 32)
    text, registers, spills = _amd(compiled.asm["amdgcn"]) if amd else _nvidia(compiled.asm["cubin"])
    matrix = _MATRIX.findall(text)
    named = _MATRIX.search(text)
    loop = _hot_loop(text, amd, longest=multiplications == 0)
    found = [[int(part) for part in match if part] for match in _MATRIX.findall("\n".join(loop))]
    per_weight = len(loop) * threads / weights if weights and not multiplications else None
    if weights and multiplications and found:
        warp_level = threads // 32 if not amd else threads // 64
        products = sum(m * n * k for m, n, k in found)
        groups = warp_level / 4 if "GMMA" in named.group() else warp_level
        unrolled = products * groups / multiplications
        per_weight = len(loop) * threads / (weights * unrolled)
    wide = [int(bits) // 8 for bits in re.findall(r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*?(128|64)\b", text)]
    wide += [4 * int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)]
    return Figures(registers, spills, named.group() if matrix else "none", max(wide, default=4), len(loop), per_weight)


def _nvidia(cubin: bytes) -> tuple[str, int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line)]
    text = "\n".join(lines)
    return text, int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\b(?:STL|LDL)\b", text))


def _amd(text: str) -> tuple[str, int, int]:
    spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
    return text, int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), spills


def _hot_loop(text: str, amd: bool, longest: bool) -> list[str]:
    """The instructions of the loop that does most matrix work and loads from global memory, else an empty list.

    Of several loops with as much matrix work it is the shortest, or the longest where there is none in the kernel.
    """
    lines, positions, loops = [], {}, []
    for line in text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            positions[label[1]] = len(lines)
        address = re.match(r"\s+/\*([0-9a-f]{4,})\*/", line)
        if address:
            positions[int(address[1], 16)] = len(lines)
        if not (re.match(r"\s+[a-z]\w+", line) if amd else address):
            continue
        target = re.search(r"s_cbranch_\w+ (\.LBB\w+)" if amd else r"\bBRA\b.*?(0x[0-9a-f]+)", line)
        lines.append(line)
        if target:
            first = positions.get(target[1] if amd else int(target[1], 16))
            if first is not None and first < len(lines) - 1:
                loops.append(lines[first:])
    loads = re.compile(r"\bLDG|UTMALDG|global_load|buffer_load")
    loops = [loop for loop in loops if loads.search("\n".join(loop))]
    if longest:
        return max(loops, key=len, default=[])
    return max(loops, key=lambda loop: (len(_MATRIX.findall("\n".join(loop))), -len(loop)), default=[])
