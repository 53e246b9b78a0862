"""Decoding sparse weights on the GPU: from index and values to tiles of weights.

The storage is drawn in `sparse_reference.py`. Rows are walked in steps; in a step every lane owns an element, eight
columns of a row, and lanes next to each other own elements next to each other. (So that they do in every version of
Triton, a tile of elements is a vector, row after row, until it is multiplied.) What an element holds:

    bitmask     8 bits, one a column. Its first value is number  (kept in the words before) + (set bits below its own
                in the word), where a scan over the lanes adds up the words of the step and a running sum the steps.
                Each kept column reads the next value, so that neighbouring lanes read neighbouring addresses.
    positions   2 groups of four columns, each with one or two values at a fixed place: nothing to count.
    codes       a window of 32 bits of the row's stream, cut out of two aligned words, so codes of any width work.
"""

import triton
import triton.language as tl


_MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23 as fp32: with a code in the mantissa it is 2^23 + code


@triton.jit
def _count_bits(words):
    """Set bits of each uint32. LLVM knows this form and makes one instruction of it."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    return ((((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _load_words(index_rows, word, row_bytes, ALIGNED: tl.constexpr):
    """Words of the index as uint32, 0 past the end of a row."""
    if ALIGNED:
        words = tl.load(index_rows.to(tl.pointer_type(tl.uint32)) + word, mask=word * 4 < row_bytes, other=0)
    else:
        words = tl.load(index_rows + word * 4, mask=word * 4 < row_bytes, other=0).to(tl.uint32)
        for i in tl.static_range(1, 4):
            byte = word * 4 + i
            words |= tl.load(index_rows + byte, mask=byte < row_bytes, other=0).to(tl.uint32) << (8 * i)
    return words


@triton.jit
def count_before(index, start, N, row_bytes, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Set bits before column `start`, a multiple of 32, of the program's rows: int32 (rows, 4), the columns alike."""
    counts = tl.zeros((ROWS, 128), dtype=tl.int32)
    r = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), N - 1)
    index_rows = index + r.to(tl.int64)[:, None] * row_bytes
    for first in range(0, start >> 5, 128):
        word = first + tl.arange(0, 128)[None, :]
        counts += _count_bits(_load_words(index_rows, word, tl.minimum(row_bytes, start >> 3), ALIGNED))
    return tl.sum(counts, axis=1)[:, None] + tl.zeros((ROWS, 4), dtype=tl.int32)


@triton.jit
def element_words(index_rows, element, row_bytes, KEEP: tl.constexpr, ALIGNED: tl.constexpr):
    """The word of the index that holds each element (eight columns): uint32."""
    return _load_words(index_rows, element >> (3 if KEEP == 1 else 2), row_bytes, ALIGNED)


