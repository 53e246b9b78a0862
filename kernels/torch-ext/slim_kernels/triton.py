"""Ternary linear layers on NVIDIA and AMD GPUs: choose tiles, allocate, launch the kernels of `triton_kernels.py`.

A call is one to three launches: the activation quantizer (int8 activations, or the segment sums that an offset needs),
the product, and, when K had to be split to fill the GPU at small batch, the sum over the splits. The packed weight is
read as it lies in the checkpoint. The tiles are a plain table: nothing is tuned or timed at a user's first call.

Every group size is served by the same kernel. Multiples of 32 take whole tiles of K; other sizes (100, say) and a
short last group cost masks and, where the group is not aligned to 16 bytes, narrower loads. NVIDIA GPUs before Ampere
(compute capability below 8.0) lack the instructions and get the PyTorch reference, with one warning.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .reference import ternary_linear_dx_reference, ternary_linear_reference
from .triton_kernels import quantize_activations_kernel, ternary_dx_kernel, ternary_linear_kernel
from .triton_launch import DECODE_TOKENS, allocate_parts, before_ampere, speaks_ptx, sum_parts


TARGET_PROGRAMS = 128
"""Programs that fill a data-centre GPU (A100: 108 multiprocessors, H100: 132) once; K is split to reach it."""


@dataclass(frozen=True)
class Tiles:
    """One program's tile: `tokens` x (4 x `rows`) outputs, `columns` of K per step, K cut into `splits` shares."""

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Segments:
    """How K is cut: `count` segments of `size` columns, read in steps of `columns`, `per_split` segments per program.

    `tiles` is the number of steps per segment, if small enough to unroll, else 0; `even`: every step is a whole tile.
    """

    size: int
    count: int
    per_split: int
    columns: int
    tiles: int
    even: bool


def choose_tiles(
    tokens: int, packed_rows: int, columns: int, *, dtype: torch.dtype, group_size: int | None, nvidia: bool
) -> Tiles:
    """Tile sizes for a product of (tokens, columns) with (4 * packed_rows, columns), from compiled resource figures.

    Args:
        tokens: rows of the activations, M.
        packed_rows: rows of the packed weight, a quarter of the output features.
        columns: input features, K.
        dtype: what `tl.dot` multiplies: int8, float16, bfloat16 or float32.
        group_size: columns that share a scale, None for one scale per row. With groups the fp32 totals live beside
            the products, so prefill tiles are smaller, and smaller still where a short last group needs masks.
        nvidia: tiles of 8 tokens exist, and two warps per program keep small batches off Hopper's warpgroup
            instruction, which costs more to feed. AMD takes tiles of 16 tokens and four warps.
    """
    if dtype == torch.float32:
        return Tiles(tokens=16, rows=32, columns=32, warps=4, stages=2)
    if tokens > DECODE_TOKENS:
        if group_size is None:
            return Tiles(tokens=64, rows=64, columns=64, warps=4, stages=3)
        step = 128 if dtype == torch.int8 else 64
        return Tiles(tokens=16 if columns % group_size else 32, rows=64, columns=step, warps=4, stages=3)
    step = 128 if dtype == torch.int8 else 64
    rows = 32 if nvidia else 64
    splits = min(triton.cdiv(TARGET_PROGRAMS, triton.cdiv(packed_rows, rows)), triton.cdiv(columns, 4 * step))
    return Tiles(
        tokens=8 if nvidia and tokens <= 8 else 16, rows=rows, columns=step, warps=rows // 16, stages=4, splits=splits
    )


def cut_columns(columns: int, group_size: int | None, tiles: Tiles) -> Segments:
    """Cut K into groups (`group_size`) or, with one scale per row (None), into one segment per split."""
    if group_size is None:
        size = triton.cdiv(triton.cdiv(columns, tiles.splits), tiles.columns) * tiles.columns
        count = triton.cdiv(columns, size)
        return Segments(size, count, 1, tiles.columns, tiles=0, even=columns % tiles.columns == 0)
    step = min(tiles.columns, group_size & -group_size)  # the largest power of two that divides both
    if step < 32:
        step = min(tiles.columns, max(32, triton.next_power_of_2(group_size)))
    count = triton.cdiv(columns, group_size)
    even = columns % group_size == 0 and group_size % step == 0
    steps = triton.cdiv(group_size, step)
    return Segments(group_size, count, triton.cdiv(count, tiles.splits), step, steps if steps <= 2 else 0, even)


