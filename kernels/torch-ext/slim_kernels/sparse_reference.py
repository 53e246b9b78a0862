"""Sparse linear layers in plain PyTorch: the ground truth every fast kernel is tested against.

Which columns of a row are kept is said in one of two forms, both uint8 of shape (out, bytes), little-endian bits:

    bitmask (`keep == 0`)   ceil(in / 8) bytes a row; bit k % 8 of byte k // 8 is 1 where column k is kept:

        bit      7     6     5     4     3     2     1     0
        column  k+7   k+6   k+5   k+4   k+3   k+2   k+1    k          (bits past the last column are 0)

    positions (`keep` 1 or 2 of every 4 columns)   2 bits say where in its group of four a kept column is, ascending:

        keep == 2, ceil(in / 8) bytes     bit   7 6     5 4     3 2     1 0
                                               p1(g+1) p0(g+1)  p1(g)  p0(g)      columns 4g + p0 < 4g + p1
        keep == 1, ceil(in / 16) bytes    bit   7 6     5 4     3 2     1 0
                                               p(g+3)  p(g+2)  p(g+1)  p(g)

        (the last group may reach past the last column; what lies there is 0)

The kept values follow one another in the order of their columns, row after row:

    values (`bits == 0`)    fp32, bf16 or fp16. As many in every row: (out, kept). Otherwise one flat tensor, and
                            `rows`, int32 (out + 1,), holds where each row starts.
    codes (`bits` 2 to 8)   uint8; each row is a stream of `bits`-bit codes c, low bits first, padded to whole bytes:
                            (out, bytes), or flat with `rows` in bytes and whatever padding after the last row. A kept
                            weight is scale * (c - zero), with scale and zero (out, ceil(in / group_size)) of its row
                            and group of columns.

All other weights are 0. A kept weight may be 0 as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def index_bytes(columns: int, keep: int) -> int:
    """Bytes of one row of the index: of a bitmask (`keep` 0), or of positions with `keep` of every 4 columns."""
    return -(-columns // 16) if keep == 1 else -(-columns // 8)


def pack_mask(mask: Tensor, keep: int = 0) -> Tensor:
    """Pack a bool mask (out, in), true where a weight is kept, into the index.

    Args:
        keep: 0 for a bitmask; 1 or 2 for positions, of which every group of 4 columns must then have that many (or as
            many as it has columns, if the last group has fewer).

    Raises:
        ValueError: a group keeps another number of columns.
    """
    if keep == 0:
        return _pack_bits(mask)
    padded = _pad_groups(mask, keep)
    if not bool((padded.unflatten(1, (-1, 4)).sum(-1) == keep).all()):
        raise ValueError(f"pack_mask got a mask that does not keep exactly {keep} of every 4 columns.")
    positions = (padded.nonzero()[:, 1] % 4).view(len(mask), -1)
    return _pack_bits(torch.stack([positions & 1, positions >> 1], dim=-1).flatten(1).bool())


def unpack_mask(weight: Tensor, columns: int, keep: int = 0) -> Tensor:
    """Undo `pack_mask`: bool (out, columns)."""
    return _unpack_padded(weight, columns, keep)[:, :columns]


def pack_values(dense: Tensor, mask: Tensor, keep: int = 0, *, ragged: bool = False) -> tuple[Tensor, Tensor | None]:
    """The kept values of `dense` (out, in) in their stored order.

    Returns:
        (out, kept) and `None`; or, if `ragged`, (total,) and the starts of the rows, int32 (out + 1,).
    """
    kept = _pad_columns(dense, keep)[_pad_groups(mask, keep)]
    if not ragged:
        return kept.view(len(dense), -1), None
    return kept, _starts(mask.sum(1))


def pack_codes(
    codes: Tensor, mask: Tensor, bits: int, keep: int = 0, *, ragged: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The kept codes of `codes`, uint8 (out, in) below 2 ** bits, as streams of bits.

    Returns:
        uint8 (out, bytes) and `None`; or, if `ragged`, (total bytes,) and the starts of the rows, int32 (out + 1,).
    """
    padded = _pad_groups(mask, keep)
    counts = padded.sum(1)
    inside = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]
    rows = codes.new_zeros(inside.shape)
    rows[inside] = _pad_columns(codes, keep)[padded]
    stream = torch.stack([rows >> bit & 1 for bit in range(bits)], dim=-1).flatten(1).bool()
    packed = _pack_bits(stream)
    if not ragged:
        return packed, None
    sizes = (counts * bits + 7) // 8
    return packed[torch.arange(packed.shape[1], device=mask.device) < sizes[:, None]], _starts(sizes)


