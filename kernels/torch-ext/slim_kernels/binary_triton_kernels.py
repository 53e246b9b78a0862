"""Triton kernels for binary weights: what runs on the GPU (`binary_triton.py` decides the shapes it runs in).

The weight of a row and group is one of eight numbers, told by three bits: its sign s, its second bit t, and whether
its column is salient, z (drawn in `binary_reference.py`). With the entries numbered s + 2 t + 4 z, that is

    o0 + a0   o0 - a0   o1 + a1   o1 - a1   o2 + a2 + a3   o2 - a2 + a3   o2 + a2 - a3   o2 - a2 - a3

for scales a0 .. a3 and offsets o0 .. o2. The tables are made once per group, in fp32, and rounded to the dtype of the
product; then a weight is looked up. NVIDIA's byte permute looks four of them up at once: its selector has four places
of three bits, and eight bytes to choose from are the low (or the high) bytes of a whole table.

Factors of the columns multiply the activations instead (c0 those of a0, a1 and a2 where they apply, c1 the others'),
so that with them the weight is a sum of tables, each with its own activations:

    W = A0 * c0 + A1 * c1 + O        A0: only a0, a2 are not 0        A1: only a1, a3        O: only o0, o1, o2
"""

import triton
import triton.language as tl

from .sparse_triton_decode import join_tile


def _table_ptx(pair: str) -> str:
    """PTX from eight fp32 numbers ($4-$11) to a table of 16-bit floats: low bytes $0, $1 and high bytes $2, $3."""
    lines = ["{ .reg .b32 p0, p1, p2, p3;"]
    lines += [f"cvt.rn.{pair}.f32 p{i}, ${2 * i + 5}, ${2 * i + 4};" for i in range(4)]
    for i, (first, selector) in enumerate(((0, "0x6420"), (2, "0x6420"), (0, "0x7531"), (2, "0x7531"))):
        lines.append(f"prmt.b32 ${i}, p{first}, p{first + 1}, {selector};")
    return "\n".join([*lines, "}"])


def _lookup_ptx() -> str:
    """PTX from four bytes of s ($16), t ($17) and z ($18) to eight planes of two pairs of 16-bit floats.

    A register of s, t or z holds four bytes, so nibbles 2i and 2i + 1 of it, shifted right by j and masked, are bits
    j and j + 4 of byte i: half a register of selectors looks up planes j and j + 4 of two bytes. The tables are those
    of the first (third) byte, the second's (fourth's) neighbour in its row; each table comes four times, $19-$34.
    """
    shifts = (("shl", 1), ("shl", 0), ("shr", 1), ("shr", 2)), (("shl", 2), ("shl", 1), ("shl", 0), ("shr", 1))
    lines = ["{ .reg .b32 sel, bits, low, high;"]
    for j in range(4):
        lines += [f"shr.b32 sel, $16, {j};", "and.b32 sel, sel, 0x11111111;"]
        for source, mask, (name, by) in ((17, "0x22222222", shifts[0][j]), (18, "0x44444444", shifts[1][j])):
            lines += [f"{name}.b32 bits, ${source}, {by};", f"lop3.b32 sel, bits, {mask}, sel, 0xEA;"]
        for half in range(2):
            if half:
                lines.append("shr.b32 sel, sel, 16;")
            lines.append(f"prmt.b32 low, ${19 + 2 * half}, ${23 + 2 * half}, sel;")
            lines.append(f"prmt.b32 high, ${27 + 2 * half}, ${31 + 2 * half}, sel;")
            lines.append(f"prmt.b32 ${2 * j + half}, low, high, 0x6240;")
            lines.append(f"prmt.b32 ${2 * (j + 4) + half}, low, high, 0x7351;")
    return "\n".join([*lines, "}"])


_BF16_TABLE = tl.constexpr(_table_ptx("bf16x2"))
_FP16_TABLE = tl.constexpr(_table_ptx("f16x2"))
_TABLE = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 8)
_LOOKUP = tl.constexpr(_lookup_ptx())
_LOOKED_UP = tl.constexpr(",".join(["=&r"] * 16) + ",r" * 19)


