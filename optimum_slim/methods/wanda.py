"""Wanda (arXiv 2306.11695): a weight counts as much as it moves the output, |w| times the norm of its input.

    S[n, k] = |W[n, k]| * ||x_k||₂

Scores are compared within each output row: int(sparsity * in) weights of a row go, or of every group what n:m asks.
The other weights stay as they are; `refit` solves for them by least squares on the calibration tokens, which the paper
does not do. A layer that saw no token is pruned by magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hessian import Hessian
from ..least_squares import refit
from ..sparse_step import SparseStep
from ..sparsity import Pattern, select
from ..step import register


@register("wanda", paper="A Simple and Effective Pruning Approach for Large Language Models (ICLR 2024, 2306.11695)")
@dataclass(frozen=True, kw_only=True)
class Wanda(SparseStep):
    """Drop the weights that move the outputs least, row by row.

    Args:
        refit (`int`): steps of conjugate gradients by which the kept weights make up for the dropped ones.
        sequential (`bool`): measure the inputs of each layer behind what was pruned before it in the same decoder
            layer; or all of a decoder layer at once, as the official code does.
        sparsity, bits, group_size, allocation, owl_threshold, owl_band, layers, packed, shares,
        modules_to_not_convert: see `SparseStep`.
    """

    refit: int = 0
    sequential: bool = False

    needs_data = True
    accepts_unseen = True

    def prune(self, weight, shared):
        scores = weight.abs()
        if shared.tokens:
            scores *= shared.gram.diagonal().sqrt()
        mask = select(scores, Pattern.parse(self.sparsity), by_row=True)
        pruned = weight.masked_fill(mask, 0)
        if self.refit and shared.tokens:
            pruned = refit(pruned, weight, mask, Hessian(shared.gram).matrix, self.refit)
        return pruned, mask

    def share(self, group):
        return group

    def layout(self, out_features, in_features):
        pattern = Pattern.parse(self.sparsity)
        if pattern.of:
            return super().layout(out_features, in_features)
        return "rows", in_features - int(pattern.share * in_features)
