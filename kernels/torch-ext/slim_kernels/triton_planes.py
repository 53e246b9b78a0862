"""Bits on the GPU: a tile of bytes is eight planes of weights, and the activations are put in the same order.

A byte holds eight columns of one row (drawn in `sign_reference.py`). Plane j of a row is bit j of all its bytes, the
columns j, j + 8, j + 16, ...; a tile of bytes becomes eight tiles of the same shape, without moving a weight between
threads. Each is multiplied with the activations of its columns, which `arrange_kernel` has laid next to each other:

    x        x0 x1 x2 ... x7 | x8 x9 ... x15 | x16 ...
    plane 0  x0 x8  x16 ... 0 0      `bytes` numbers, zeros at the end,
    plane 1  x1 x9  x17 ... 0 0      so that the products never have to ask where a row ends
    ...
    plane 7  x7 x15 x23 ... 0 0

Signs have two forms: portable Triton (AMD, the interpreter) and PTX for NVIDIA, which handles four int8 or two 16-bit
floats per instruction.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import DECODE_TOKENS


PADDED_BYTES = 64
"""Planes of the activations are a multiple of this long, and no step of a product is longer."""

_BLOCK = 256  # bytes, eight columns each, per program of `arrange_kernel`


def _int8_ptx() -> str:
    """PTX from four bytes ($8) to eight planes of four int8: 1 - 2 bit is 1 + 0xFE bit in every byte."""
    lines = []
    for j in range(8):
        lines += [f"shr.u32 ${j}, $8, {j};", f"and.b32 ${j}, ${j}, 0x01010101;"]
        lines.append(f"mad.lo.u32 ${j}, ${j}, 0xFE, 0x01010101;")
    return "\n".join(lines)


def _pairs_ptx(one: int) -> str:
    """PTX from four bytes ($16) to eight planes of two pairs of 16-bit floats: `one`, the bits of 1, with the sign."""
    lines = ["{ .reg .b32 lo, hi;", "prmt.b32 lo, $16, 0, 0x1404;", "prmt.b32 hi, $16, 0, 0x3424;"]
    for j in range(8):
        for register, half in ((2 * j, "lo"), (2 * j + 1, "hi")):
            lines.append(f"shl.b32 ${register}, {half}, {7 - j};")
            lines.append(f"lop3.b32 ${register}, ${register}, 0x80008000, 0x{one:04X}{one:04X}, 0xEA;")
    return "\n".join([*lines, "}"])


_INT8_PTX = tl.constexpr(_int8_ptx())
_BF16_PTX = tl.constexpr(_pairs_ptx(0x3F80))
_FP16_PTX = tl.constexpr(_pairs_ptx(0x3C00))
_EIGHT = tl.constexpr(",".join(["=&r"] * 8) + ",r")
_SIXTEEN = tl.constexpr(",".join(["=&r"] * 16) + ",r")


@triton.jit
def _signs(packed, PLANE: tl.constexpr, dtype: tl.constexpr):
    """-1 for a bit of 1, else 1, in int8, bf16 or fp16."""
    if dtype == tl.int8:
        return 1 - 2 * ((packed >> PLANE) & 1).to(tl.int8)
    else:
        ONE: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
        bits = ((packed.to(tl.uint16) << (15 - PLANE)) & 0x8000) | ONE
        return bits.to(dtype, bitcast=True)


@triton.jit
def sign_planes(packed, dtype: tl.constexpr, PTX: tl.constexpr):
    """The eight planes of a tile of bytes as -1 and 1."""
    if PTX and dtype == tl.int8:
        return tl.inline_asm_elementwise(
            _INT8_PTX,
            _EIGHT,
            [packed],
            (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_PTX,
            _SIXTEEN,
            [packed],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _FP16_PTX,
            _SIXTEEN,
            [packed],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return (
        _signs(packed, 0, dtype),
        _signs(packed, 1, dtype),
        _signs(packed, 2, dtype),
        _signs(packed, 3, dtype),
        _signs(packed, 4, dtype),
        _signs(packed, 5, dtype),
        _signs(packed, 6, dtype),
        _signs(packed, 7, dtype),
    )


@triton.jit
def _times_factor(x, factors, k, K, num_scaled):
    """x, the first `num_scaled` columns times their factor, in fp32; 0 past the end of a row."""
    values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if factors is not None:
        values *= tl.load(factors + k, mask=k < num_scaled, other=1.0).to(tl.float32)
    return values


@triton.jit
def arrange_kernel(
    x,  # (M, K)
    factors,  # (num_factors, K), or None
    planes,  # (variants, M, 8, size)
    x_scale,  # (M,) fp32: 1 / s, or None
    M,
    K,
    size,
    num_factors,
    BLOCK: tl.constexpr,
):
    """planes[i] = x * factors[i], past the factors x itself; int8 planes are rounded; grid (M, variants, blocks).

    Rounding is that of `quantize_activations_kernel`. Compile without fp fusion: x * s must be rounded by itself.
    """
    token = tl.program_id(0).to(tl.int64)
    variant = tl.program_id(1)
    x += token * K
    num_scaled = tl.where(variant < num_factors, K, 0)
    if factors is not None:
        factors += variant * K
    byte = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[:, None]
    plane = tl.arange(0, 8)[None, :]
    values = _times_factor(x, factors, 8 * byte + plane, K, num_scaled)
    if x_scale is not None:
        largest = tl.zeros((8 * BLOCK,), dtype=tl.float32)
        for first in range(0, K, 8 * BLOCK):
            k = first + tl.arange(0, 8 * BLOCK)
            largest = tl.maximum(largest, tl.abs(_times_factor(x, factors, k, K, num_scaled)))
        s = tl.div_rn(1.0, tl.maximum(tl.max(largest, axis=0), 1e-5)) * 127.0  # what PyTorch makes of 127 / x
        values = (values * s + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no fraction bits left
        values = tl.minimum(tl.maximum(values, -128.0), 127.0)
        tl.store(x_scale + token, tl.div_rn(1.0, s))
    where = ((variant * M + token) * 8 + plane) * size + byte
    tl.store(planes + where, values.to(planes.dtype.element_ty), mask=byte < size)


def arrange(
    x: Tensor, factors: Tensor | None, *, variants: int = 1, int8: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Planes of (M, K) activations: (variants, M, 8, bytes) of the dtype of `x`, or int8 with its (M,) scales 1 / s.

    Args:
        x: activations (M, K), contiguous.
        factors: (n, K), contiguous, or None. Variant i < n is ``x * factors[i]``; later ones are `x`.
        variants: how many to make.
        int8: round each token by its largest magnitude: s = 127 / max(|x|, 1e-5).
    """
    tokens, columns = x.shape
    size = triton.cdiv(triton.cdiv(columns, 8), PADDED_BYTES) * PADDED_BYTES
    planes = x.new_empty(variants, tokens, 8, size, dtype=torch.int8 if int8 else x.dtype)
    x_scale = x.new_empty(tokens, dtype=torch.float32) if int8 else None
    block = min(_BLOCK, triton.next_power_of_2(size))
    arrange_kernel[(tokens, variants, triton.cdiv(size, block))](
        x,
        factors,
        planes,
        x_scale,
        tokens,
        columns,
        size,
        0 if factors is None else factors.shape[0],
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return planes, x_scale


TARGET_WARPS = 1024
"""Warps that keep a data-centre GPU (H100: 132 multiprocessors) busy; K is split where rows give less than half."""


@dataclass(frozen=True)
class PlaneTiles:
    """One program's tile: `rows` outputs of `tokens`, `bytes` per step, K cut into `splits` of `per_split` bytes."""

    tokens: int
    rows: int
    bytes: int
    warps: int
    stages: int
    splits: int
    per_split: int


def choose_plane_tiles(tokens: int, outs: int, size: int, *, nvidia: bool, step: int | None = None) -> PlaneTiles:
    """Tile sizes for `tokens` times packed rows (outs, size).

    Up to 16 tokens two warps per program keep small batches off Hopper's warpgroup instruction, which costs more to
    feed. AMD takes four, and tiles of 16 tokens.

    Args:
        step: bytes per step; None takes the largest that leaves no remainder.
    """
    if tokens > DECODE_TOKENS:
        return PlaneTiles(tokens=64, rows=64, bytes=32, warps=4, stages=3, splits=1, per_split=size)
    if step is None:
        step = 32 if size % 64 == 32 else 64
    rows = 32 if nvidia else 64
    warps = rows // 16
    splits = min(max(1, TARGET_WARPS // (triton.cdiv(outs, rows) * warps)), triton.cdiv(size, 2 * step))
    per_split = triton.cdiv(triton.cdiv(size, splits), step) * step
    return PlaneTiles(
        tokens=8 if nvidia and tokens <= 8 else 16,
        rows=rows,
        bytes=step,
        warps=warps,
        stages=4,
        splits=triton.cdiv(size, per_split),
        per_split=per_split,
    )
