"""Magnitude pruning: the smallest weights go, and nothing makes up for them.

The baseline of this field (Han et al., arXiv 1506.02626; Zhu and Gupta, arXiv 1710.01878), by layer: of each weight
matrix the share with the smallest |w| is dropped, or of every group what n:m asks for. It needs no data and costs
nothing; on language models it is far behind the methods that look at the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..sparse_step import SparseStep
from ..sparsity import Pattern, select
from ..step import register


@register("magnitude", paper="Learning both Weights and Connections for Efficient Neural Networks (arXiv 1506.02626)")
@dataclass(frozen=True, kw_only=True)
class Magnitude(SparseStep):
    """Drop the smallest weights of each layer. The fields are those of `SparseStep`."""

    def prune(self, weight, shared=None):
        mask = select(weight.abs(), Pattern.parse(self.sparsity))
        return weight.masked_fill(mask, 0), mask