@triton.jit
def locate(words, element, lane, before, KEEP: tl.constexpr, ROWS: tl.constexpr, ELEMENTS: tl.constexpr):
    """(index bits, number of the first value, values before the next step) of each element.

    `before` is int32 (rows, 4), the columns alike, because four elements share a word of a bitmask.
    """
    if KEEP == 1:
        bits = (words >> (lane % 8 * 4).to(tl.uint32)) & 15
        first = element * 2
    elif KEEP == 2:
        bits = (words >> (lane % 4 * 8).to(tl.uint32)) & 255
        first = element * 4
    else:
        shift = (lane % 4 * 8).to(tl.uint32)
        bits = (words >> shift) & 255
        counts = tl.reshape(_count_bits(words), (ROWS, ELEMENTS // 4, 4))
        first = tl.reshape(before[:, None, :] + tl.cumsum(counts, axis=1) - counts, (ROWS * ELEMENTS,))
        lower = (tl.full(words.shape, 1, dtype=tl.uint32) << shift) - 1
        first += _count_bits(words & lower)
        before += tl.sum(counts, axis=1)
    return bits, first, before


@triton.jit
def split_four(quads):
    """(n, 4) to four (n,)."""
    even, odd = tl.split(tl.reshape(quads, (quads.shape[0], 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def join_tile(w0, w1, w2, w3, w4, w5, w6, w7, ROWS: tl.constexpr):
    """Eight (rows * elements,) to (rows, 8 * elements), the column of an element running fastest."""
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (ROWS, 8 * w0.shape[0] // ROWS))


@triton.jit
def _two_values(value_rows, at, bits, counts, PAIR: tl.constexpr, dtype: tl.constexpr):
    """The two columns of a pair, and where the next pair's values start; `counts` has two bits a pair."""
    kept = bits & (1 << (2 * PAIR)) != 0
    first = tl.load(value_rows + at, mask=counts & (3 << (2 * PAIR)) != 0, other=0.0)
    second = tl.load(value_rows + at + 1, mask=counts & (2 << (2 * PAIR)) != 0, other=0.0)
    at += ((counts >> (2 * PAIR)) & 3).to(tl.int32)
    return tl.where(kept, first, 0.0).to(dtype), tl.where(kept, second, first).to(dtype), at


@triton.jit
def _two_codes(
    window, bits, counts, origin, unit, dropped, PAIR: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr
):
    kept0, kept1 = bits & (1 << (2 * PAIR)) != 0, bits & (2 << (2 * PAIR)) != 0
    first = tl.where(kept0, _weight(window, 0, origin, unit, BITS, dtype), dropped)
    second = tl.where(kept1, _weight(tl.where(kept0, window >> BITS, window), 0, origin, unit, BITS, dtype), dropped)
    return first, second, window >> (((counts >> (2 * PAIR)) & 3) * BITS)


@triton.jit
def _weight(window, SLOT: tl.constexpr, origin, unit, BITS: tl.constexpr, dtype: tl.constexpr):
    """(code - zero) * unit; the difference is exact, as `origin` is 2^23 + zero."""
    code = ((window >> (SLOT * BITS)) & ((1 << BITS) - 1)) | _MAGIC
    weight = code.to(tl.float32, bitcast=True) - origin
    return (weight if unit is None else weight * unit).to(dtype)


@triton.jit
def _pair_counts(bits):
    """Set bits of each pair of bits, where the pair was."""
    return bits - ((bits >> 1) & 0x55)


@triton.jit
def _load_window(word_rows, bit, words_left):
    """32 bits of each row's stream, from bit number `bit` on; a word is read if it holds at least one stored byte."""
    word = bit >> 5
    low = tl.load(word_rows + word, mask=word < words_left, other=0).to(tl.uint64)
    high = tl.load(word_rows + word + 1, mask=word + 1 < words_left, other=0).to(tl.uint64)
    return ((high << 32 | low) >> (bit & 31).to(tl.uint64)).to(tl.uint32)


@triton.jit
def _bitmask_values(value_rows, first, bits, dtype: tl.constexpr):
    counts = _pair_counts(bits)
    w0, w1, at = _two_values(value_rows, first, bits, counts, 0, dtype)
    w2, w3, at = _two_values(value_rows, at, bits, counts, 1, dtype)
    w4, w5, at = _two_values(value_rows, at, bits, counts, 2, dtype)
    w6, w7, at = _two_values(value_rows, at, bits, counts, 3, dtype)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _bitmask_codes(
    word_rows, skipped_bits, words_left, first, bits, origin, unit, dropped, BITS: tl.constexpr, dtype: tl.constexpr
):
    counts = _pair_counts(bits)
    window = _load_window(word_rows, skipped_bits + first * BITS, words_left)
    w0, w1, window = _two_codes(window, bits, counts, origin, unit, dropped, 0, BITS, dtype)
    w2, w3, window = _two_codes(window, bits, counts, origin, unit, dropped, 1, BITS, dtype)
    if BITS > 4:
        first += _count_bits(bits & 15)
        window = _load_window(word_rows, skipped_bits + first * BITS, words_left)
    w4, w5, window = _two_codes(window, bits, counts, origin, unit, dropped, 2, BITS, dtype)
    w6, w7, window = _two_codes(window, bits, counts, origin, unit, dropped, 3, BITS, dtype)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _place_one(value, position, dropped):
    """Four columns of which one is kept."""
    return (
        tl.where(position == 0, value, dropped),
        tl.where(position == 1, value, dropped),
        tl.where(position == 2, value, dropped),
        tl.where(position == 3, value, dropped),
    )


@triton.jit
def _place_two(value0, value1, positions, dropped):
    """Four columns of which two are kept, at p0 < p1: so p0 is 0 to 2, p1 is 1 to 3, and single bits tell them."""
    return (
        tl.where(positions & 3 == 0, value0, dropped),
        tl.where(positions & 1 != 0, value0, tl.where(positions & 8 == 0, value1, dropped)),
        tl.where(positions & 2 != 0, value0, tl.where(positions & 4 == 0, value1, dropped)),
        tl.where(positions & 12 == 12, value1, dropped),
    )


@triton.jit
def _place_element(v0, v1, v2, v3, bits, dropped, KEEP: tl.constexpr):
    if KEEP == 1:
        w0, w1, w2, w3 = _place_one(v0, bits & 3, dropped)
        w4, w5, w6, w7 = _place_one(v1, bits >> 2, dropped)
    else:
        w0, w1, w2, w3 = _place_two(v0, v1, bits & 15, dropped)
        w4, w5, w6, w7 = _place_two(v2, v3, bits >> 4, dropped)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _position_values(value_rows, first, bits, row_length, KEEP: tl.constexpr, dtype: tl.constexpr):
    slot = first[:, None] + tl.arange(0, 2 * KEEP)[None, :]
    values = tl.load(value_rows[:, None] + slot, mask=slot < row_length, other=0.0)
    if KEEP == 1:
        v0, v1 = tl.split(values)
        v2, v3 = v0, v1
    else:
        v0, v1, v2, v3 = split_four(values)
    dropped = tl.full(bits.shape, 0.0, dtype=dtype)
    return _place_element(v0.to(dtype), v1.to(dtype), v2.to(dtype), v3.to(dtype), bits, dropped, KEEP)


@triton.jit
def _position_codes(
    word_rows,
    skipped_bits,
    words_left,
    first,
    bits,
    origin,
    unit,
    dropped,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
):
    window = _load_window(word_rows, skipped_bits + first * BITS, words_left)
    v0 = _weight(window, 0, origin, unit, BITS, dtype)
    v1 = _weight(window, 1, origin, unit, BITS, dtype)
    if KEEP == 1:
        v2, v3 = v0, v1
    else:
        v2 = _weight(window, 2, origin, unit, BITS, dtype)
        v3 = _weight(window, 3, origin, unit, BITS, dtype)
    return _place_element(v0, v1, v2, v3, bits, dropped, KEEP)


@triton.jit
def row_pointers(values, rows, r, row_length, num_words, BITS: tl.constexpr):
    """(pointers to the row's values or aligned words, bits to skip there, words from there to the end) by element."""
    start = r.to(tl.int64) * row_length if rows is None else tl.load(rows + r).to(tl.int64)
    word = start >> 2
    pointers = values + start if BITS == 0 else values.to(tl.pointer_type(tl.uint32)) + word
    return pointers, ((start & 3) * 8).to(tl.int32), (num_words - word).to(tl.int32)


@triton.jit
def decode(
    value_rows,
    skipped_bits,
    words_left,
    first,
    bits,
    row_length,
    origin,
    unit,
    dropped,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
):
    """The eight columns of each element in `dtype`: values, or (code - zero) * unit; `dropped` where none is kept."""
    if BITS == 0 and KEEP == 0:
        return _bitmask_values(value_rows, first, bits, dtype)
    elif BITS == 0:
        return _position_values(value_rows, first, bits, row_length, KEEP, dtype)
    else:
        dropped = tl.full(bits.shape, dropped, dtype=dtype)
        if KEEP == 0:
            return _bitmask_codes(
                value_rows, skipped_bits, words_left, first, bits, origin, unit, dropped, BITS, dtype
            )
        else:
            return _position_codes(
                value_rows, skipped_bits, words_left, first, bits, origin, unit, dropped, KEEP, BITS, dtype
            )
