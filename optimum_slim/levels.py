"""Weights of two bits on levels of their own for each group of a row, and how to improve them jointly.

The layout of BiLLM and ARB-LLM (drawn in kernels/torch-ext/slim_kernels/binary_reference.py): s is the sign and t the
second bit of a weight, c the scales of columns (ones if there are none), offsets may be missing, g = k // size:

    column k not salient    Q[n, k] = offset[n, g, t] + scale[n, g, t] c[t, k] s
    column k salient        Q[n, k] = offset[n, g, 2] + scale[n, g, 2] c[0, k] s + scale[n, g, 3] c[1, k] s2

A first fit treats one group after the other. Three searches then lower the output error tr((W - Q) H (W - Q)ᵀ) of the
whole layer, H being the (dampened) Gram matrix of its inputs, without changing what is stored:

* `solve_scales`: the best scales and offsets of all groups of a row together, the bits being frozen; least squares.
* `solve_columns`: the best scales of all columns together, all else being frozen; least squares.
* `sweep_bits`: each weight in turn at the best of its four levels, all else being frozen; coordinate descent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


ENTRIES_AT_ONCE = 2**25  # of the normal equations of as many rows as are solved together
RIDGE = 1e-7


@dataclass
class Levels:
    """A matrix (rows, columns) in two bits a weight.

    Args:
        minus, second: bool (rows, columns), true where s is -1, and t; for salient columns, true where s2 is -1.
        salient: bool (columns,).
        scale: fp32 (rows, groups, 4), none negative.
        offset: fp32 (rows, groups, 3), or `None`.
        columns: fp32 (2, columns), none negative, or `None`.
        size: columns of a group; the last may be short.
    """

    minus: Tensor
    second: Tensor
    salient: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: Tensor | None
    size: int

    def expand(self, values: Tensor) -> Tensor:
        """(rows, groups) to (rows, columns)."""
        return values.repeat_interleave(self.size, dim=1)[:, : len(self.salient)]

    def magnitudes(self) -> list[Tensor]:
        """The four scales at each column, (rows, columns) each, or (rows, 1) in a single group without `columns`."""
        if self.columns is None:
            single = self.scale.shape[1] == 1
            return [self.scale[..., i] if single else self.expand(self.scale[..., i]) for i in range(4)]
        return [self.expand(self.scale[..., i]) * self.columns[i % 2] for i in range(4)]

    def middles(self) -> list[Tensor] | None:
        """The three offsets at each column, as `magnitudes`."""
        if self.offset is None:
            return None
        single = self.offset.shape[1] == 1
        return [self.offset[..., i] if single else self.expand(self.offset[..., i]) for i in range(3)]

    def dense(self) -> Tensor:
        """The weight, fp32 (rows, columns), as `binary_dense` computes it from the packed bits."""
        small, large, first, left = self.magnitudes()
        middle = self.middles()
        magnitude = torch.where(self.salient, first, torch.where(self.second, large, small))
        dense = torch.where(self.minus, -magnitude, magnitude)
        if middle is not None:
            dense += torch.where(self.salient, middle[2], torch.where(self.second, middle[1], middle[0]))
        return torch.where(self.salient, dense + torch.where(self.second, -left, left), dense)

    def nearest(self, weight: Tensor) -> Levels:
        """The same levels with the bits of those next to the weights."""
        middle = self.middles() or [0.0, 0.0, 0.0]
        small, large, first, left = self.magnitudes()
        plain = nearest_plain(weight, small, large, middle[0], middle[1])
        salient = nearest_salient(weight, first, left, middle[2])
        minus, second = (torch.where(self.salient, b, a) for a, b in zip(plain, salient, strict=True))
        return self.with_bits(minus, second)

    def with_bits(self, minus: Tensor, second: Tensor) -> Levels:
        return dataclasses.replace(self, minus=minus, second=second)

    def stored(self, dtype: torch.dtype) -> Levels:
        """With all numbers as they will be read back, and none of them negative but offsets."""
        flipped = self.positive()
        largest = max(n.abs().max().item() for n in (flipped.scale, flipped.offset) if n is not None)
        return dataclasses.replace(
            flipped,
            scale=rounded_to(flipped.scale, dtype, largest),
            offset=None if flipped.offset is None else rounded_to(flipped.offset, dtype, largest),
            columns=None if flipped.columns is None else rounded_to(flipped.columns, dtype, 1.0),
        )

    def positive(self) -> Levels:
        """The same weights with no negative scale."""
        minus, second = self.minus, self.second
        for values, row in ((self.scale, True), (self.columns, False)):
            if values is None or not bool((values < 0).any()):
                continue
            negative = values < 0
            parts = [self.expand(negative[..., i]) if row else negative[i % 2] for i in range(4)]
            plain = torch.where(second, parts[1], parts[0])
            minus = minus ^ torch.where(self.salient, parts[2], plain)
            second = second ^ (self.salient & parts[3])
        columns = None if self.columns is None else self.columns.abs()
        return dataclasses.replace(self, minus=minus, second=second, scale=self.scale.abs(), columns=columns)

    @classmethod
    def join(cls, parts: list[Levels]) -> Levels:
        """Single groups side by side; all but the last are of one size."""
        first = parts[0]
        return cls(
            torch.cat([part.minus for part in parts], dim=1),
            torch.cat([part.second for part in parts], dim=1),
            torch.cat([part.salient for part in parts]),
            torch.cat([part.scale for part in parts], dim=1),
            None if first.offset is None else torch.cat([part.offset for part in parts], dim=1),
            None if first.columns is None else torch.cat([part.columns for part in parts], dim=1),
            first.size,
        )


def groups_of(columns: int, size: int) -> list[slice]:
    """The columns of each group; the last may be short."""
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def rounded_to(values: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """Values as they are read back from `dtype`.

    Raises:
        ValueError: that changes a value by more than 1/50 of it and 1/1000 of `largest`.
    """
    rounded = values.to(dtype).to(values.dtype)
    if not ((rounded - values).abs() <= (0.02 * values.abs()).clamp(min=0.001 * largest)).all():
        raise ValueError(
            f"scales of magnitude up to {largest:.3g} are out of the range of {dtype}; "
            'pass scale_dtype="bfloat16" or "float32"'
        )
    return rounded


def nearest_plain(weight: Tensor, small, large, low, high) -> tuple[Tensor, Tensor]:
    """s (true: minus) and t of the nearest of low ± small (t = 0) and high ± large (t = 1)."""
    first, other = weight - low, weight - high
    second = (other.abs() - large).abs_() < (first.abs() - small).abs_()
    return torch.where(second, other, first) < 0, second


def nearest_salient(weight: Tensor, first, left, middle) -> tuple[Tensor, Tensor]:
    """s and s2 (true: minus) of the nearest of middle ± first ± left."""
    weight = weight - middle
    swapped, outer = left > first, weight < 0
    larger = torch.maximum(first, left)
    inner = weight < torch.where(outer, -larger, larger)
    return torch.where(swapped, inner, outer), torch.where(swapped, outer, inner)


def solve_scales(weight: Tensor, hessian: Tensor, levels: Levels) -> Levels:
    """Minimize tr((W - Q) H (W - Q)ᵀ) over all scales and offsets of each row jointly, with the bits frozen.

    The normal equations of a row have 4 (with offsets 7) unknowns for each group. What they hardly determine stays
    near where it is. H may be given by its diagonal, (columns,).
    """
    rows, columns = weight.shape
    groups, kinds = levels.scale.shape[1], 4 if levels.offset is None else 7
    error = weight - levels.dense()
    gradient = error * hessian if hessian.dim() == 1 else error @ hessian
    parts, step, moves = groups_of(columns, levels.size), max(16, ENTRIES_AT_ONCE // (groups * kinds) ** 2), []
    for start in range(0, rows, step):
        basis = _basis(levels, slice(start, start + step))
        matrix = gradient.new_zeros(len(basis), groups, kinds, groups, kinds, dtype=torch.float64)
        right = torch.empty_like(matrix[:, :, :, 0, 0])
        for number, group in enumerate(parts):
            own = basis[:, :, group]
            right[:, number] = (own @ gradient[start : start + step, group, None])[..., 0]
            if hessian.dim() == 1:
                matrix[:, number, :, number] = (own * hessian[group]) @ own.mT
                continue
            product = own @ hessian[group, group.start :]
            for other in range(number, groups):
                shifted = slice(parts[other].start - group.start, parts[other].stop - group.start)
                found = product[:, :, shifted] @ basis[:, :, parts[other]].mT
                matrix[:, number, :, other], matrix[:, other, :, number] = found, found.mT
        matrix = matrix.flatten(3, 4).flatten(1, 2)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += (RIDGE * diagonal.mean(dim=1, keepdim=True)).clamp_(min=1e-30)
        moves.append(torch.linalg.solve(matrix, right.flatten(1)).float().unflatten(1, (groups, kinds)))
    move = torch.cat(moves)
    offset = None if levels.offset is None else levels.offset + move[..., 4:]
    return dataclasses.replace(levels, scale=levels.scale + move[..., :4], offset=offset)


def _basis(levels: Levels, rows: slice) -> Tensor:
    """What each scale and offset is multiplied by, (rows, 4 or 7, columns)."""
    minus, second, salient = levels.minus[rows], levels.second[rows], levels.salient
    sign, other = 1 - 2 * minus.float(), 1 - 2 * second.float()
    plain = ~salient
    masks = [plain & ~second, plain & second, salient.expand_as(second)]
    parts = [sign * masks[0], sign * masks[1], sign * masks[2], other * masks[2]]
    if levels.columns is not None:
        parts = [part * levels.columns[i % 2] for i, part in enumerate(parts)]
    return torch.stack(parts if levels.offset is None else [*parts, *(mask.float() for mask in masks)], dim=1)


def solve_columns(weight: Tensor, hessian: Tensor, levels: Levels) -> Levels:
    """Minimize tr((W - Q) H (W - Q)ᵀ) over the scales of all columns jointly, all else being frozen.

    One system of 2 * columns unknowns for the whole matrix.
    """
    plain = dataclasses.replace(levels, columns=torch.ones_like(levels.columns))
    small, large, first, left = plain.magnitudes()
    sign, other = 1 - 2 * levels.minus.float(), 1 - 2 * levels.second.float()
    zero = sign.new_zeros(())
    factors = [
        torch.where(levels.salient, first, torch.where(levels.second, zero, small)) * sign,
        torch.where(levels.salient, left * other, torch.where(levels.second, large, zero) * sign),
    ]
    gradient = (weight - levels.dense()) @ hessian
    right = torch.cat([(gradient * factor).sum(0) for factor in factors])
    matrix = torch.cat([torch.cat([hessian * (a.T @ b) for b in factors], dim=1) for a in factors]).double()
    diagonal = matrix.diagonal()
    diagonal += (1e-6 * diagonal.mean()).clamp(min=1e-30)
    move = torch.cholesky_solve(right.double()[:, None], torch.linalg.cholesky(matrix)).float().view(2, -1)
    return dataclasses.replace(levels, columns=levels.columns + move)


def sweep_bits(weight: Tensor, hessian: Tensor, levels: Levels, sweeps: int = 2) -> Levels:
    """Coordinate descent: move each weight to the best of its four levels given all others, column after column.

    With D = W - Q, the best value for column k of a row is its present one plus (D H)[k] / H[k, k], rounded to the
    nearest level; no move raises tr(D H Dᵀ).
    """
    dense = levels.dense()
    gradient = ((weight - dense) @ hessian).T.contiguous()
    dense, minus, second = (values.T.contiguous() for values in (dense, levels.minus, levels.second))
    for _ in range(sweeps):
        for number, group in enumerate(groups_of(len(dense), levels.size)):
            column = ColumnLevels(levels, number, group)
            block, before = hessian[group, group].contiguous(), dense[group].clone()
            for k in range(group.start, group.stop):
                moved = dense[k] + gradient[k] / hessian[k, k]
                minus[k], second[k], value = column.nearest(k, moved)
                gradient[group].addr_(block[k - group.start], value - dense[k], alpha=-1)
                dense[k] = value
            change = dense[group] - before
            gradient[: group.start] -= hessian[: group.start, group] @ change
            gradient[group.stop :] -= hessian[group.stop :, group] @ change
    return levels.with_bits(minus.T.contiguous(), second.T.contiguous())


class ColumnLevels:
    """The levels of one group, for rounding its columns one at a time."""

    def __init__(self, levels: Levels, number: int, group: slice):
        self.scale = levels.scale[:, number].T.contiguous()
        self.offset = [0.0] * 3 if levels.offset is None else levels.offset[:, number].T.contiguous()
        self.centred = levels.offset is None
        self.salient, self.start = levels.salient[group].tolist(), group.start
        self.columns = None if levels.columns is None else levels.columns[:, group].T.tolist()

    def nearest(self, index: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, t (or s2) and value of the levels of column `index` next to `weight` (rows,)."""
        k = index - self.start
        one, two = self.scale[2:] if self.salient[k] else self.scale[:2]
        if self.columns is not None:
            one, two = one * self.columns[k][0], two * self.columns[k][1]
        if self.salient[k]:
            minus, second = nearest_salient(weight, one, two, self.offset[2])
            value = torch.where(minus, -one, one)
            value = value if self.centred else value + self.offset[2]
            return minus, second, value + torch.where(second, -two, two)
        minus, second = nearest_plain(weight, one, two, self.offset[0], self.offset[1])
        magnitude = torch.where(second, two, one)
        value = torch.where(minus, -magnitude, magnitude)
        return minus, second, value if self.centred else value + torch.where(second, self.offset[1], self.offset[0])