@triton.jit
def _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, PLANE: tl.constexpr):
    """The entry of each byte's column PLANE."""
    minus, second, salient = s & (1 << PLANE) != 0, t & (1 << PLANE) != 0, z & (1 << PLANE) != 0
    plain = tl.where(second, tl.where(minus, e3, e2), tl.where(minus, e1, e0))
    return tl.where(salient, tl.where(second, tl.where(minus, e7, e6), tl.where(minus, e5, e4)), plain)


@triton.jit
def _look_up(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, dtype: tl.constexpr):
    """`weight_planes` on NVIDIA; of two neighbouring bytes, always of one row, the first one's entries are used."""
    if dtype == tl.bfloat16:
        low0, low1, high0, high1 = tl.inline_asm_elementwise(
            _BF16_TABLE,
            _TABLE,
            [e0, e1, e2, e3, e4, e5, e6, e7],
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            _LOOKUP,
            _LOOKED_UP,
            [s, t, z, low0, low1, high0, high1],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low0, low1, high0, high1 = tl.inline_asm_elementwise(
            _FP16_TABLE,
            _TABLE,
            [e0, e1, e2, e3, e4, e5, e6, e7],
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            _LOOKUP,
            _LOOKED_UP,
            [s, t, z, low0, low1, high0, high1],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def weight_planes(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, dtype: tl.constexpr, PTX: tl.constexpr):
    """The eight planes of weights of a tile of bytes, rounded to `dtype`; the entries are fp32, broadcastable."""
    if PTX:
        return _look_up(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, dtype)
    else:
        e0, e1, e2, e3 = e0.to(dtype), e1.to(dtype), e2.to(dtype), e3.to(dtype)
        e4, e5, e6, e7 = e4.to(dtype), e5.to(dtype), e6.to(dtype), e7.to(dtype)
        return (
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 0),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 1),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 2),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 3),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 4),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 5),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 6),
            _pick(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, 7),
        )


@triton.jit
def _entries(scale_rows, offset_rows, group, TABLE: tl.constexpr):
    """The eight entries of a group in fp32, (rows, 1): of W (TABLE 0), or of A0, A1 or O (1, 2, 3)."""
    if TABLE == 3:
        o0, o1, o2 = (
            _load(offset_rows, group * 3),
            _load(offset_rows, group * 3 + 1),
            _load(offset_rows, group * 3 + 2),
        )
        return o0, o0, o1, o1, o2, o2, o2, o2
    elif TABLE == 2:
        a1, a3 = _load(scale_rows, group * 4 + 1), _load(scale_rows, group * 4 + 3)
        zero = tl.zeros_like(a1)
        return zero, zero, a1, -a1, a3, a3, -a3, -a3
    elif TABLE == 1:
        a0, a2 = _load(scale_rows, group * 4), _load(scale_rows, group * 4 + 2)
        zero = tl.zeros_like(a0)
        return a0, -a0, zero, zero, a2, -a2, a2, -a2
    else:
        a0, a1 = _load(scale_rows, group * 4), _load(scale_rows, group * 4 + 1)
        a2, a3 = _load(scale_rows, group * 4 + 2), _load(scale_rows, group * 4 + 3)
        if offset_rows is None:
            return a0, -a0, a1, -a1, a2 + a3, a3 - a2, a2 - a3, -a2 - a3
        else:
            o0, o1 = _load(offset_rows, group * 3), _load(offset_rows, group * 3 + 1)
            o2 = _load(offset_rows, group * 3 + 2)
            plus, minus = o2 + a2, o2 - a2
            return o0 + a0, o0 - a0, o1 + a1, o1 - a1, plus + a3, minus + a3, plus - a3, minus - a3


@triton.jit
def _load(rows, at):
    return tl.load(rows + at).to(tl.float32)[:, None]


