"""Ternary weights in the blocks of GGUF files, the format of llama.cpp.

A row of a weight matrix is cut into blocks of 256 columns (32 for the Q4 types). A block holds one fp16 scale d and
the codes T of its columns, and stands for d * T. Byte by byte:

    TQ2_0, 66 bytes: two parts of 128 columns, and d. In part p, byte j holds the codes c = T + 1 of four columns

          bit   7 6         5 4         3 2         1 0
               +-----------+-----------+-----------+-----------+
               | 128p+96+j | 128p+64+j | 128p+32+j | 128p+j    |    j = 0 ... 31
               +-----------+-----------+-----------+-----------+

    TQ1_0, 54 bytes: five codes in a byte, as digits of a number in base 3, and d. The number
    v = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4 is stored as ceil(256 v / 243), so that a digit is read by multiplying with 3
    and taking what overflows the byte. 32 bytes hold columns 0 to 159 (digit i of byte j is column 32 i + j),
    16 bytes columns 160 to 239 (160 + 16 i + j), 4 bytes columns 240 to 255 (240 + 4 i + j, four digits)

    Q4_0, 18 bytes: d and 16 bytes; byte j holds T + 8 of column j (low bits) and of column 16 + j (high bits)
    Q4_1, 20 bytes: d, a second fp16 number m, and 16 bytes with T + 1; the block stands for d * (T + 1) + m

Q4_0 and Q4_1 waste bits on ternary codes, but hold groups and widths that are no multiple of 256. Q4_1 alone holds
an offset o, as m = o - d rounded to fp16. The two TQ types are those of ggml-org/llama.cpp pull request 8151.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._kernels import unpack_ternary
from .packed import TernaryLinear


@dataclass(frozen=True)
class Block:
    """Columns and bytes of a block, and whether it holds an offset."""

    columns: int
    bytes: int
    offset: bool = False


BLOCKS = {"TQ2_0": Block(256, 66), "TQ1_0": Block(256, 54), "Q4_0": Block(32, 18), "Q4_1": Block(32, 20, True)}
HALF_STEP = 2.0**-11  # the most that rounding to fp16 changes a number within its normal range
_POWERS = (81, 27, 9, 3, 1)
_TQ1_PARTS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))  # first column, bytes, digits


def misfit(layer: TernaryLinear, kind: str) -> str | None:
    """Why the layer's weights cannot be blocks of this kind without a change, `None` if they can.

    What they can be is the same codes with scales rounded to fp16, which the format stores.
    """
    block = BLOCKS[kind]
    if layer.in_features % block.columns:
        return f"its rows of {layer.in_features} columns are not whole blocks of {block.columns}"
    if layer.has_offset and not block.offset:
        return f"its groups have an offset, and {kind} blocks hold only a scale"
    if layer.group_size % block.columns and not layer.per_tensor:
        return f"its groups of {layer.group_size} columns are not whole blocks of {block.columns}"
    scale = layer.scale().float()
    if bool(((scale.half().float() - scale).abs() > HALF_STEP * scale.abs()).any()):
        return "its scales are too large or too small for fp16"
    return None


def layer_blocks(layer: TernaryLinear, kind: str, rows: Tensor | None = None) -> Tensor:
    """The blocks of a layer that fits them: uint8 (out_features, bytes of a row).

    Args:
        kind: a key of `BLOCKS`.
        rows: int64 (out_features,), the order to write the rows in.
    """
    block, columns = BLOCKS[kind], layer.in_features
    codes = unpack_ternary(layer.weight.cpu(), layer.out_features)
    count = columns // block.columns
    parts = [layer.scale(), layer.weight_offset] if layer.has_offset else [layer.scale()]
    if layer.per_tensor:
        parts = [parts[0].float().cpu().expand(layer.out_features, count)]
    else:
        repeats = layer.group_size // block.columns
        parts = [part.float().cpu().repeat_interleave(repeats, 1)[:, :count] for part in parts]
    if rows is not None:
        codes, parts = codes[rows], [part[rows] for part in parts]
    return pack_blocks(codes, kind, *parts)


def pack_blocks(codes: Tensor, kind: str, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Blocks of ternary codes.

    Args:
        codes: int8 (out, in) of -1, 0, 1; `in` is a multiple of the block's columns.
        kind: a key of `BLOCKS`.
        scale, offset: (out, blocks in a row), floating-point.

    Returns:
        uint8 (out, bytes of a row).
    """
    block, half = BLOCKS[kind], scale.to(torch.float16)
    raw = codes.unflatten(1, (-1, block.columns)).add(8 if kind == "Q4_0" else 1).to(torch.uint8)
    if kind == "TQ2_0":
        planes = raw.unflatten(2, (2, 4, 32))
        packed = planes[:, :, :, 0]
        for plane in (1, 2, 3):
            packed = packed | planes[:, :, :, plane] << 2 * plane
        fields = [packed.flatten(2), _bytes(half)]
    elif kind == "TQ1_0":
        fields = [_digits(raw, *part) for part in _TQ1_PARTS] + [_bytes(half)]
    else:
        nibbles = raw[..., :16] | raw[..., 16:] << 4
        low = offset if offset is not None else torch.zeros_like(scale)
        second = [_bytes((low.float() - half.float()).to(torch.float16))] if kind == "Q4_1" else []
        fields = [_bytes(half), *second, nibbles]
    return torch.cat(fields, 2).flatten(1)


def unpack_blocks(data: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes int8 (out, in) and scales fp16 (out, blocks) of TQ2_0 or TQ1_0 blocks, uint8 (out, bytes of a row).

    Raises:
        ValueError: a field holds what no ternary code packs to, or a scale is not finite: the file is damaged.
    """
    blocks = data.unflatten(1, (-1, BLOCKS[kind].bytes))
    scale = blocks[..., -2:].contiguous().view(torch.float16).squeeze(2)
    if kind == "TQ2_0":
        fields = blocks[..., :64].unflatten(2, (2, 32))
        codes = torch.stack([fields >> shift & 3 for shift in (0, 2, 4, 6)], 3).flatten(2)
    else:
        start, parts = 0, []
        for _, width, digits in _TQ1_PARTS:
            parts.append(_undigits(blocks[..., start : start + width], digits))
            start += width
        codes = torch.cat(parts, 2)
    if bool((codes > 2).any()) or not bool(scale.isfinite().all()):
        raise ValueError(f"its {kind} blocks hold what no ternary weight packs to; the file is damaged, copy it again")
    return codes.flatten(1).to(torch.int8) - 1, scale


def _bytes(half: Tensor) -> Tensor:
    """The two bytes of each fp16 number: uint8 (..., 2)."""
    return half[..., None].contiguous().view(torch.uint8)


def _digits(raw: Tensor, first: int, width: int, digits: int) -> Tensor:
    """Bytes that hold `digits` codes each, from column `first` of every block on: uint8 (out, blocks, width)."""
    codes = raw[..., first : first + width * digits].unflatten(2, (digits, width))
    number = sum(codes[:, :, i].to(torch.int32) * _POWERS[i] for i in range(digits))
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _undigits(stored: Tensor, digits: int) -> Tensor:
    powers = torch.tensor([3**i for i in range(digits)], dtype=torch.int16)
    shifted = (stored[:, :, None].to(torch.int16) * powers[:, None]) & 255
    return (shifted * 3 >> 8).flatten(2).to(torch.uint8)
