"""SparseGPT (arXiv 2301.00774): drop weights one column after the other, the columns to come making up for it.

Removing the weight in column j of a row costs w² / [H_rest⁻¹]_jj in the layer's outputs, if those right of it are then
chosen best, H_rest being the second moments of the inputs j and later. With H = V Vᵀ, V upper triangular:

    score      S[n, j] = (W[n, j] V[j, j])²                                the lowest are dropped
    error      e = (W[:, j] - Q[:, j]) V[j, j]                             Q: 0 where dropped, rounded with `bits`
    update     W[:, k] += (W₀[:, j] - Q[:, j]) V[j, k] / V[k, k]           for all k > j, W₀ being the dense weight

The paper has U = V⁻¹ (H⁻¹ = Uᵀ U) in place of V, and the update W[:, k] -= e U[j, k]. When its turn comes, a column
is the same either way, and V needs no inverse. Before that the paper's counts on the columns between to make up for
what is owed too; where a mask is chosen for several columns at once, a small triangular system gives just that.

Unstructured masks are chosen for blocks of 128 columns at a time, of all rows together, n:m masks group by group, each
from the weights as they are by then. ½ Σ e² is exactly half the output error, tr((W - Q) H (W - Q)ᵀ) / 2.

`variant="paper"` is that, with exact counts. `variant="official"` computes what the authors' code does, operation by
operation: its threshold drops one weight more in each block, and all that equal it. The default, `"improved"`, adds
what measured better, each of which can be switched on and off for any variant:

* `pursuit`: exchange dropped weights for kept ones where that lowers the output error (hard thresholding pursuit).
* `refit`: SparseGPT only ever looks to the right, so that its weights are not the best ones for the mask it found;
  least squares on the final mask gives those (the last step of ALPS, arXiv 2406.07831). With `bits`, the columns are
  then run through once more, the mask being fixed, to round these best weights with feedback.
* `asymmetric`: fit each layer to what it did on the inputs of the unslimmed model (GPTAQ, arXiv 2504.02692).
* `allocation="owl"`: drop fewer weights where outliers are many (OWL, arXiv 2310.05175), for shares.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..affine import AffineGrid, nearest
from ..hessian import MAX_DAMPENING, Hessian
from ..least_squares import pursue, refit
from ..sparse_step import SparseStep
from ..sparsity import Pattern, lowest, lowest_along, select
from ..step import register


DECIDED = ("pursuit", "refit", "asymmetric", "sequential")
VARIANTS = {"improved": (5, 10, 0.25, True), "paper": (0, 0, 0.0, False), "official": (0, 0, 0.0, False)}
LEAF = 16  # columns eliminated one by one before their updates are put together


@register(
    "sparsegpt",
    paper="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (ICML 2023, arXiv 2301.00774)",
)
@dataclass(frozen=True, kw_only=True)
class SparseGPT(SparseStep):
    """Drop weights by their effect on the outputs, the remaining ones making up for it.

    Args:
        variant (`str`): `"improved"`, `"paper"`, or `"official"` for what the authors' code computes. It decides the
            fields below that are not given.
        blocksize (`int`): columns for which an unstructured mask is chosen together.
        dampening (`float`): share of the mean diagonal added to that of the Gram matrix; raised tenfold, up to 1, for
            as long as the matrix cannot be factorized.
        pursuit (`int`): most rounds by which the mask is improved.
        refit (`int`): most steps of conjugate gradients by which the kept weights are fitted to the final mask; with
            0 they stay SparseGPT's own.
        asymmetric (`float`): how far each layer's target moves from its own weights to those that do on the inputs
            behind the pruned layers what the layer did in the unslimmed model; 0 for the paper, 1 for all the way.
        sequential (`bool`): measure the inputs of each layer behind what was pruned before it in the same decoder
            layer; or all of a decoder layer at once, as the paper does.
        sparsity, bits, group_size, allocation, owl_threshold, owl_band, layers, packed, shares,
        modules_to_not_convert: see `SparseStep`.

    A layer that saw fewer than 128 tokens is pruned by magnitude, and its row of the report says so.
    """

    variant: str = "improved"
    blocksize: int = 128
    dampening: float = 0.01
    pursuit: int | None = None
    refit: int | None = None
    asymmetric: float | None = None
    sequential: bool | None = None

    needs_data = True
    accepts_unseen = True
    fewest_tokens = 128

    def __post_init__(self):
        super().__post_init__()
        pattern = Pattern.parse(self.sparsity)
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, found {self.variant!r}")
        for name, default in zip(DECIDED, VARIANTS[self.variant], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if (
            type(self.blocksize) is not int
            or self.blocksize < max(1, pattern.of)
            or self.blocksize % max(1, pattern.of)
        ):
            raise ValueError(
                f"blocksize must be a positive integer and a multiple of m in 'n:m', found {self.blocksize!r}"
            )
        if not 0 < self.dampening <= MAX_DAMPENING:
            raise ValueError(f"dampening must be above 0 and at most {MAX_DAMPENING}, found {self.dampening!r}")
        for name in ("pursuit", "refit"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer of at least 0, found {getattr(self, name)!r}")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric must lie in [0, 1], found {self.asymmetric!r}")

    def usual_allocation(self, pattern):
        return "owl" if self.variant == "improved" and not pattern.of and self.shares is None else "uniform"

    def share(self, group) -> Hessian | Tensor | None:
        if group.tokens < self.fewest_tokens:
            return None
        return group.gram if self.variant == "official" else Hessian(group.gram, self.dampening)

    def replace(self, model, name, group=None, shared=None, target=None) -> dict[str, Any]:
        row = super().replace(model, name, group, shared, target)
        if isinstance(shared, Hessian) and shared.dampening > self.dampening:
            row["note"] = f"dampening raised to {shared.dampening:g}"
        return row

    def prune(self, weight: Tensor, shared: Hessian | Tensor | None) -> tuple[Tensor, Tensor]:
        pruned, mask, _ = self._prune(weight, shared)
        return pruned, mask

    def prune_to_codes(self, weight: Tensor, shared: Hessian | Tensor | None) -> tuple[Tensor, Tensor, AffineGrid]:
        if shared is None:
            return super().prune_to_codes(weight, shared)
        if not (self.pursuit or self.refit):
            grid = AffineGrid.fit(weight, self.bits, self.group_size)
            pruned, mask, _ = self._prune(weight, shared, grid)
            return grid.codes(pruned), mask, grid
        pruned, mask, hessian = self._prune(weight, shared)
        grid = AffineGrid.fit(pruned, self.bits, self.group_size, search=True)
        pruned, mask, _ = eliminate(pruned, hessian, Pattern.parse(self.sparsity), self.blocksize, grid, mask)
        return grid.codes(pruned), mask, grid

    def _prune(self, weight, shared, grid: AffineGrid | None = None) -> tuple[Tensor, Tensor, Hessian | None]:
        pattern, hessian = Pattern.parse(self.sparsity), shared
        if shared is None:
            mask = select(weight.abs(), pattern)
            return weight.masked_fill(mask, 0), mask, None
        if self.variant == "official":
            pruned, mask = official(weight, shared, pattern, self.blocksize, self.dampening, grid)
            hessian = Hessian(shared, self.dampening) if self.pursuit or self.refit else None
        else:
            pruned, mask, _ = eliminate(weight, shared, pattern, self.blocksize, grid)
        if self.pursuit or self.refit:
            weight = weight.masked_fill(hessian.dead, 0)
        if self.pursuit:
            choose = functools.partial(select, pattern=pattern)
            pruned, mask = pursue(pruned, weight, mask, hessian.matrix, choose, self.pursuit)
        if self.refit:
            pruned = refit(pruned, weight, mask, hessian.matrix, self.refit)
        return pruned, mask, hessian


def eliminate(
    weight: Tensor,
    hessian: Hessian,
    pattern: Pattern,
    blocksize: int = 128,
    grid: AffineGrid | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """SparseGPT on one matrix.

    The columns are halved again and again: the left half is done, its changes are passed on to the right half by one
    matrix product, then the right half is done. Every weight is read and written log2(in) times rather than in times.

    Args:
        weight: (out, in).
        pattern: what to drop.
        blocksize: columns for which an unstructured mask is chosen together.
        grid: rounds the kept weights.
        mask: bool (out, in), a mask given beforehand in place of one chosen by `pattern`.

    Returns:
        The pruned weight (out, in), the mask (true: dropped), and ½ Σ e², half of tr((W - Q) H (W - Q)ᵀ).
    """
    run = _Elimination(weight, hessian, pattern, blocksize, grid, mask)
    run.solve(0, len(run.columns))
    loss = 0.5 * float(run.losses.sum(dtype=torch.float64))
    return run.columns.T.contiguous(), run.dropped.T.contiguous(), loss


class _Elimination:
    """The state of `eliminate`, and its recursion. (Nested functions that call themselves would keep it alive.)"""

    def __init__(self, weight, hessian, pattern, blocksize, grid, mask):
        self.pattern, self.blocksize, self.grid, self.given = pattern, blocksize, grid, mask is not None
        self.columns = weight.masked_fill(hessian.dead, 0).T.contiguous()  # one row for each column of the weight
        self.deltas = self.columns.clone()  # the dense weight; less what is kept, once a column is done
        self.factor, self.diagonal = hessian.factor, hessian.factor.diagonal()
        self.passed_on, self.pivots = hessian.factor / self.diagonal, self.diagonal.tolist()
        self.losses = torch.zeros_like(self.diagonal)
        self.dropped = mask.T.contiguous() if self.given else torch.zeros_like(self.columns, dtype=torch.bool)
        self.leaf_size = min(blocksize, max(1, LEAF // max(1, pattern.of)) * max(1, pattern.of))

    def choose(self, start: int, stop: int) -> None:
        """Choose the mask of these columns."""
        block, pivot, dense = slice(start, stop), self.diagonal[start:stop, None], self.deltas[start:stop]
        owed = (self.columns[block] - dense).mul_(pivot)
        ahead = torch.linalg.solve_triangular(self.factor[block, block].T, owed, upper=False).add_(dense)
        scores, pattern = ahead.mul_(pivot).square_(), self.pattern
        if pattern.of:
            self.dropped[block] = lowest_along(scores, max(0, stop - start - pattern.keep), dim=0)
        else:
            rows = scores.shape[1]
            self.dropped[block] = lowest(scores, pattern.dropped(rows, stop) - pattern.dropped(rows, start))

    def leaf(self, start: int, stop: int) -> None:
        """Do these columns one by one."""
        columns, grid = self.columns, self.grid
        for j in range(start, stop):
            if not self.given and self.pattern.of and j % self.pattern.of == 0:
                self.choose(j, min(j + self.pattern.of, len(columns)))
            kept = columns[j]
            if grid is not None:
                scale, zero = grid.column(j)
                kept = nearest(kept, scale, zero, grid.bits).sub_(zero).mul_(scale)
            kept = kept.masked_fill(self.dropped[j], 0)
            error = torch.sub(columns[j], kept).mul_(self.pivots[j])
            torch.dot(error, error, out=self.losses[j])
            columns[j] = kept
            self.deltas[j] -= kept
            columns[j + 1 : stop].addr_(self.passed_on[j, j + 1 : stop], self.deltas[j])

    def solve(self, start: int, stop: int, in_block: bool = False) -> None:
        """Do these columns, halving them until they are a leaf."""
        if not in_block and stop - start <= self.blocksize:
            in_block = True
            if not self.given and not self.pattern.of:
                self.choose(start, stop)
        unit = self.leaf_size if in_block else self.blocksize
        if stop - start <= unit:
            self.leaf(start, stop)
            return
        middle = start + math.ceil((stop - start) / unit) // 2 * unit
        self.solve(start, middle, in_block)
        self.columns[middle:stop].addmm_(self.passed_on[start:middle, middle:stop].T, self.deltas[start:middle])
        self.solve(middle, stop, in_block)


def official(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    blocksize: int = 128,
    dampening: float = 0.01,
    grid: AffineGrid | None = None,
) -> tuple[Tensor, Tensor]:
    """SparseGPT as the authors' code computes it, in the same order of operations.

    Where it differs from the paper: a block drops all weights with a score up to that of rank int(share * count),
    which is one more than the share says, and ties besides; H is inverted; no second try with more dampening.

    Args and returns as for `eliminate`, with the Gram matrix in place of its factors.
    """
    weight, hessian = weight.clone(), gram.float() * 2
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    dropped = torch.zeros_like(weight, dtype=torch.bool)
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    try:
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the Gram matrix is not positive definite with a dampening of {dampening:g}; raise it, use more "
            "calibration samples, or another variant, which raises it as needed"
        ) from error
    for start in range(0, weight.shape[1], blocksize):
        stop = min(start + blocksize, weight.shape[1])
        block, factor = weight[:, start:stop].clone(), inverse[start:stop, start:stop]
        errors, mask = torch.zeros_like(block), torch.zeros_like(block, dtype=torch.bool)
        if not pattern.of:
            scores = block**2 / factor.diagonal().reshape(1, -1) ** 2
            mask = scores <= scores.flatten().sort()[0][int(scores.numel() * pattern.share)]
        for j in range(stop - start):
            if pattern.of and j % pattern.of == 0:
                group = slice(j, min(j + pattern.of, stop - start))
                scores = block[:, group] ** 2 / factor.diagonal()[group].reshape(1, -1) ** 2
                count = max(0, scores.shape[1] - pattern.keep)
                mask.scatter_(1, j + torch.topk(scores, count, dim=1, largest=False)[1], True)
            column = block[:, j]
            kept = column.clone()
            kept[mask[:, j]] = 0
            if grid is not None:
                scale, zero = grid.column(start + j)
                kept = scale * (nearest(kept, scale, zero, grid.bits) - zero)
            error = (column - kept) / factor[j, j]
            block[:, j:] -= error.unsqueeze(1).matmul(factor[j, j:].unsqueeze(0))
            block[:, j], errors[:, j] = kept, error
        weight[:, start:stop], dropped[:, start:stop] = block, mask
        weight[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    return weight, dropped
