"""Ternary weights on grids, one scale and one offset for each group of a row, and how to improve them jointly.

    Q[n, k] = scale[n, k // size] * T[n, k] + offset[n, k // size]

A first fit treats one group after the other. Two searches over the whole row then lower the output error
tr((W - Q) H (W - Q)^T), H being the (dampened) Gram matrix of the layer's inputs, without changing what is stored:

* `solve_grids`: the best scales and offsets of all groups together, the codes T being frozen; linear least squares.
* `sweep_codes`: each code in turn at the best of its three values, all else being frozen; coordinate descent.

Rows do not depend on one another, so both run on all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Grid:
    """How scales and offsets are laid out: columns per group, and the dtype they are stored in."""

    size: int
    dtype: torch.dtype

    def groups(self, columns: int) -> list[slice]:
        """The columns of each group; the last may be short."""
        return [slice(start, min(start + self.size, columns)) for start in range(0, columns, self.size)]

    def expand(self, values: Tensor, columns: int) -> Tensor:
        """(rows, groups) to (rows, columns)."""
        return values.repeat_interleave(self.size, dim=1)[:, :columns]

    def weight(self, scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
        """The dense weight, (rows, columns)."""
        columns = codes.shape[1]
        return self.expand(scale, columns) * codes + self.expand(offset, columns)

    def stored(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset as they will be read back, so that later columns can make up for their rounding."""
        rounded = [value.to(self.dtype).to(value.dtype) for value in (scale, offset)]
        lost = sum((a - b).abs() for a, b in zip(rounded, (scale, offset), strict=True))
        if not (lost <= 0.02 * (scale.abs() + offset.abs())).all():
            largest = max(scale.abs().max().item(), offset.abs().max().item())
            raise ValueError(
                f"scales and offsets (of magnitude up to {largest:.3g}) are out of the range of {self.dtype}; "
                'pass scale_dtype="bfloat16" or "float32"'
            )
        return rounded[0], rounded[1]


def solve_grids(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize tr((W - Q) H (W - Q)^T) over all scales and offsets of each row jointly, with the codes frozen.

    The normal equations of a row have 2 * groups unknowns. Returns scale and offset (rows, groups) as stored, and the
    codes, with the sign turned where a scale came out negative.
    """
    rows, columns = codes.shape
    groups = grid.groups(columns)
    member = torch.zeros(columns, len(groups), device=codes.device)  # 1 where a column belongs to a group
    for number, group in enumerate(groups):
        member[group, number] = 1
    ones = member.T @ hessian @ member
    scales, offsets = [], []
    for part in range(0, rows, ROWS_AT_ONCE):
        t, target = codes[part : part + ROWS_AT_ONCE], weight[part : part + ROWS_AT_ONCE] @ hessian
        matrix = torch.empty(len(t), 2, len(groups), 2, len(groups), dtype=torch.float64, device=codes.device)
        for number, group in enumerate(groups):
            product = t[:, group] @ hessian[group]
            matrix[:, 0, number, 0] = (product * t) @ member
            matrix[:, 0, number, 1] = product @ member
        matrix[:, 1, :, 0] = matrix[:, 0, :, 1].transpose(1, 2)
        matrix[:, 1, :, 1] = ones
        matrix = matrix.flatten(3, 4).flatten(1, 2)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += 1e-7 * diagonal.mean(dim=1, keepdim=True)  # groups whose codes are all equal
        right = torch.cat([(target * t) @ member, target @ member], dim=1).double()
        solution = torch.linalg.solve(matrix, right).float()
        scales.append(solution[:, : len(groups)])
        offsets.append(solution[:, len(groups) :])
    scale, offset = torch.cat(scales), torch.cat(offsets)
    codes = torch.where(grid.expand(scale, columns) < 0, -codes, codes)
    return *grid.stored(scale.abs(), offset), codes


def sweep_codes(
    weight: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, grid: Grid, sweeps: int = 2
) -> Tensor:
    """Coordinate descent: move each code to the best of its three values given all others, column after column.

    With D = W - Q, the best value for column k of a row is its present one plus (D H)[k] / H[k, k], rounded to the
    grid; no move raises tr(D H D^T). Returns the new codes, (rows, columns).
    """
    codes = codes.T.contiguous()
    gradient = ((weight - grid.weight(scale, offset, codes.T)) @ hessian).T.contiguous()
    for _ in range(sweeps):
        for number, group in enumerate(grid.groups(len(codes))):
            step = scale[:, number]
            per_code = torch.where(step > 0, 1 / step, 0)
            block, before = hessian[group, group].contiguous(), codes[group].clone()
            for k in range(group.start, group.stop):
                moved = codes[k] + gradient[k] * (per_code / hessian[k, k])
                change = moved.round_().clamp_(-1, 1) - codes[k]
                codes[k] += change
                gradient[group].addr_(block[k - group.start], change * step, alpha=-1)
            change = (codes[group] - before) * step
            gradient[: group.start] -= hessian[: group.start, group] @ change
            gradient[group.stop :] -= hessian[group.stop :, group] @ change
    return codes.T
