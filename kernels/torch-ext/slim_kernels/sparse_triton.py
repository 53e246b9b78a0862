"""Sparse linear layers on NVIDIA and AMD GPUs: choose tiles, allocate, launch what is in `sparse_triton_kernels.py`.

Up to 16 tokens the product is made from the packed form: one launch, and a second for the sum where K had to be split
to fill the GPU. Every form is multiplied so, codes of every width too, but groups of a size that is no multiple of 8.

For those, for more tokens, and for dx, one kernel expands the weight to a dense matrix of the dtype of x (codes are
computed in fp32 and rounded once), and `torch.matmul` multiplies with it: at many tokens arithmetic is what costs
time, and zeros save none of it there (`optimum_slim.semi_structured` makes layers where they do). This takes the
memory of one dense layer for the time of the call.

x in fp32 is multiplied in fp32 throughout, unless TF32 was allowed in PyTorch's matmul.

The tiles follow from what the kernels compile to (benchmarks/results/sparse_triton_static.md). They have not run on a
GPU yet; `python benchmarks/gpu_check.py --part sparse` checks and times them there.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .sparse_reference import sparse_linear_dx_reference, sparse_linear_reference
from .sparse_triton_kernels import sparse_dot_kernel, sparse_expand_kernel, sparse_few_kernel
from .triton_launch import DECODE_TOKENS, allocate_parts, before_ampere, speaks_ptx, sum_parts


FEW_TOKENS = 2
"""Up to this many tokens the products are made on the ordinary cores, above it by `tl.dot`."""

TARGET_WARPS = 2048
"""Warps that keep a data-centre GPU (H100: 132 multiprocessors) busy; K is split where rows give less than half."""


@dataclass(frozen=True)
class SparseTiles:
    """One program's tile: `rows` outputs of `tokens`, `elements` of eight columns per step, K cut into `splits`."""

    tokens: int
    rows: int
    elements: int
    warps: int
    splits: int

    def columns_per_split(self, columns: int) -> int:
        step = 8 * self.elements
        return triton.cdiv(triton.cdiv(columns, self.splits), step) * step


def choose_sparse_tiles(tokens: int, outs: int, columns: int, *, nvidia: bool) -> SparseTiles:
    """Tile sizes for (tokens, columns) times (outs, columns); `tokens` 0 is the expansion to a dense matrix."""
    if tokens <= FEW_TOKENS:
        rows = 4 if outs >= 8192 else 2 if outs >= 4096 else 1
        size, elements, warps = tokens, 128 // rows, 1
    else:
        size, rows, elements, warps = 8 if nvidia and tokens <= 8 else 16, 16, 16, 2
    splits = min(max(1, TARGET_WARPS // (triton.cdiv(outs, rows) * warps)), triton.cdiv(columns, 16 * elements))
    return SparseTiles(size, rows, elements, warps, splits)


def sparse_linear_triton(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    keep: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`sparse_linear` on a GPU; arguments and result as in `sparse_linear_reference`."""
    if before_ampere(x.device):
        return sparse_linear_reference(x, weight, values, rows, scale, zero, bias, keep, bits, group_size)
    columns, outs = x.shape[-1], weight.shape[0]
    flat = x.reshape(-1, columns).contiguous()
    tokens = flat.shape[0]
    out = x.new_empty(*x.shape[:-1], outs)
    if out.numel() == 0:
        return out
    group = _element_group(columns, group_size, bits)
    if tokens > DECODE_TOKENS or group < 0:
        dense = expand_sparse(weight, values, rows, scale, zero, columns, keep, bits, group_size, x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    tiles = choose_sparse_tiles(tokens, outs, columns, nvidia=speaks_ptx(x))
    per_split = tiles.columns_per_split(columns)
    splits = triton.cdiv(columns, per_split)

    with torch.cuda.device_of(x):
        parts = allocate_parts(out, tokens, outs, splits)
        kernel = sparse_few_kernel if tokens <= FEW_TOKENS else sparse_dot_kernel
        weight, values = weight.contiguous(), _at_word(values, bits)
        kernel[(triton.cdiv(outs, tiles.rows), splits)](
            flat,
            weight,
            values,
            rows,
            None if scale is None else scale.contiguous(),
            None if zero is None else zero.contiguous(),
            bias if splits == 1 else None,
            parts,
            tokens,
            outs,
            columns,
            weight.shape[1],
            0 if rows is not None else values.shape[1],
            triton.cdiv(values.numel(), 4),
            0 if scale is None else scale.shape[1],
            per_split,
            KEEP=keep,
            BITS=bits,
            GROUP=group,
            ALIGNED=_in_words(weight),
            TOKENS=tiles.tokens,
            ROWS=tiles.rows,
            ELEMENTS=tiles.elements,
            num_warps=tiles.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
        sum_parts(parts, bias, out)
    return out


def sparse_linear_dx_triton(
    dy: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    columns: int,
    keep: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`sparse_linear_dx` on a GPU; arguments and result as in `sparse_linear_dx_reference`."""
    if before_ampere(dy.device):
        return sparse_linear_dx_reference(dy, weight, values, rows, scale, zero, columns, keep, bits, group_size)
    return dy @ expand_sparse(weight, values, rows, scale, zero, columns, keep, bits, group_size, dy.dtype)


def expand_sparse(
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    columns: int,
    keep: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense matrix (out, columns) in `dtype`: `sparse_dense` on a GPU."""
    outs = weight.shape[0]
    dense = torch.empty(outs, columns, dtype=dtype, device=weight.device)
    tiles = choose_sparse_tiles(0, outs, columns, nvidia=speaks_ptx(weight))
    group = _element_group(columns, group_size, bits)
    if group < 0:
        tiles = replace(tiles, elements=tiles.elements // 2)  # scales of every column take registers too
    per_split = tiles.columns_per_split(columns)
    weight, values = weight.contiguous(), _at_word(values, bits)
    with torch.cuda.device_of(weight):
        sparse_expand_kernel[(triton.cdiv(outs, tiles.rows), triton.cdiv(columns, per_split))](
            weight,
            values,
            rows,
            None if scale is None else scale.contiguous(),
            None if zero is None else zero.contiguous(),
            dense,
            outs,
            columns,
            weight.shape[1],
            0 if rows is not None else values.shape[1],
            triton.cdiv(values.numel(), 4),
            0 if scale is None else scale.shape[1],
            group_size,
            per_split,
            KEEP=keep,
            BITS=bits,
            GROUP=group,
            ALIGNED=_in_words(weight),
            ROWS=tiles.rows,
            ELEMENTS=tiles.elements,
            num_warps=tiles.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return dense


def _element_group(columns: int, group_size: int, bits: int) -> int:
    """The kernels' GROUP: 0 for one group a row (or none), the size if elements do not straddle groups, else -1."""
    if bits == 0 or group_size >= columns:
        return 0
    return group_size if group_size % 8 == 0 else -1


def _at_word(values: Tensor, bits: int) -> Tensor:
    """The values; codes, which are read in words, begin at one."""
    return values.clone() if bits and values.data_ptr() % 4 else values.contiguous()


def _in_words(weight: Tensor) -> bool:
    return weight.shape[1] % 4 == 0 and weight.data_ptr() % 4 == 0
