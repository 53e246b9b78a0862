"""Binarizing one group of columns: two magnitudes, or two orders of signs, fitted in closed forms.

A *plain* weight is offset[t] + scale[t] c[t, k] s, where the second bit t picks one of two magnitudes. A *salient* one
is offset + scale[0] c[0, k] s + scale[1] c[1, k] s2 (see `optimum_slim/levels.py`). For fixed bits each number is a
small least-squares problem, for fixed numbers the best bit is that of the nearest level, so that the two can take
turns without the error ever growing: Lloyd's algorithm, or the alternating refinement of ARB-LLM (arXiv 2410.03129).
Errors may count differently from column to column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .levels import Levels, nearest_plain, nearest_salient


INNER, OUTER = 0.4528, 1.51  # the best four levels of a standard normal variable lie at plus and minus these


class Part(NamedTuple):
    """The plain or the salient columns of a group.

    Args:
        minus, second: bool (rows, columns), see `Levels`.
        scale: (rows, 2).
        offset: (rows, 2), of salient columns (rows, 1); or `None`.
        columns: (2, columns), or `None`.
    """

    minus: Tensor
    second: Tensor
    scale: Tensor
    offset: Tensor | None = None
    columns: Tensor | None = None


def binarize(weight: Tensor, mask: Tensor | None = None, *, centred: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """First-order binarization of each row: mean + scale * sign(weight - mean).

    Args:
        weight: (rows, columns).
        mask: bool (rows, columns), the weights to look at; all by default.
        centred: subtract the mean; otherwise it is taken to be 0.

    Returns:
        Where the sign is minus, bool (rows, columns), scale and mean, (rows, 1) each.
    """
    if mask is None:
        mask = torch.ones_like(weight, dtype=torch.bool)
    count = mask.sum(1, keepdim=True).clamp_(min=1)
    mean = (weight * mask).sum(1, keepdim=True) / count if centred else weight.new_zeros(len(weight), 1)
    moved = weight - mean
    return moved < 0, (moved.abs() * mask).sum(1, keepdim=True) / count, mean


def residual_part(weight: Tensor, *, centred: bool = False, offset: bool = False, columns: bool = False) -> Part:
    """Second-order binarization of salient columns: that of the weights, then that of what it leaves over."""
    minus, first, mean = binarize(weight, centred=centred)
    left = weight - torch.where(minus, mean - first, mean + first)
    second, size, shift = binarize(left, centred=centred)
    scale, middle = torch.cat([first, size], dim=1), (mean + shift if centred or offset else None)
    return Part(minus, second, scale, middle, weight.new_ones(2, weight.shape[1]) if columns else None)


def split_part(weight: Tensor, second: Tensor, *, centred: bool = False, columns: bool = False) -> Part:
    """Plain columns split by `second`, bool (rows, columns), each of the two sets binarized by itself."""
    (minus, small, low), (other, large, high) = (binarize(weight, m, centred=centred) for m in (~second, second))
    offset = torch.cat([low, high], dim=1) if centred else None
    scale, ones = torch.cat([small, large], dim=1), weight.new_ones(2, weight.shape[1]) if columns else None
    return Part(torch.where(second, other, minus), second, scale, offset, ones)


def normal_part(weight: Tensor, importance: Tensor, *, offset: bool = False, columns: bool = False) -> Part:
    """Plain columns on the levels that are best for a bell curve of their width."""
    total = importance.sum().clamp(min=1e-30)
    mean = (weight @ importance / total)[:, None] if offset else weight.new_zeros(len(weight), 1)
    spread = ((weight - mean).square() @ importance / total).sqrt()[:, None]
    scale, ones = torch.cat([INNER * spread, OUTER * spread], dim=1), weight.new_ones(2, weight.shape[1])
    part = Part(weight < mean, weight < mean, scale, mean.repeat(1, 2) if offset else None, ones if columns else None)
    return _with_nearest_bits(weight, part, salient=False, split=True)


def refine(
    weight: Tensor, importance: Tensor, part: Part, iterations: int, *, salient: bool, split: bool = True
) -> Part:
    """Let numbers and bits take turns; the error never grows.

    Args:
        weight: (rows, columns).
        importance: (columns,), what the error of each column counts.
        part: the start; what it has of offsets and column scales is fitted too.
        split: also choose which of two magnitudes each plain weight has; otherwise that stays.
    """
    for _ in range(iterations if weight.shape[1] else 0):
        part = _refine_salient(weight, importance, part) if salient else _refine_plain(weight, importance, part)
        columns = None if part.columns is None else part.columns.abs()
        part = part._replace(scale=part.scale.abs(), columns=columns)  # the bits take over what was negative
        part = _with_nearest_bits(weight, part, salient=salient, split=split)
    return part


def part_values(part: Part, *, salient: bool) -> Tensor:
    """The weights that a part stands for, (rows, columns)."""
    one, two = _magnitudes(part)
    if salient:
        dense = torch.where(part.minus, -one, one) + torch.where(part.second, -two, two)
        return dense if part.offset is None else dense + part.offset
    size = torch.where(part.second, two, one)
    dense = torch.where(part.minus, -size, size)
    return dense if part.offset is None else dense + torch.where(part.second, part.offset[:, 1:], part.offset[:, :1])


def part_error(weight: Tensor, importance: Tensor, part: Part, *, salient: bool) -> float:
    """The squared error of a part, each column counting its importance."""
    return float(((weight - part_values(part, salient=salient)).square_() @ importance).sum())


def assemble(plain: Part, salient: Part, mask: Tensor) -> Levels:
    """The `Levels` of a group from its plain columns and its salient ones, which `mask`, bool (columns,), tells."""
    minus, second = (plain.minus.new_empty(len(plain.minus), len(mask)) for _ in range(2))
    columns = None if plain.columns is None else plain.columns.new_empty(2, len(mask))
    for part, where in ((plain, ~mask), (salient, mask)):
        minus[:, where], second[:, where] = part.minus, part.second
        if columns is not None:
            columns[:, where] = part.columns
    scale = torch.cat([plain.scale, salient.scale], dim=1)[:, None]
    offset = None if plain.offset is None else torch.cat([plain.offset, salient.offset], dim=1)[:, None]
    return Levels(minus, second, mask, scale, offset, columns, len(mask))


def _magnitudes(part: Part) -> tuple[Tensor, Tensor]:
    one, two = part.scale[:, :1], part.scale[:, 1:]
    return (one, two) if part.columns is None else (one * part.columns[0], two * part.columns[1])


def _with_nearest_bits(weight: Tensor, part: Part, *, salient: bool, split: bool) -> Part:
    one, two = _magnitudes(part)
    if salient:
        bits = nearest_salient(weight, one, two, 0.0 if part.offset is None else part.offset)
        return part._replace(minus=bits[0], second=bits[1])
    low, high = (0.0, 0.0) if part.offset is None else (part.offset[:, :1], part.offset[:, 1:])
    if split:
        minus, second = nearest_plain(weight, one, two, low, high)
        return part._replace(minus=minus, second=second)
    return part._replace(minus=weight < (0.0 if part.offset is None else torch.where(part.second, high, low)))


def _refine_plain(weight: Tensor, importance: Tensor, part: Part) -> Part:
    sign, scale, offset, columns = _signs(part.minus), part.scale.clone(), part.offset, part.columns
    offset = None if offset is None else offset.clone()
    columns = None if columns is None else columns.clone()
    for t, mask in enumerate((~part.second, part.second)):
        x = sign if columns is None else sign * columns[t]
        middle = None if offset is None else offset[:, t]
        scale[:, t], found = _regress(weight, x, mask * importance, scale[:, t], middle)
        if offset is not None:
            offset[:, t] = found
        if columns is not None:
            rest = weight if offset is None else weight - offset[:, t : t + 1]
            columns[t] = _column_scales(rest, sign * scale[:, t : t + 1] * mask, columns[t])
    return part._replace(scale=scale, offset=offset, columns=columns)


def _refine_salient(weight: Tensor, importance: Tensor, part: Part) -> Part:
    signs, scale, offset, columns = (_signs(part.minus), _signs(part.second)), part.scale.clone(), part.offset, None
    counts = importance.expand_as(weight)
    if part.columns is not None:
        columns = part.columns.clone()
    for order in (0, 1):
        x, y = (sign if columns is None else sign * columns[i] for i, sign in enumerate(signs))
        x, other = (x, y * scale[:, 1:]) if order == 0 else (y, x * scale[:, :1])
        if order == 0 and offset is not None:
            scale[:, 0], middle = _regress(weight - other, x, counts, scale[:, 0], offset[:, 0])
            offset = middle[:, None]
            rest = weight - other - offset
        else:
            rest = weight - other if offset is None else weight - other - offset
            scale[:, order], _ = _regress(rest, x, counts, scale[:, order], None)
        if columns is not None:
            columns[order] = _column_scales(rest, signs[order] * scale[:, order : order + 1], columns[order])
    return part._replace(scale=scale, offset=offset, columns=columns)


def _signs(minus: Tensor) -> Tensor:
    return 1 - 2 * minus.float()


def _regress(
    y: Tensor, x: Tensor, counts: Tensor, slope: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The best a and b of y ~ a x + b in each row, b only if there is an offset; rows without counts stay."""
    weighted = counts * x
    xx, xy = (weighted * x).sum(1), (weighted * y).sum(1)
    if offset is None:
        return torch.where(xx > 0, xy / xx, slope), None
    n, sx, sy = counts.sum(1), weighted.sum(1), (counts * y).sum(1)
    determinant = n * xx - sx * sx
    found = torch.where(determinant > 1e-6 * n * xx, (n * xy - sx * sy) / determinant, 0)
    return torch.where(n > 0, found, slope), torch.where(n > 0, (sy - found * sx) / n, offset)


def _column_scales(y: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """The best c, (columns,), of y ~ x c, where x is (rows, columns) with zeros for what is left out."""
    xx, xy = x.square().sum(0), (x * y).sum(0)
    return torch.where(xx > 0, xy / xx, columns)
