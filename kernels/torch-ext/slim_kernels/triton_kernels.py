"""Triton kernels for packed ternary weights: what runs on the GPU (`triton.py` decides the shapes it runs in).

The weight (P, K) holds output rows r, r + P, r + 2P, r + 3P in byte row r (drawn in `triton_unpack.py`), so a tile of
bytes gives four tiles of codes c = T + 1, and one tile of activations is multiplied with all four. The K dimension is
cut into segments: a segment is one quantization group or, with a single scale per row, one program's share of K. For
int8 activations q = round(x s_x)

    y[n, m] = sum over segments of  (scale[n] * (sum_k c q - sum_k q) + offset[n] * sum_k q) / s_x[m]

The sums over k are exact int32. The codes of plane i stay multiplied with 4^i (a mask is cheaper than a shift) and the
power of four goes into the scale, which is exact too. Float activations use T itself and accumulate in fp32.

The weight is the left operand of `tl.dot`, so that warps own different rows and none decodes a weight twice.
"""

import triton
import triton.language as tl

from .triton_unpack import unpack_planes


@triton.jit
def _absmax(x, start, end, BLOCK: tl.constexpr):
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        k = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + k, mask=k < end, other=0.0).to(tl.float32)))
    return tl.max(largest, axis=0)


@triton.jit
def quantize_activations_kernel(
    x,  # (M, K) float
    q,  # (M, K) int8, or None: only write the sums of x
    x_scale,  # (M, 1 or segments) fp32: 1 / s, or None
    x_sum,  # (M, segments): int32 sums of q, or fp32 sums of x
    K,
    segment_size,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (token, segment): s = 127 / max(|x|, 1e-5), q = round half even(x s), and the segment's sum.

    Compile without fp fusion: x * s must be rounded by itself.
    """
    token = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    start = segment * segment_size
    end = tl.minimum(start + segment_size, K)
    x += token * K
    if q is not None:
        largest = _absmax(x, 0, K, BLOCK) if PER_TOKEN else _absmax(x, start, end, BLOCK)
        s = tl.div_rn(1.0, tl.maximum(largest, 1e-5)) * 127.0  # what PyTorch makes of 127 / x
        total = tl.zeros((BLOCK,), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        k = first + tl.arange(0, BLOCK)
        values = tl.load(x + k, mask=k < end, other=0.0).to(tl.float32)
        if q is not None:
            rounded = (values * s + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no fraction bits left
            rounded = tl.minimum(tl.maximum(rounded, -128.0), 127.0)
            tl.store(q + token * K + k, rounded.to(tl.int8), mask=k < end)
            total += rounded.to(tl.int32)
        else:
            total += values
    tl.store(x_sum + token * tl.num_programs(1) + segment, tl.sum(total, axis=0))
    if q is not None:
        if PER_TOKEN:
            tl.store(x_scale + token, tl.div_rn(1.0, s))
        else:
            tl.store(x_scale + token * tl.num_programs(1) + segment, tl.div_rn(1.0, s))


@triton.jit
def _multiply(acc0, acc1, acc2, acc3, x_rows, weight_rows, k, end, EVEN: tl.constexpr, PTX: tl.constexpr):
    """Add the products of columns `k` (those below `end`) to the four planes' accumulators."""
    if EVEN:
        packed = tl.load(weight_rows + k[None, :])
        x = tl.load(x_rows + k[:, None])
    else:
        packed = tl.load(weight_rows + k[None, :], mask=(k < end)[None, :], other=0)
        x = tl.load(x_rows + k[:, None], mask=(k < end)[:, None], other=0)
    w0, w1, w2, w3 = unpack_planes(packed, x.dtype, PTX)
    acc0 = tl.dot(w0, x, acc0, input_precision="ieee", out_dtype=acc0.dtype)
    acc1 = tl.dot(w1, x, acc1, input_precision="ieee", out_dtype=acc1.dtype)
    acc2 = tl.dot(w2, x, acc2, input_precision="ieee", out_dtype=acc2.dtype)
    acc3 = tl.dot(w3, x, acc3, input_precision="ieee", out_dtype=acc3.dtype)
    return acc0, acc1, acc2, acc3


@triton.jit
def _add_segment(total, product, r, P, N, scale, offset, scale_row, x_scale, x_sum, PLANE: tl.constexpr):
    """Add one plane's segment product (rows, tokens) in fp32 units; an int32 product still carries 4^PLANE."""
    n = r + PLANE * P
    valid = (r < P) & (n < N)
    s = tl.load(scale + n * scale_row, mask=valid, other=0.0).to(tl.float32)
    if product.dtype == tl.int32:
        SHIFT: tl.constexpr = 2 * PLANE if PLANE < 3 else 0
        product = (product - (x_sum << SHIFT)[None, :]).to(tl.float32) * x_scale[None, :]
        s *= 1.0 / (1 << SHIFT)
    total += product * s[:, None]
    if offset is not None:
        o = tl.load(offset + n * scale_row, mask=valid, other=0.0).to(tl.float32)
        total += o[:, None] * (x_sum.to(tl.float32) * x_scale)[None, :]
    return total


@triton.jit
def _store_plane(out, total, bias, r, m, P, M, N, PLANE: tl.constexpr):
    n = r + PLANE * P
    valid = (r < P) & (n < N)
    if bias is not None:
        total += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[:, None]
    where = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=valid[:, None] & (m < M)[None, :])


