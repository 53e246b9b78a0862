"""Sign layers on NVIDIA and AMD GPUs: choose tiles, allocate, launch what is in `sign_triton_kernels.py`.

Up to 16 tokens, and with int8 activations always, the product is made from the packed signs: one launch lays the
activations out in planes (`triton_planes.py`; there they are scaled and rounded), one multiplies, and where K had to
be split to fill the GPU one sums. For more tokens in floats, for fp32, and for dx, one kernel expands the weight to a
dense matrix of the dtype of x, and `torch.matmul` multiplies with it: arithmetic is what costs time there, and one bit
saves none of it. This takes the memory of one dense layer for the time of the call.

x in fp32 is multiplied in fp32 throughout, unless TF32 was allowed in PyTorch's matmul.

The tiles follow from what the kernels compile to, which `python tests/kernels/test_binary_triton_compile.py FILE`
lists. They have not run on a GPU yet; `python benchmarks/gpu_check.py --part binary` checks and times them there.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .sign_reference import sign_linear_dx_reference, sign_linear_reference
from .sign_triton_kernels import sign_expand_kernel, sign_linear_kernel
from .triton_launch import DECODE_TOKENS, allocate_parts, before_ampere, speaks_ptx, sum_parts
from .triton_planes import arrange, choose_plane_tiles


_EXPANDED_ROWS, _EXPANDED_COLUMNS = 8, 512


def sign_linear_triton(
    x: Tensor, weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, bias: Tensor | None, activation_bits: int
) -> Tensor:
    """`sign_linear` on a GPU; arguments and result as in `sign_linear_reference`."""
    if before_ampere(x.device):
        return sign_linear_reference(x, weight, scale_in, scale_out, bias, activation_bits)
    columns, (outs, size) = x.shape[-1], weight.shape
    flat = x.reshape(-1, columns).contiguous()
    tokens = flat.shape[0]
    out = x.new_empty(*x.shape[:-1], outs)
    if out.numel() == 0:
        return out
    int8 = activation_bits == 8
    if not int8 and (tokens > DECODE_TOKENS or x.dtype == torch.float32):
        dense = expand_signs(weight, scale_in, scale_out, columns, x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    nvidia = speaks_ptx(x)
    tiles = choose_plane_tiles(tokens, outs, size, nvidia=nvidia)
    weight = weight.contiguous()

    with torch.cuda.device_of(x):
        factors = None if scale_in is None else scale_in.contiguous().unsqueeze(0)
        planes, x_scale = arrange(flat, factors, int8=int8)
        parts = allocate_parts(out, tokens, outs, tiles.splits)
        grid = (triton.cdiv(outs, tiles.rows), triton.cdiv(tokens, tiles.tokens), tiles.splits)
        sign_linear_kernel[grid](
            planes,
            x_scale,
            weight,
            scale_out.contiguous(),
            bias if tiles.splits == 1 else None,
            parts,
            tokens,
            outs,
            size,
            planes.shape[-1],
            0 if scale_out.numel() == 1 else 1,
            tiles.per_split,
            EVEN=size % tiles.bytes == 0,
            PTX=nvidia,
            BLOCK_M=tiles.tokens,
            BLOCK_N=tiles.rows,
            BLOCK_P=tiles.bytes,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
        sum_parts(parts, bias, out)
    return out


def sign_linear_dx_triton(
    dy: Tensor, weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, columns: int
) -> Tensor:
    """`sign_linear_dx` on a GPU; arguments and result as in `sign_linear_dx_reference`."""
    if before_ampere(dy.device):
        return sign_linear_dx_reference(dy, weight, scale_in, scale_out, columns)
    return dy @ expand_signs(weight, scale_in, scale_out, columns, dy.dtype)


def expand_signs(
    weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense matrix (out, columns) in `dtype`: `sign_dense` on a GPU."""
    outs = weight.shape[0]
    dense = torch.empty(outs, columns, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(outs, _EXPANDED_ROWS), triton.cdiv(columns, _EXPANDED_COLUMNS))
    with torch.cuda.device_of(weight):
        sign_expand_kernel[grid](
            weight.contiguous(),
            None if scale_in is None else scale_in.contiguous(),
            scale_out.contiguous(),
            dense,
            outs,
            columns,
            weight.shape[1],
            0 if scale_out.numel() == 1 else 1,
            BLOCK_N=_EXPANDED_ROWS,
            BLOCK_K=_EXPANDED_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return dense
