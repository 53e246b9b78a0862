"""Triton kernels for sparse weights: what runs on the GPU (`sparse_triton.py` decides the shapes it runs in).

Three kernels share the decoding of `sparse_triton_decode.py`. `sparse_few_kernel` multiplies one or two tokens in fp32
on the ordinary cores; `sparse_dot_kernel`, up to 16, rounds the weights to the dtype of x and uses `tl.dot`; for more,
and for dx, `sparse_expand_kernel` writes the dense matrix. All of them cut K into splits; a split of a bitmask counts
the bits before it first.
"""

import triton
import triton.language as tl

from .sparse_triton_decode import (
    count_before,
    decode,
    element_words,
    join_tile,
    locate,
    row_pointers,
    split_four,
)


@triton.jit
def _load_x(x, column, K, ROWS: tl.constexpr):
    """Four columns of x from each of `column` (elements,) on, as fp32: four (rows * elements,), the rows alike."""
    k = column[:, None] + tl.arange(0, 4)[None, :]
    a0, a1, a2, a3 = split_four(tl.load(x + k, mask=k < K, other=0.0))
    return _for_rows(a0, ROWS), _for_rows(a1, ROWS), _for_rows(a2, ROWS), _for_rows(a3, ROWS)


@triton.jit
def _for_rows(a, ROWS: tl.constexpr):
    rows = tl.broadcast_to(a.to(tl.float32)[None, :], (ROWS, a.shape[0]))
    return tl.reshape(rows, (ROWS * a.shape[0],))


@triton.jit
def _add_products(total, x, column, K, w0, w1, w2, w3, w4, w5, w6, w7, unit, ROWS: tl.constexpr):
    """Add one token's products to `total`; `column` is the first column of each element of a row."""
    a0, a1, a2, a3 = _load_x(x, column, K, ROWS)
    a4, a5, a6, a7 = _load_x(x, column + 4, K, ROWS)
    part = w0 * a0 + w1 * a1 + w2 * a2 + w3 * a3
    part += w4 * a4 + w5 * a5 + w6 * a6 + w7 * a7
    return total + part if unit is None else total + part * unit


