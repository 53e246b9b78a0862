"""Triton kernels for sign weights: what runs on the GPU (`sign_triton.py` decides the shapes it runs in)."""

import triton
import triton.language as tl

from .triton_planes import sign_planes


@triton.jit
def _add_plane(total, signs, x_rows, byte, size, valid_m, PLANE: tl.constexpr):
    x = tl.load(x_rows + PLANE * size + byte[:, None], mask=valid_m, other=0)
    return tl.dot(signs, x, total, out_dtype=total.dtype)


@triton.jit(do_not_specialize=["M"])
def sign_linear_kernel(
    x,  # (M, 8, size): the planes of the activations
    x_scale,  # (M,) fp32 with int8, else None
    weight,  # (N, P) uint8
    scale_out,  # (N,), or (1,) with scale_step 0
    bias,  # (N,) or None
    out,  # (splits, M, N)
    M,
    N,
    P,
    size,
    scale_step,
    per_split,  # bytes, a multiple of the step
    EVEN: tl.constexpr,  # every step is whole
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[split] = the split's share of x S^T * x_scale * scale_out (+ bias); grid (rows, tokens, splits)."""
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = (m < M)[None, :]
    safe_n = tl.minimum(n, N - 1)
    x_rows = x + m.to(tl.int64)[None, :] * (8 * size)
    weight_rows = weight + safe_n.to(tl.int64)[:, None] * P
    start = tl.program_id(2) * per_split

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if dtype == tl.int8 else tl.float32)
    for first in range(start, tl.minimum(start + per_split, P), BLOCK_P):
        byte = first + tl.arange(0, BLOCK_P)
        if EVEN:
            packed = tl.load(weight_rows + byte[None, :])
        else:
            packed = tl.load(weight_rows + byte[None, :], mask=(byte < P)[None, :], other=0)
        s0, s1, s2, s3, s4, s5, s6, s7 = sign_planes(packed, dtype, PTX)
        total = _add_plane(total, s0, x_rows, byte, size, valid_m, 0)
        total = _add_plane(total, s1, x_rows, byte, size, valid_m, 1)
        total = _add_plane(total, s2, x_rows, byte, size, valid_m, 2)
        total = _add_plane(total, s3, x_rows, byte, size, valid_m, 3)
        total = _add_plane(total, s4, x_rows, byte, size, valid_m, 4)
        total = _add_plane(total, s5, x_rows, byte, size, valid_m, 5)
        total = _add_plane(total, s6, x_rows, byte, size, valid_m, 6)
        total = _add_plane(total, s7, x_rows, byte, size, valid_m, 7)

    result = total.to(tl.float32) * tl.load(scale_out + safe_n * scale_step).to(tl.float32)[:, None]
    if x_scale is not None:
        result *= tl.load(x_scale + tl.minimum(m, M - 1))[None, :]
    if bias is not None:
        result += tl.load(bias + safe_n).to(tl.float32)[:, None]
    where = (tl.program_id(2).to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=(n < N)[:, None] & valid_m)


@triton.jit
def sign_expand_kernel(
    weight,  # (N, P) uint8
    scale_in,  # (K,) or None
    scale_out,  # (N,), or (1,) with scale_step 0
    dense,  # (N, K)
    N,
    K,
    P,
    scale_step,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dense = W, computed in fp32 and rounded once; grid (row tiles, column tiles)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = (n < N)[:, None] & (k < K)[None, :]
    rows = n.to(tl.int64)[:, None]
    bits = tl.load(weight + rows * P + (k >> 3)[None, :], mask=valid, other=0).to(tl.int32) >> (k & 7)[None, :]
    magnitude = tl.load(scale_out + n * scale_step, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if scale_in is not None:
        magnitude *= tl.load(scale_in + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    tile = tl.where(bits & 1 != 0, -magnitude, magnitude)
    tl.store(dense + rows * K + k[None, :], tile.to(dense.dtype.element_ty), mask=valid)