def sparse_dense(
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    columns: int,
    keep: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense matrix (out, columns), computed in fp32 where there are codes, and rounded once to `dtype`."""
    mask = _unpack_padded(weight, columns, keep)
    if bits == 0:
        dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        dense[mask] = values.flatten()
        return dense[:, :columns].to(dtype)
    dense = torch.zeros(mask.shape, dtype=torch.float32, device=values.device)
    dense[mask] = _unpack_codes(values, rows, mask.sum(1), bits).float()
    dense = (dense[:, :columns] - _per_column(zero, group_size, columns)) * _per_column(scale, group_size, columns)
    return dense.masked_fill_(~mask[:, :columns], 0).to(dtype)


def sparse_linear_reference(
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
    """``x @ W.T + bias`` in fp32, rounded once to the dtype of `x`.

    Args:
        x: activations (..., in), fp32, bf16 or fp16.
        weight: the index, uint8 (out, index_bytes(in, keep)).
        values: kept values (fp32, bf16, fp16) or codes (uint8): (out, ...), or flat with `rows`.
        rows: int32 (out + 1,), where the rows of flat values start, or None.
        scale: (out, ceil(in / group_size)), fp32, bf16 or fp16, for codes, else None.
        zero: uint8, same shape as `scale`, for codes, else None.
        bias: (out,), or None.
        keep: 0 for a bitmask, 1 or 2 for positions.
        bits: 0 for values, 2 to 8 for codes.
        group_size: columns that share a scale.

    Returns:
        Tensor (..., out) in the dtype of `x`.
    """
    dense = sparse_dense(weight, values, rows, scale, zero, x.shape[-1], keep, bits, group_size)
    return F.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def sparse_linear_dx_reference(
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
    """Gradient with respect to the input: ``dy @ W`` of shape (..., columns) for `dy` of shape (..., out)."""
    dense = sparse_dense(weight, values, rows, scale, zero, columns, keep, bits, group_size)
    return (dy.float() @ dense).to(dy.dtype)


def check_sparse_arguments(
    columns: int,
    dtype: torch.dtype,
    weight: tuple[tuple[int, ...], torch.dtype],
    values: tuple[tuple[int, ...], torch.dtype],
    rows: tuple[tuple[int, ...], torch.dtype] | None,
    scale: tuple[tuple[int, ...], torch.dtype] | None,
    zero: tuple[tuple[int, ...], torch.dtype] | None,
    bias: tuple[tuple[int, ...], torch.dtype] | None,
    keep: int,
    bits: int,
    group_size: int,
) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape or number, and say what was expected.

    Each tensor is given by its (shape, dtype). How many values there are is not checked against the index, which would
    have to be read for it: whoever loads a layer does that once.
    """
    if keep not in (0, 1, 2) or (bits != 0 and not 2 <= bits <= 8) or group_size < 1:
        raise ValueError(
            f"sparse_linear got {keep=}, {bits=}, {group_size=}; keep is 0 (bitmask), 1 or 2 (of every 4), bits is 0 "
            "(values) or 2 to 8 (codes), group_size at least 1."
        )
    floats = {"x": dtype, "scale": scale and scale[1], "bias": bias and bias[1]} | (
        {} if bits else {"values": values[1]}
    )
    for name, found in floats.items():
        if found is not None and found not in FLOATS:
            raise TypeError(f"sparse_linear got {name} of {found}; it takes float32, bfloat16 or float16.")
    integers = {"weight": weight[1], "zero": zero and zero[1]} | ({"values": values[1]} if bits else {})
    for name, found in integers.items():
        if found is not None and found != torch.uint8:
            raise TypeError(f"sparse_linear got {name} of {found}; it must be uint8.")
    if rows is not None and rows[1] != torch.int32:
        raise TypeError(f"sparse_linear got rows of {rows[1]}; it must be int32.")
    if (scale is None) != (bits == 0) or (zero is None) != (bits == 0):
        raise ValueError("sparse_linear needs scale and zero for codes, and takes neither for values.")
    outs = weight[0][0] if weight[0] else 0
    width = -(-columns // 4) * keep
    sizes = (outs, (width * bits + 7) // 8 if bits else width)
    grid = (outs, -(-columns // group_size))
    expected = {
        "weight": (weight[0], [(outs, index_bytes(columns, keep))]),
        "values": (values[0], [sizes] if keep else None),
        "rows": (rows and rows[0], [(outs + 1,)]),
        "scale": (scale and scale[0], [grid]),
        "zero": (zero and zero[0], [grid]),
        "bias": (bias and bias[0], [(outs,)]),
    }
    for name, (found, shapes) in expected.items():
        if found is not None and shapes is not None and tuple(found) not in shapes:
            raise ValueError(
                f"sparse_linear got {name} of shape {tuple(found)}; for {columns} inputs, {outs} outputs it must be "
                f"{shapes[0]}."
            )
    if not keep and len(values[0]) != (2 if rows is None else 1):
        raise ValueError("sparse_linear takes values (out, kept), or flat values together with rows.")


def _pad_columns(matrix: Tensor, keep: int) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[1] % 4)) if keep else matrix


def _pad_groups(mask: Tensor, keep: int) -> Tensor:
    """The mask with whole groups of 4, the first columns past the end marked where the last group keeps too few."""
    columns = mask.shape[1]
    mask = _pad_columns(mask, keep)
    if mask.shape[1] > columns:
        mask[:, columns : columns + max(0, keep - columns % 4)] = True
    return mask


def _unpack_padded(weight: Tensor, columns: int, keep: int) -> Tensor:
    """The mask with whole groups of 4 for positions, of exactly `columns` columns for a bitmask."""
    bits = (weight[:, :, None] & weight.new_tensor(_POWERS)).ne(0).flatten(1)
    if keep == 0:
        return bits[:, :columns]
    groups = -(-columns // 4)
    pairs = bits.unflatten(1, (-1, 2))[:, : groups * keep].long()
    positions = pairs[..., 0] + 2 * pairs[..., 1] + 4 * (torch.arange(groups * keep, device=bits.device) // keep)
    return torch.zeros(len(weight), 4 * groups, dtype=torch.bool, device=bits.device).scatter_(1, positions, True)


def _pack_bits(bits: Tensor) -> Tensor:
    """Bool (rows, n) to uint8 (rows, ceil(n / 8)), the first of eight in the lowest bit."""
    octets = F.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (octets * octets.new_tensor(_POWERS)).sum(-1, dtype=torch.uint8)


def _unpack_codes(values: Tensor, rows: Tensor | None, counts: Tensor, bits: int) -> Tensor:
    """All codes one after the other, uint8 (total,)."""
    if rows is not None:
        sizes = rows.diff()
        inside = torch.arange(int(sizes.max()), device=values.device) < sizes[:, None]
        padded = values.new_zeros(inside.shape)
        padded[inside] = values[: int(sizes.sum())]
        values = padded
    stream = (values[:, :, None] & values.new_tensor(_POWERS)).ne(0).flatten(1)
    codes = stream[:, : stream.shape[1] // bits * bits].unflatten(1, (-1, bits))
    codes = (codes * codes.new_tensor(_POWERS[:bits], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return codes[torch.arange(codes.shape[1], device=values.device) < counts[:, None]]


def _starts(sizes: Tensor) -> Tensor:
    return F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)


def _per_column(values: Tensor, group_size: int, columns: int) -> Tensor:
    return values.float().repeat_interleave(group_size, dim=1)[:, :columns] if values.shape[1] > 1 else values.float()
