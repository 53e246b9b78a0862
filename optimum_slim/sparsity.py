"""Which weights are dropped: patterns, exact counts, and how much each decoder layer gives up.

A pattern is a share of all weights, such as 0.5, or "n:m": n of every m neighbouring columns of a row are kept, as in
NVIDIA's 2:4. Counts are exact whatever ties there are: constant rows and dead inputs all score 0, and a threshold
would drop every one of them.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """`share` of all weights is dropped; or `keep` of every `of` neighbouring columns are kept (else `of` is 0)."""

    share: float
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, sparsity: float | str) -> "Pattern":
        """A pattern from a share between 0 and 1 or from "n:m".

        Raises:
            ValueError: neither of the two.
        """
        if isinstance(sparsity, str):
            parts = sparsity.split(":")
            if len(parts) == 2 and all(part.isdecimal() for part in parts):
                keep, of = map(int, parts)
                if 0 < keep < of <= 64:
                    return cls(1 - keep / of, keep, of)
        elif not isinstance(sparsity, bool) and isinstance(sparsity, int | float) and 0 < sparsity < 1:
            return cls(float(sparsity))
        raise ValueError(
            f"sparsity is the share of weights to drop, above 0 and below 1, or 'n:m' to keep n of every m columns "
            f"(as in '2:4'); found {sparsity!r}"
        )

    @property
    def has_positions(self) -> bool:
        """Whether 2-bit positions say which columns are kept in fewer bits than, or as few as, a bitmask."""
        return self.of == 4 and self.keep <= 2

    def dropped(self, rows: int, columns: int) -> int:
        """Weights that a share drops of a matrix, or of its first `columns` columns: rounded here and nowhere else."""
        return int(self.share * rows * columns)

    def kept_in_row(self, columns: int) -> int:
        """Columns that an n:m pattern keeps in a row."""
        return columns // self.of * self.keep + min(self.keep, columns % self.of)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest entries of a matrix, of equal ones the first, whole-matrix order being row by row."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count <= 0:
        return mask
    threshold = scores.flatten().kthvalue(min(count, scores.numel())).values
    torch.lt(scores, threshold, out=mask)
    missing = count - int(mask.sum())
    ties = (scores == threshold).flatten().nonzero()[:missing, 0]
    mask.view(-1)[ties] = True
    return mask


def lowest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest entries of every row, of equal ones the first."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def lowest_along(scores: Tensor, count: int, dim: int) -> Tensor:
    """Mask of the `count` lowest entries along a dimension, of equal ones the first.

    Along up to 8 entries every pair is compared, which is many times faster than sorting.
    """
    if scores.shape[dim] > 8:
        order = scores.argsort(dim=dim, stable=True).narrow(dim, 0, count)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, order, True)
    parts = scores.unbind(dim)
    ranks = [torch.zeros_like(part, dtype=torch.uint8) for part in parts]
    for first, second in combinations(range(len(parts)), 2):
        swapped = parts[second] < parts[first]
        ranks[first] += swapped
        ranks[second] += ~swapped
    return torch.stack([rank < count for rank in ranks], dim)


def lowest_in_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    """Mask of what n:m drops: in every row all but the `keep` highest of each `of` neighbouring columns.

    A last, short group keeps `keep` columns too, or all it has.
    """
    padding = -scores.shape[1] % of
    groups = F.pad(scores, (0, padding), value=-torch.inf).unflatten(1, (-1, of))
    return lowest_along(groups, of - keep, dim=-1).flatten(1)[:, : scores.shape[1]]


def select(scores: Tensor, pattern: Pattern, *, by_row: bool = False) -> Tensor:
    """Mask of the weights that `pattern` drops from a whole matrix of scores (out, in).

    Args:
        by_row: An unstructured pattern compares within each row and drops int(share * in) of it.
    """
    if pattern.of:
        return lowest_in_groups(scores, pattern.keep, pattern.of)
    if by_row:
        return lowest_in_rows(scores, int(pattern.share * scores.shape[1]))
    return lowest(scores, pattern.dropped(*scores.shape))


def outlier_ratio(scores: list[Tensor], threshold: float) -> float:
    """Share of the scores of one decoder layer's matrices above `threshold` times their mean (OWL, Section 3.2)."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > threshold * mean).sum()) for score in scores) / count


def owl_shares(ratios: list[float], sizes: list[int], share: float, band: float) -> tuple[float, ...]:
    """How much each decoder layer gives up: less where outliers are many (OWL, arXiv 2310.05175, Section 3.3).

    The ratios are spread over a band of width 2 * `band`, and the mean over all weights stays `share`, unless a share
    must be cut off at 0.01 or 0.99. Equal ratios give equal shares. Shares are written out with 4 digits.

    Args:
        ratios: Outlier ratio of each layer.
        sizes: Number of weights of each layer.
    """
    low, high = min(ratios), max(ratios)
    spread = [2 * band * (ratio - low) / (high - low) if high > low else 0.0 for ratio in ratios]
    mean = sum(s * size for s, size in zip(spread, sizes, strict=True)) / sum(sizes)
    return tuple(round(min(max(share - (s - mean), 0.01), 0.99), 4) for s in spread)