@triton.jit
def _store_token(out, total, bias, scale, N, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    result = tl.sum(tl.reshape(total, (ROWS, total.shape[0] // ROWS)), axis=1)
    if BITS > 0 and GROUP == 0:
        result *= tl.load(scale + r, mask=r < N, other=0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + r, mask=r < N, other=0.0).to(tl.float32)
    tl.store(out + r, result.to(out.dtype.element_ty), mask=r < N)


@triton.jit(do_not_specialize=["M", "num_words", "num_groups"])
def sparse_few_kernel(
    x,  # (M, K)
    index,  # (N, row_bytes) uint8
    values,  # floats or streams of codes
    rows,  # (N + 1,) int32, or None: every row has `row_length`
    scale,  # (N, num_groups) or None
    zero,  # (N, num_groups) uint8 or None
    bias,  # (N,) or None
    out,  # (splits, M, N)
    M,
    N,
    K,
    row_bytes,
    row_length,
    num_words,  # words that hold all codes
    num_groups,
    per_split,  # columns, a multiple of the step
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a group, a multiple of 8, or 0: one group a row
    ALIGNED: tl.constexpr,  # the index can be read in words
    TOKENS: tl.constexpr,  # 1 or 2: M
    ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr,  # of eight columns, per step
):
    """out[split] = the split's share of x W^T (+ bias), in fp32; grid (row tiles, splits)."""
    start = tl.program_id(1) * per_split
    end = tl.minimum(start + per_split, K)
    element_r = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS * ELEMENTS) // ELEMENTS, N - 1)
    lane = tl.arange(0, ROWS * ELEMENTS) % ELEMENTS
    index_rows = index + element_r.to(tl.int64) * row_bytes
    value_rows, skipped_bits, words_left = row_pointers(values, rows, element_r, row_length, num_words, BITS)
    before = tl.zeros((ROWS, 4), dtype=tl.int32)
    if KEEP == 0 and start > 0:
        before += count_before(index, start, N, row_bytes, ROWS, ALIGNED)
    total0 = tl.zeros((ROWS * ELEMENTS,), dtype=tl.float32)
    total1 = tl.zeros((ROWS * ELEMENTS,), dtype=tl.float32)
    row_origin = 0.0
    if BITS > 0 and GROUP == 0:
        row_origin = tl.load(zero + element_r).to(tl.float32) + 8388608.0
    words = element_words(index_rows, (start >> 3) + lane, row_bytes, KEEP, ALIGNED)
    for column in range(start, end, 8 * ELEMENTS):
        element = (column >> 3) + lane
        bits, first, before = locate(words, element, lane, before, KEEP, ROWS, ELEMENTS)
        words = element_words(index_rows, element + ELEMENTS, row_bytes, KEEP, ALIGNED)
        origin, unit = row_origin, None
        if GROUP > 0:
            group = element_r * num_groups + tl.minimum(element * 8 // GROUP, num_groups - 1)
            origin = tl.load(zero + group).to(tl.float32) + 8388608.0
            unit = tl.load(scale + group).to(tl.float32)
        w0, w1, w2, w3, w4, w5, w6, w7 = decode(
            value_rows, skipped_bits, words_left, first, bits, row_length, origin, None, 0.0, KEEP, BITS, tl.float32
        )
        k = column + 8 * tl.arange(0, ELEMENTS)
        total0 = _add_products(total0, x, k, K, w0, w1, w2, w3, w4, w5, w6, w7, unit, ROWS)
        if TOKENS > 1:
            total1 = _add_products(total1, x + K, k, K, w0, w1, w2, w3, w4, w5, w6, w7, unit, ROWS)

    out += tl.program_id(1).to(tl.int64) * M * N
    _store_token(out, total0, bias, scale, N, BITS, GROUP, ROWS)
    if TOKENS > 1:
        _store_token(out + N, total1, bias, scale, N, BITS, GROUP, ROWS)


@triton.jit(do_not_specialize=["M", "num_words", "num_groups"])
def sparse_dot_kernel(
    x,  # (M, K)
    index,
    values,
    rows,
    scale,
    zero,
    bias,
    out,  # (splits, M, N)
    M,
    N,
    K,
    row_bytes,
    row_length,
    num_words,
    num_groups,
    per_split,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,  # a size of `tl.dot`, at least M
    ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """As `sparse_few_kernel` with `tl.dot`: the weights are rounded to the dtype of x; a row's scale comes after."""
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.arange(0, TOKENS)
    start = tl.program_id(1) * per_split
    end = tl.minimum(start + per_split, K)
    element_r = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS * ELEMENTS) // ELEMENTS, N - 1)
    lane = tl.arange(0, ROWS * ELEMENTS) % ELEMENTS
    index_rows = index + element_r.to(tl.int64) * row_bytes
    value_rows, skipped_bits, words_left = row_pointers(values, rows, element_r, row_length, num_words, BITS)
    before = tl.zeros((ROWS, 4), dtype=tl.int32)
    if KEEP == 0 and start > 0:
        before += count_before(index, start, N, row_bytes, ROWS, ALIGNED)
    x_rows = x + tl.minimum(m, M - 1)[None, :] * K
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    row_origin = 0.0
    if BITS > 0 and GROUP == 0:
        row_origin = tl.load(zero + element_r).to(tl.float32) + 8388608.0
    words = element_words(index_rows, (start >> 3) + lane, row_bytes, KEEP, ALIGNED)
    for column in range(start, end, 8 * ELEMENTS):
        element = (column >> 3) + lane
        bits, first, before = locate(words, element, lane, before, KEEP, ROWS, ELEMENTS)
        words = element_words(index_rows, element + ELEMENTS, row_bytes, KEEP, ALIGNED)
        k = column + tl.arange(0, 8 * ELEMENTS)[:, None]
        tokens = tl.load(x_rows + k, mask=k < K, other=0.0)
        origin, unit = row_origin, None
        if GROUP > 0:
            group = element_r * num_groups + tl.minimum(element * 8 // GROUP, num_groups - 1)
            origin = tl.load(zero + group).to(tl.float32) + 8388608.0
            unit = tl.load(scale + group).to(tl.float32)
        w0, w1, w2, w3, w4, w5, w6, w7 = decode(
            value_rows, skipped_bits, words_left, first, bits, row_length, origin, unit, 0.0, KEEP, BITS, dtype
        )
        tile = join_tile(w0, w1, w2, w3, w4, w5, w6, w7, ROWS)
        total = tl.dot(tile, tokens, total, input_precision="ieee")

    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_r = tl.minimum(r, N - 1)
    if BITS > 0 and GROUP == 0:
        total *= tl.load(scale + safe_r).to(tl.float32)[:, None]
    if bias is not None:
        total += tl.load(bias + safe_r).to(tl.float32)[:, None]
    where = tl.program_id(1).to(tl.int64) * M * N + m[None, :] * N + r[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(r < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["num_words", "num_groups", "group_size"])
def sparse_expand_kernel(
    index,
    values,
    rows,
    scale,
    zero,
    dense,  # (N, K)
    N,
    K,
    row_bytes,
    row_length,
    num_words,
    num_groups,
    group_size,
    per_split,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # as above, or -1: groups of any size, `group_size`
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """dense = W, computed in fp32 where there are codes and rounded once; grid (row tiles, splits)."""
    dtype: tl.constexpr = dense.dtype.element_ty
    start = tl.program_id(1) * per_split
    end = tl.minimum(start + per_split, K)
    element_r = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS * ELEMENTS) // ELEMENTS, N - 1)
    lane = tl.arange(0, ROWS * ELEMENTS) % ELEMENTS
    index_rows = index + element_r.to(tl.int64) * row_bytes
    value_rows, skipped_bits, words_left = row_pointers(values, rows, element_r, row_length, num_words, BITS)
    before = tl.zeros((ROWS, 4), dtype=tl.int32)
    if KEEP == 0 and start > 0:
        before += count_before(index, start, N, row_bytes, ROWS, ALIGNED)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_r = tl.minimum(r, N - 1)
    dense_rows = dense + safe_r.to(tl.int64)[:, None] * K
    row_origin, row_unit = 0.0, None
    if BITS > 0 and GROUP == 0:
        row_origin = tl.load(zero + element_r).to(tl.float32) + 8388608.0
        row_unit = tl.load(scale + element_r).to(tl.float32)
    words = element_words(index_rows, (start >> 3) + lane, row_bytes, KEEP, ALIGNED)
    for column in range(start, end, 8 * ELEMENTS):
        element = (column >> 3) + lane
        bits, first, before = locate(words, element, lane, before, KEEP, ROWS, ELEMENTS)
        words = element_words(index_rows, element + ELEMENTS, row_bytes, KEEP, ALIGNED)
        k = column + tl.arange(0, 8 * ELEMENTS)[None, :]
        if GROUP >= 0:
            origin, unit = row_origin, row_unit
            if GROUP > 0:
                group = element_r * num_groups + tl.minimum(element * 8 // GROUP, num_groups - 1)
                origin = tl.load(zero + group).to(tl.float32) + 8388608.0
                unit = tl.load(scale + group).to(tl.float32)
            w0, w1, w2, w3, w4, w5, w6, w7 = decode(
                value_rows, skipped_bits, words_left, first, bits, row_length, origin, unit, 0.0, KEEP, BITS, dtype
            )
            tile = join_tile(w0, w1, w2, w3, w4, w5, w6, w7, ROWS)
        else:
            w0, w1, w2, w3, w4, w5, w6, w7 = decode(
                value_rows,
                skipped_bits,
                words_left,
                first,
                bits,
                row_length,
                8388608.0,
                None,
                -1.0,
                KEEP,
                BITS,
                tl.float32,
            )
            codes = join_tile(w0, w1, w2, w3, w4, w5, w6, w7, ROWS)
            at = safe_r[:, None] * num_groups + tl.minimum(k // group_size, num_groups - 1)
            shifted = codes - tl.load(zero + at).to(tl.float32)
            tile = tl.where(codes < 0, 0.0, shifted * tl.load(scale + at).to(tl.float32)).to(dtype)
        tl.store(dense_rows + k, tile, mask=(r < N)[:, None] & (k < K))