@triton.jit
def ternary_linear_kernel(
    x,  # (M, K) int8, or the activations themselves
    x_scale,  # (M, 1 or segments) fp32 with int8, else None
    x_sum,  # (M, segments) with int8 or an offset, else None
    weight,  # (P, K) uint8
    scale,  # element [n, s] at n * scale_row + s * scale_segment
    offset,  # as scale, or None
    bias,  # (N,) or None
    out,  # (splits, M, N)
    M,
    N,
    K,
    P,
    segment_size,
    num_segments,
    segments_per_split,
    scale_row,
    scale_segment,
    x_scale_row,
    x_scale_segment,
    TILES: tl.constexpr,  # steps per segment, unrolled, or 0: a loop
    EVEN: tl.constexpr,  # every step is a whole tile
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split] = the share of x W^T (+ bias) of the split's segments; grid (row tiles, token tiles, splits)."""
    dtype: tl.constexpr = x.dtype.element_ty
    acc_dtype: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    r = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    safe_m = tl.minimum(m, M - 1)
    x_rows = x + safe_m.to(tl.int64)[None, :] * K
    weight_rows = weight + tl.minimum(r, P - 1).to(tl.int64)[:, None] * K

    total0 = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    total1 = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    total3 = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    first = split * segments_per_split
    for segment in range(first, tl.minimum(first + segments_per_split, num_segments)):
        start = segment * segment_size
        end = tl.minimum(start + segment_size, K)
        acc0 = tl.zeros((BLOCK_P, BLOCK_M), dtype=acc_dtype)
        acc1 = tl.zeros((BLOCK_P, BLOCK_M), dtype=acc_dtype)
        acc2 = tl.zeros((BLOCK_P, BLOCK_M), dtype=acc_dtype)
        acc3 = tl.zeros((BLOCK_P, BLOCK_M), dtype=acc_dtype)
        if TILES > 0:
            for tile in tl.static_range(TILES):
                k = start + tile * BLOCK_K + tl.arange(0, BLOCK_K)
                acc0, acc1, acc2, acc3 = _multiply(acc0, acc1, acc2, acc3, x_rows, weight_rows, k, end, EVEN, PTX)
        else:
            for first_k in range(start, end, BLOCK_K):
                k = first_k + tl.arange(0, BLOCK_K)
                acc0, acc1, acc2, acc3 = _multiply(acc0, acc1, acc2, acc3, x_rows, weight_rows, k, end, EVEN, PTX)

        sums = tl.zeros((BLOCK_M,), dtype=acc_dtype)
        units = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
        if x_sum is not None:
            sums = tl.load(x_sum + safe_m * num_segments + segment)
        if x_scale is not None:
            units = tl.load(x_scale + safe_m * x_scale_row + segment * x_scale_segment)
        s = scale + segment * scale_segment
        o = offset + segment * scale_segment if offset is not None else None
        total0 = _add_segment(total0, acc0, r, P, N, s, o, scale_row, units, sums, 0)
        total1 = _add_segment(total1, acc1, r, P, N, s, o, scale_row, units, sums, 1)
        total2 = _add_segment(total2, acc2, r, P, N, s, o, scale_row, units, sums, 2)
        total3 = _add_segment(total3, acc3, r, P, N, s, o, scale_row, units, sums, 3)

    out += split.to(tl.int64) * M * N
    _store_plane(out, total0, bias, r, m, P, M, N, 0)
    _store_plane(out, total1, bias, r, m, P, M, N, 1)
    _store_plane(out, total2, bias, r, m, P, M, N, 2)
    _store_plane(out, total3, bias, r, m, P, M, N, 3)


