"""Binary layers on NVIDIA and AMD GPUs: choose tiles, allocate, launch what is in `binary_triton_kernels.py`.

Up to 16 tokens the product is made from the packed bits: one launch lays the activations out in planes
(`triton_planes.py`), one multiplies, and where K had to be split to fill the GPU one sums. Groups must be a multiple
of 128 columns for that, or one group a row. For other groups, for more tokens, for fp32, for dx, and for layers with
factors of columns on AMD GPUs (the product would spill registers there), one kernel expands the weight to a dense
matrix of the dtype of x, and `torch.matmul` multiplies with it: at many tokens arithmetic is what costs time, and few
bits save none of it. This takes the memory of one dense layer for the time of the call.

x in fp32 is multiplied in fp32 throughout, unless TF32 was allowed in PyTorch's matmul.

The tiles follow from what the kernels compile to, which `python tests/kernels/test_binary_triton_compile.py FILE`
lists. They have not run on a GPU yet; `python benchmarks/gpu_check.py --part binary` checks and times them there.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .binary_reference import binary_linear_dx_reference, binary_linear_reference
from .binary_triton_kernels import binary_expand_kernel, binary_linear_kernel
from .triton_launch import DECODE_TOKENS, allocate_parts, before_ampere, speaks_ptx, sum_parts
from .triton_planes import arrange, choose_plane_tiles


_EXPANDED_ROWS, _EXPANDED_BYTES = 4, 64
_TILE_BYTES = 16
"""128 columns, the least that `tl.dot` multiplies. Of longer tiles Triton decodes every byte in a slower layout."""


def binary_linear_triton(
    x: Tensor,
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """`binary_linear` on a GPU; arguments and result as in `binary_linear_reference`."""
    if before_ampere(x.device):
        return binary_linear_reference(x, weight, salient, scale, offset, columns, bias, group_size)
    in_features, (outs, _, size) = x.shape[-1], weight.shape
    flat = x.reshape(-1, in_features).contiguous()
    tokens = flat.shape[0]
    out = x.new_empty(*x.shape[:-1], outs)
    if out.numel() == 0:
        return out
    num_groups = scale.shape[1]
    nvidia, in_tiles = speaks_ptx(x), num_groups == 1 or group_size % 128 == 0
    would_spill = columns is not None and torch.version.hip is not None
    if tokens > DECODE_TOKENS or x.dtype == torch.float32 or not in_tiles or would_spill:
        dense = expand_binary(weight, salient, scale, offset, columns, in_features, group_size, x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    unrolled = 2 if nvidia and columns is None else 1
    tiles = choose_plane_tiles(tokens, outs, size, nvidia=nvidia, step=unrolled * _TILE_BYTES)
    variants = 1 if columns is None else 2 if offset is None else 3

    with torch.cuda.device_of(x):
        planes, _ = arrange(flat, None if columns is None else columns.contiguous(), variants=variants)
        parts = allocate_parts(out, tokens, outs, tiles.splits)
        grid = (triton.cdiv(outs, tiles.rows), triton.cdiv(tokens, tiles.tokens), tiles.splits)
        binary_linear_kernel[grid](
            planes,
            weight.contiguous(),
            salient.contiguous(),
            scale.contiguous(),
            None if offset is None else offset.contiguous(),
            bias if tiles.splits == 1 else None,
            parts,
            tokens,
            outs,
            size,
            planes.shape[-1],
            num_groups,
            tiles.per_split,
            COLUMNS=columns is not None,
            GROUP_TILES=0 if num_groups == 1 else group_size // 8 // _TILE_BYTES,
            EVEN=size % tiles.bytes == 0,
            PTX=nvidia,
            BLOCK_M=tiles.tokens,
            BLOCK_N=tiles.rows,
            BLOCK_P=_TILE_BYTES,
            TILES=unrolled,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
        sum_parts(parts, bias, out)
    return out


def binary_linear_dx_triton(
    dy: Tensor,
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    in_features: int,
    group_size: int,
) -> Tensor:
    """`binary_linear_dx` on a GPU; arguments and result as in `binary_linear_dx_reference`."""
    if before_ampere(dy.device):
        return binary_linear_dx_reference(dy, weight, salient, scale, offset, columns, in_features, group_size)
    return dy @ expand_binary(weight, salient, scale, offset, columns, in_features, group_size, dy.dtype)


def expand_binary(
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense matrix (out, in_features) in `dtype`: `binary_dense` on a GPU, bit for bit."""
    outs, _, size = weight.shape
    dense = torch.empty(outs, in_features, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(outs, _EXPANDED_ROWS), triton.cdiv(size, _EXPANDED_BYTES))
    with torch.cuda.device_of(weight):
        binary_expand_kernel[grid](
            weight.contiguous(),
            salient.contiguous(),
            scale.contiguous(),
            None if offset is None else offset.contiguous(),
            None if columns is None else columns.contiguous(),
            dense,
            outs,
            in_features,
            size,
            scale.shape[1],
            group_size // 8 if scale.shape[1] > 1 else size,
            ROWS=_EXPANDED_ROWS,
            BYTES=_EXPANDED_BYTES,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return dense