def ternary_linear_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    """`ternary_linear` on a GPU; arguments and result as in `ternary_linear_reference`."""
    if before_ampere(x.device):
        return ternary_linear_reference(x, weight, scale, offset, bias, out_features, group_size, act_bits)
    columns, packed_rows = x.shape[-1], weight.shape[0]
    flat = x.reshape(-1, columns).contiguous()
    out = x.new_empty(*x.shape[:-1], out_features)
    tokens = flat.shape[0]
    if out.numel() == 0:
        return out
    grouped = scale.dim() == 2 and scale.shape[1] > 1
    operand = torch.int8 if act_bits == 8 else x.dtype
    group = group_size if grouped else None
    tiles = choose_tiles(tokens, packed_rows, columns, dtype=operand, group_size=group, nvidia=speaks_ptx(x))
    segments = cut_columns(columns, group, tiles)
    splits = triton.cdiv(segments.count, segments.per_split)
    weight, scale = weight.contiguous(), scale.contiguous()
    offset = None if offset is None else offset.contiguous()

    with torch.cuda.device_of(x):
        q = x_scale = x_sum = None
        if act_bits == 8 or offset is not None:
            q, x_scale, x_sum = quantize_activations(flat, segments, int8=act_bits == 8, per_token=not grouped)
        parts = allocate_parts(out, tokens, out_features, splits)
        grid = (triton.cdiv(packed_rows, tiles.rows), triton.cdiv(tokens, tiles.tokens), splits)
        ternary_linear_kernel[grid](
            flat if q is None else q,
            x_scale,
            x_sum,
            weight,
            scale,
            offset,
            bias if splits == 1 else None,
            parts,
            tokens,
            out_features,
            columns,
            packed_rows,
            segments.size,
            segments.count,
            segments.per_split,
            0 if scale.dim() == 1 else scale.shape[1],
            1 if grouped else 0,
            segments.count if grouped else 1,
            1 if grouped else 0,
            TILES=segments.tiles,
            EVEN=segments.even,
            PTX=speaks_ptx(x),
            BLOCK_M=tiles.tokens,
            BLOCK_P=tiles.rows,
            BLOCK_K=segments.columns,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
        sum_parts(parts, bias, out)
    return out


def quantize_activations(
    x: Tensor, segments: Segments, *, int8: bool, per_token: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Round (M, K) activations to int8 and sum each segment: (q, 1 / s, sums), or (None, None, sums) with int8=False.

    The scale s = 127 / max(|x|, 1e-5) is taken over the token (`per_token`) or over each segment of it.
    """
    tokens, columns = x.shape
    q = x_scale = None
    if int8:
        q = torch.empty_like(x, dtype=torch.int8)
        x_scale = x.new_empty(tokens, 1 if per_token else segments.count, dtype=torch.float32)
    x_sum = x.new_empty(tokens, segments.count, dtype=torch.int32 if int8 else torch.float32)
    block = min(2048, triton.next_power_of_2(min(columns, segments.size)))
    quantize_activations_kernel[(tokens, segments.count)](
        x,
        q,
        x_scale,
        x_sum,
        columns,
        segments.size,
        PER_TOKEN=per_token,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
        enable_fp_fusion=False,
    )
    return q, x_scale, x_sum


def ternary_linear_dx_triton(
    dy: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int
) -> Tensor:
    """`ternary_linear_dx` on a GPU; arguments and result as in `ternary_linear_dx_reference`."""
    if before_ampere(dy.device):
        return ternary_linear_dx_reference(dy, weight, scale, offset, group_size)
    out_features, (packed_rows, columns) = dy.shape[-1], weight.shape
    flat = dy.reshape(-1, out_features).contiguous()
    dx = dy.new_empty(*dy.shape[:-1], columns)
    if dx.numel() == 0:
        return dx
    grouped = scale.dim() == 2 and scale.shape[1] > 1
    weight, scale = weight.contiguous(), scale.contiguous()
    extra = None if offset is None else flat.float() @ offset.float()
    group = group_size if grouped else None
    tiles = choose_dx_tiles(flat.shape[0], dtype=dy.dtype, group_size=group)
    segments = cut_columns(columns, group, tiles)
    steps = triton.cdiv(segments.size, segments.columns)

    with torch.cuda.device_of(dy):
        grid = (segments.count * steps, triton.cdiv(flat.shape[0], tiles.tokens))
        ternary_dx_kernel[grid](
            flat,
            weight,
            scale,
            extra,
            dx,
            flat.shape[0],
            out_features,
            columns,
            packed_rows,
            segments.size,
            segments.count,
            steps,
            0 if scale.dim() == 1 else scale.shape[1],
            1 if grouped else 0,
            PTX=speaks_ptx(dy),
            BLOCK_M=tiles.tokens,
            BLOCK_P=tiles.rows,
            BLOCK_K=segments.columns,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
    return dx


def choose_dx_tiles(tokens: int, *, dtype: torch.dtype, group_size: int | None) -> Tiles:
    """Tile sizes of dx = dy W: `tokens` x `columns` outputs, `rows` packed rows per step.

    Groups that are not aligned to 16 columns are loaded piecemeal; prefetching them too would spill registers.
    """
    if dtype == torch.float32:
        return Tiles(tokens=16, rows=16, columns=64, warps=4, stages=2)
    stages = 1 if group_size is not None and group_size % 16 else 3
    return Tiles(tokens=16 if tokens <= DECODE_TOKENS else 64, rows=32, columns=128, warps=4, stages=stages)