@triton.jit
def sum_splits_kernel(parts, bias, out, size, N, splits, BLOCK: tl.constexpr):
    """out = the sum of `parts` (splits, M, N) in order (so always the same bits), + bias, in out's dtype."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = parts + i
    for _ in range(splits):
        total += tl.load(part, mask=i < size, other=0.0)
        part += size
    if bias is not None:
        total += tl.load(bias + i % N, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _add_dx_plane(total, w, dy_rows, r, N, P, scale, scale_row, PLANE: tl.constexpr):
    n = r + PLANE * P
    valid = (r < P) & (n < N)
    dy = tl.load(dy_rows + n[None, :], mask=valid[None, :], other=0.0)
    s = tl.load(scale + n * scale_row, mask=valid, other=0.0)
    return tl.dot(dy, w * s.to(w.dtype)[:, None], total, input_precision="ieee")


@triton.jit
def ternary_dx_kernel(
    dy,  # (M, N)
    weight,  # (P, K) uint8
    scale,  # element [n, g] at n * scale_row + g * scale_group
    extra,  # (M, groups) fp32 or None: dy @ offset, the same for every column of a group
    dx,  # (M, K)
    M,
    N,
    K,
    P,
    group_size,
    num_groups,
    steps_per_group,
    scale_row,
    scale_group,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = dy W without a transposed copy: one tile of bytes feeds four products; grid (column tiles, token tiles).

    A tile of columns lies in one group. W is rounded to dy's dtype, as a dense weight would be; the offset is not.
    """
    group = tl.program_id(0) // steps_per_group
    start = group * group_size
    k = start + tl.program_id(0) % steps_per_group * BLOCK_K + tl.arange(0, BLOCK_K)
    valid_k = k < tl.minimum(start + group_size, K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_m = tl.minimum(m, M - 1)
    dy_rows = dy + safe_m.to(tl.int64)[:, None] * N
    s = scale + group * scale_group

    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        r = first + tl.arange(0, BLOCK_P)
        rows = weight + tl.minimum(r, P - 1).to(tl.int64)[:, None] * K
        packed = tl.load(rows + k[None, :], mask=valid_k[None, :], other=0)
        w0, w1, w2, w3 = unpack_planes(packed, dy.dtype.element_ty, PTX)
        total = _add_dx_plane(total, w0, dy_rows, r, N, P, s, scale_row, 0)
        total = _add_dx_plane(total, w1, dy_rows, r, N, P, s, scale_row, 1)
        total = _add_dx_plane(total, w2, dy_rows, r, N, P, s, scale_row, 2)
        total = _add_dx_plane(total, w3, dy_rows, r, N, P, s, scale_row, 3)
    if extra is not None:
        total += tl.load(extra + safe_m * num_groups + group)[:, None]
    where = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx + where, total.to(dx.dtype.element_ty), mask=(m < M)[:, None] & valid_k[None, :])