@triton.jit
def _add_plane(total, weight, x_rows, byte, size, valid_m, PLANE: tl.constexpr):
    x = tl.load(x_rows + PLANE * size + byte[:, None], mask=valid_m, other=0.0)
    return tl.dot(weight, x, total)


@triton.jit
def _multiply(
    total,
    x_rows,
    byte,
    size,
    valid_m,
    s,
    t,
    z,
    scale_rows,
    offset_rows,
    group,
    TABLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """total + W x of one tile of bytes and one table."""
    e0, e1, e2, e3, e4, e5, e6, e7 = _entries(scale_rows, offset_rows, group, TABLE)
    dtype: tl.constexpr = x_rows.dtype.element_ty
    w0, w1, w2, w3, w4, w5, w6, w7 = weight_planes(s, t, z, e0, e1, e2, e3, e4, e5, e6, e7, dtype, PTX)
    total = _add_plane(total, w0, x_rows, byte, size, valid_m, 0)
    total = _add_plane(total, w1, x_rows, byte, size, valid_m, 1)
    total = _add_plane(total, w2, x_rows, byte, size, valid_m, 2)
    total = _add_plane(total, w3, x_rows, byte, size, valid_m, 3)
    total = _add_plane(total, w4, x_rows, byte, size, valid_m, 4)
    total = _add_plane(total, w5, x_rows, byte, size, valid_m, 5)
    total = _add_plane(total, w6, x_rows, byte, size, valid_m, 6)
    return _add_plane(total, w7, x_rows, byte, size, valid_m, 7)


@triton.jit
def _load_bits(pointers, byte, P, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers + byte)
    else:
        return tl.load(pointers + byte, mask=byte < P, other=0)


@triton.jit(do_not_specialize=["M", "num_groups"])
def binary_linear_kernel(
    x,  # (variants, M, 8, size): the planes of x; with columns those of x c0, x c1 and, with an offset, x
    weight,  # (N, 2, P) uint8
    salient,  # (P,) uint8
    scale,  # (N, num_groups, 4)
    offset,  # (N, num_groups, 3) or None
    bias,  # (N,) or None
    out,  # (splits, M, N)
    M,
    N,
    P,
    size,
    num_groups,
    per_split,  # bytes, a multiple of the step
    COLUMNS: tl.constexpr,  # there are factors of columns
    GROUP_TILES: tl.constexpr,  # tiles per group, or 0: one group
    EVEN: tl.constexpr,  # every step is whole
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,  # bytes of a tile, which lies in one group
    TILES: tl.constexpr,  # tiles per step
):
    """out[split] = the split's share of x W^T (+ bias); grid (rows, tokens, splits)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = (m < M)[None, :]
    safe_n = tl.minimum(n, N - 1).to(tl.int64)
    x_rows = x + m.to(tl.int64)[None, :] * (8 * size)
    x_next = x_rows + M.to(tl.int64) * (8 * size)
    x_last = x_next + M.to(tl.int64) * (8 * size)
    s_rows = weight + safe_n[:, None] * (2 * P)
    scale_rows = scale + safe_n * num_groups * 4
    offset_rows = offset if offset is None else offset + safe_n * num_groups * 3
    start = tl.program_id(2) * per_split

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(start, tl.minimum(start + per_split, P), TILES * BLOCK_P):
        for i in tl.static_range(TILES):
            byte = first + i * BLOCK_P + tl.arange(0, BLOCK_P)
            s = _load_bits(s_rows, byte[None, :], P, EVEN)
            t = _load_bits(s_rows + P, byte[None, :], P, EVEN)
            z = _load_bits(salient, byte[None, :], P, EVEN)
            group = first // P  # 0, but no constant: tables made before the loop would need another layout in it
            if GROUP_TILES > 0:
                group = tl.minimum((first // BLOCK_P + i) // GROUP_TILES, num_groups - 1)
            if COLUMNS:
                total = _multiply(total, x_rows, byte, size, valid_m, s, t, z, scale_rows, offset_rows, group, 1, PTX)
                total = _multiply(total, x_next, byte, size, valid_m, s, t, z, scale_rows, offset_rows, group, 2, PTX)
                if offset is not None:
                    total = _multiply(
                        total, x_last, byte, size, valid_m, s, t, z, scale_rows, offset_rows, group, 3, PTX
                    )
            else:
                total = _multiply(total, x_rows, byte, size, valid_m, s, t, z, scale_rows, offset_rows, group, 0, PTX)

    if bias is not None:
        total += tl.load(bias + safe_n).to(tl.float32)[:, None]
    where = (tl.program_id(2).to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & valid_m)


@triton.jit
def _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, PLANE: tl.constexpr, dtype: tl.constexpr):
    """Column PLANE of each byte, computed in fp32 in the order of the reference and rounded once."""
    minus, second, salient = s & (1 << PLANE) != 0, t & (1 << PLANE) != 0, z & (1 << PLANE) != 0
    first, left = tl.where(salient, a2, tl.where(second, a1, a0)), a3
    if columns is not None:
        c0 = tl.load(columns + k + PLANE, mask=k + PLANE < K, other=0.0).to(tl.float32)
        c1 = tl.load(columns + K + k + PLANE, mask=k + PLANE < K, other=0.0).to(tl.float32)
        first *= tl.where(salient | (t & (1 << PLANE) == 0), c0, c1)
        left *= c1
    weight = tl.where(salient, o2, tl.where(second, o1, o0)) + tl.where(minus, -first, first)
    return tl.where(salient, weight + tl.where(second, -left, left), weight).to(dtype)


@triton.jit
def binary_expand_kernel(
    weight,  # (N, 2, P) uint8
    salient,  # (P,) uint8
    scale,  # (N, num_groups, 4)
    offset,  # (N, num_groups, 3) or None
    columns,  # (2, K) or None
    dense,  # (N, K)
    N,
    K,
    P,
    num_groups,
    group_bytes,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """dense = W; grid (row tiles, byte tiles). Compile without fp fusion: products must be rounded by themselves.

    A tile of bytes is a vector, row after row, so that in every version of Triton neighbouring lanes have neighbours.
    """
    dtype: tl.constexpr = dense.dtype.element_ty
    i = tl.arange(0, ROWS * BYTES)
    n = tl.minimum(tl.program_id(0) * ROWS + i // BYTES, N - 1).to(tl.int64)
    byte = tl.program_id(1) * BYTES + i % BYTES
    bits = weight + n * (2 * P) + byte
    s, t = tl.load(bits, mask=byte < P, other=0), tl.load(bits + P, mask=byte < P, other=0)
    z = tl.load(salient + byte, mask=byte < P, other=0)
    group = n * num_groups + tl.minimum(byte // group_bytes, num_groups - 1)
    a = scale + group * 4
    a0, a1 = tl.load(a).to(tl.float32), tl.load(a + 1).to(tl.float32)
    a2, a3 = tl.load(a + 2).to(tl.float32), tl.load(a + 3).to(tl.float32)
    o0, o1, o2 = 0.0, 0.0, 0.0
    if offset is not None:
        o = offset + group * 3
        o0, o1, o2 = tl.load(o).to(tl.float32), tl.load(o + 1).to(tl.float32), tl.load(o + 2).to(tl.float32)
    k = byte * 8
    w0 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 0, dtype)
    w1 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 1, dtype)
    w2 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 2, dtype)
    w3 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 3, dtype)
    w4 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 4, dtype)
    w5 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 5, dtype)
    w6 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 6, dtype)
    w7 = _dense_column(s, t, z, a0, a1, a2, a3, o0, o1, o2, columns, k, K, 7, dtype)
    tile = join_tile(w0, w1, w2, w3, w4, w5, w6, w7, ROWS)
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * (8 * BYTES) + tl.arange(0, 8 * BYTES)[None, :]
    tl.store(dense + r * K + column, tile, mask=(r < N) & (column < K))
