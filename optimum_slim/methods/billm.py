"""BiLLM (arXiv 2402.04291): signs for an ordinary model, with calibration data but without training.

Every row of a weight matrix is cut into groups of 128 columns. In each group a few *salient* columns, those that
matter most for the outputs, are binarized twice; all other weights lie on a bell curve, which one threshold cuts into
many small and few large ones, each set with a magnitude of its own:

    salient      W ~ a0 sign(W) + a1 sign(W - a0 sign(W))
    plain        W ~ a_t sign(W)          t = 0 where |W| is at most the threshold, 1 where it is larger

With H = V Vᵀ the second moments of the inputs, V upper triangular, a weight's saliency is (W[n, k] V[k, k])², and a
column's the sum of those of its weights. The columns still to come make up for the error of a group
(`optimum_slim/binary_step.py`).

`variant="paper"` is that: the number of salient columns, 3 to 30, and the threshold, 0.10 to 0.90 of the largest
weight, are those that approximate the weights best, the columns being compared in first order; its E = (W - B) / H_bb
is taken for what it says, a division by the triangular block. `variant="official"` does what the authors' code does
instead:

                         paper                          official
    searches look at     the weights                    their saliency
    salient columns      3 to 30, first order           1 to 49, second order for all columns
    threshold            share of the largest weight    share of the weights below it (salient ones count as 0)
    signs are those of   the weights                    their difference from the mean, which is stored too
    made up for          all of the error               what a diagonal block would owe

(Where the code's sign of an exact 0 is 0, it is 1 here, and scales are rounded to what is stored at once.) The
default, `"improved"`, stores no more than the paper's and searches harder: each weight finds its own set, numbers and
bits take turns with errors counted as outputs feel them, columns are rounded one by one with feedback, and afterwards
all scales of a row are solved for jointly and every weight moved to its best level (`optimum_slim/levels.py`). Each
layer also makes up for part of what the layers before it have changed (`asymmetric`).

Cost: 2 bits for each weight and 64 / group_size for scales (half a bit), with offsets 48 / group_size more; the
papers count signs alone, about 1.1. Expect large models to take it well and small ones badly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..binarize import assemble, normal_part, part_error, refine, residual_part, split_part
from ..binary_step import BinaryStep
from ..levels import Levels
from ..step import register


COUNTS = (0, 2, 4, 8, 16, 32)  # of salient columns, tried by the improved variant
TRIAL = 3  # iterations before these are compared
PAPER_COUNTS, OFFICIAL_COUNTS = (3, 30), (1, 49)
SHARES = torch.linspace(0.10, 0.90, 81).tolist()


@register(
    "billm", paper="BiLLM: Pushing the Limit of Post-Training Quantization for LLMs (ICML 2024, arXiv 2402.04291)"
)
@dataclass(frozen=True, kw_only=True)
class BiLLM(BinaryStep):
    """Two bits a weight: signs, and for most columns a bitmap of large weights, for the salient ones a second sign.

    Args:
        variant (`str`): `"improved"`, `"paper"`, or `"official"` for what the authors' code computes.
        group_size, offset, compensation, iterations, rounds, dampening, asymmetric, sequential, scale_dtype,
        modules_to_not_convert: see `BinaryStep`.
    """

    variants: ClassVar[dict[str, tuple]] = {
        "improved": (128, False, "triangular", 8, 2, 0.25, True),
        "paper": (128, False, "triangular", 0, 0, 0.0, False),
        "official": (128, True, "diagonal", 0, 0, 0.0, False),
    }

    def fit(self, weight, importance, pivots):
        saliency = (weight * pivots).square_()
        if self.variant == "improved":
            return fit_improved(weight, importance, saliency, self.iterations, offset=self.offset)
        if self.variant == "official":
            salient = official_columns(saliency, centred=self.offset)
            second = official_split(saliency, salient, centred=self.offset)
        else:
            salient = paper_columns(weight, saliency)
            second = paper_split(weight[:, ~salient])
        plain = split_part(weight[:, ~salient], second, centred=self.offset)
        twice = residual_part(weight[:, salient], centred=self.offset)
        return assemble(
            refine(weight[:, ~salient], importance[~salient], plain, self.iterations, salient=False),
            refine(weight[:, salient], importance[salient], twice, self.iterations, salient=True),
            salient,
        )


def fit_improved(
    weight: Tensor,
    importance: Tensor,
    saliency: Tensor,
    iterations: int,
    *,
    offset: bool = False,
    columns: bool = False,
) -> Levels:
    """One group with as many salient columns as give the least error, which each column counts by its importance.

    Args:
        weight: (rows, columns).
        importance: (columns,).
        saliency: (rows, columns); the columns with the largest sums become salient.
        iterations: how often numbers and bits take turns in the end.
        offset, columns: whether to fit offsets and scales of columns.
    """
    order, least, best = saliency.sum(0).argsort(descending=True), float("inf"), None
    for count in COUNTS:
        if count > weight.shape[1] // 2:
            break
        mask = torch.zeros_like(importance, dtype=torch.bool)
        mask[order[:count]] = True
        plain = normal_part(weight[:, ~mask], importance[~mask], offset=offset, columns=columns)
        twice = residual_part(weight[:, mask], offset=offset, columns=columns)
        parts, error = [], 0.0
        for part, where, salient in ((plain, ~mask, False), (twice, mask, True)):
            parts.append(refine(weight[:, where], importance[where], part, TRIAL, salient=salient))
            error += part_error(weight[:, where], importance[where], parts[-1], salient=salient)
        if error < least:
            least, best = error, (parts, mask)
    (plain, twice), mask = best
    rest = max(0, iterations - TRIAL)
    return assemble(
        refine(weight[:, ~mask], importance[~mask], plain, rest, salient=False),
        refine(weight[:, mask], importance[mask], twice, rest, salient=True),
        mask,
    )


def paper_columns(weight: Tensor, saliency: Tensor) -> Tensor:
    """The salient columns, bool (columns,): 3 to 30 of the largest saliency, by the error of the weights.

    Binarizing n weights in first order leaves sum w² - (sum |w|)² / n.
    """
    columns = weight.shape[1]
    order = saliency.sum(0).argsort(descending=True)
    sums = weight.abs()[:, order].cumsum(1, dtype=torch.float64)
    counts = torch.arange(1, columns + 1, device=weight.device)
    gains = (sums.square() / counts).sum(0)
    gains[:-1] += ((sums[:, -1:] - sums[:, :-1]).square() / (columns - counts[:-1])).sum(0)
    first, last = (min(count, max(1, columns - 1)) for count in PAPER_COUNTS)
    salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    salient[order[: first + int(gains[first - 1 : last].argmax())]] = True
    return salient


def paper_split(weight: Tensor) -> Tensor:
    """Which of the plain weights (rows, columns) are large, by the error of binarizing small and large ones apart."""
    sizes = weight.abs()
    largest = sizes.max() if sizes.numel() else 0.0
    return _best_split(SHARES, lambda share: sizes > share * largest, weight, centred=False)


def official_columns(saliency: Tensor, *, centred: bool = True) -> Tensor:
    """The salient columns, bool (columns,), by the error of binarizing the saliency twice, theirs and the others'."""
    columns = saliency.shape[1]
    order = saliency.sum(0).argsort(descending=True)
    ordered, least, best = saliency[:, order], float("inf"), 0
    first, last = (min(count, max(1, columns - 1)) for count in OFFICIAL_COUNTS)
    ones = torch.ones_like(saliency[0])
    for count in range(first, last + 1):
        parts = ordered[:, :count], ordered[:, count:]
        fits = [residual_part(part, centred=centred) for part in parts]
        error = sum(part_error(p, ones[: p.shape[1]], fit, salient=True) for p, fit in zip(parts, fits, strict=True))
        if error < least:
            least, best = error, count
    salient = torch.zeros(columns, dtype=torch.bool, device=saliency.device)
    salient[order[:best]] = True
    return salient


def official_split(saliency: Tensor, salient: Tensor, *, centred: bool = True) -> Tensor:
    """Which of the plain weights are large, by the error of binarizing the saliency of small and large ones apart.

    The thresholds tried are quantiles of the saliency, that of salient columns being 0.
    """
    ordered = (saliency * ~salient).flatten().sort()[0]
    plain = saliency[:, ~salient]
    return _best_split(SHARES, lambda share: plain >= _quantile(ordered, share), plain, centred=centred)


def _best_split(shares, mask_of, weight: Tensor, *, centred: bool) -> Tensor:
    least, best = float("inf"), torch.zeros_like(weight, dtype=torch.bool)
    for share in shares:
        mask = mask_of(share)
        part = split_part(weight, mask, centred=centred)
        error = part_error(weight, torch.ones_like(weight[0]), part, salient=False)
        if error < least:
            least, best = error, mask
    return best


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Linear interpolation between sorted values."""
    position = share * (len(ordered) - 1)
    low = int(position)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], position - low)
