"""Uniform grids with 0 on them, one for each row and group of columns, for weights of 2 to 8 bits.

    W[n, k] ~ scale[n, g] * (code[n, k] - zero[n, g])        code in 0 ... 2^bits - 1,  g = k // group_size

The range of a grid is that of its weights, widened to contain 0 (SparseGPT's and GPTQ's asymmetric min-max quantizer),
so that a dropped weight is exactly 0 on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


SHRINKS = 20


@dataclass(frozen=True)
class AffineGrid:
    """Grids of a matrix (out, in): `scale` and `zero`, fp32 (out, groups); a zero is a code."""

    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        bits: int,
        group_size: int | None = None,
        *,
        scale_dtype: torch.dtype = torch.float16,
        search: bool = False,
        importance: Tensor | None = None,
    ) -> AffineGrid:
        """The grids that span the weights.

        Args:
            weight: (out, in), the dense weights.
            bits: 2 to 8.
            group_size: columns of a row that share a grid; all by default.
            scale_dtype: what scales are stored in; they are rounded to it.
            search: try ranges down to a half and keep, for each grid, the one with the least squared error.
            importance: (in,), what each column's error counts in the search.
        """
        out, columns = weight.shape
        size = columns if group_size is None else min(group_size, columns)
        groups = F.pad(weight, (0, -columns % size)).view(out, ceil(columns / size), size)
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        empty = low == high
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        scale, zero = _span(low, high, bits, scale_dtype)
        if search:
            counts = torch.ones(columns, device=weight.device) if importance is None else importance
            counts = F.pad(counts, (0, -columns % size)).view(-1, size)
            best = _error(groups, scale, zero, bits, counts)
            for step in range(1, SHRINKS):
                part = 1 - step / (2 * SHRINKS)
                tried = _span(part * low, part * high, bits, scale_dtype)
                error = _error(groups, *tried, bits, counts)
                better = error < best
                best = torch.where(better, error, best)
                scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
        return cls(scale, zero, bits, size)

    def column(self, index: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of one column, (out,) each."""
        return self.scale[:, index // self.group_size], self.zero[:, index // self.group_size]

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes, uint8 (out, in)."""
        scale, zero = self._per_column(weight.shape[1])
        return nearest(weight, scale, zero, self.bits).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, fp32 (out, in)."""
        scale, zero = self._per_column(codes.shape[1])
        return scale * (codes.float() - zero)

    def _per_column(self, columns: int) -> tuple[Tensor, Tensor]:
        return tuple(v.repeat_interleave(self.group_size, dim=1)[:, :columns] for v in (self.scale, self.zero))


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes next to the weights, as floats."""
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def _span(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest subnormal number
    scale = ((high - low) / (2**bits - 1)).to(dtype).float().clamp_(min=least)
    return scale, (-low / scale).round_().clamp_(0, 2**bits - 1)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, counts: Tensor) -> Tensor:
    scale, zero = scale[..., None], zero[..., None]
    rounded = scale * (nearest(groups, scale, zero, bits) - zero)
    return ((rounded - groups).square_() * counts).sum(-1)
