"""A model of the few PTX instructions that the kernels' inline assembly uses, to test it on every byte."""

import re
import struct

import torch


_PAIRS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run_ptx(text: str, outputs: int, *inputs: int) -> list[int]:
    """Execute `text` on the 32-bit `inputs`, registers $outputs and up; returns registers $0 to $outputs - 1."""
    values = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in re.sub(r"\{ \.reg [^;]*;|\}", "", text).strip().splitlines():
        if not line.strip():
            continue
        name, operands = line.rstrip(";").split(maxsplit=1)
        target, *sources = operands.split(", ")
        a, b, c = ([values[s] if s in values else int(s, 0) for s in sources] + [0, 0])[:3]
        match name.split("."):
            case ["mov", *_]:
                result = a
            case ["and", *_]:
                result = a & b
            case ["shr", *_]:
                result = a >> b
            case ["shl", *_]:
                result = a << b
            case ["mad", "lo", _]:
                result = a * b + c
            case ["lop3", *_]:
                assert sources[3] == "0xEA"  # (a & b) | c
                result = a & b | c
            case ["prmt", *_]:
                assert not c & 0x8888  # no sign is replicated
                pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
                result = int.from_bytes(bytes(pool[c >> 4 * i & 7] for i in range(4)), "little")
            case ["fma", "rn", pair]:
                x, y, z = (_floats(v, _PAIRS[pair]) for v in (a, b, c))
                result = _bits((x * y + z).to(_PAIRS[pair]))
            case ["cvt", "rn", pair, "f32"]:
                result = _bits(torch.cat([_floats(v, torch.float32) for v in (b, a)]).to(_PAIRS[pair]))
            case _:
                raise AssertionError(f"no model for {line}")
        values[target] = result & 0xFFFFFFFF
    return [values[f"${i}"] for i in range(outputs)]


def _floats(register: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(struct.pack("<I", register)), dtype=dtype).double()


def _bits(values: torch.Tensor) -> int:
    return int.from_bytes(values.view(torch.uint8).numpy().tobytes(), "little")
