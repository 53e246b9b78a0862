"""ARB-LLM with row and column scales, ARB-RC (arXiv 2410.03129): binarization by alternating refinement.

BiLLM (`optimum_slim/methods/billm.py`) takes the scales from signs chosen beforehand, and gives the columns of a group
none of their own. ARB-RC writes a group as

    plain        W[n, k] ~ a[n, t] c[t, k] s                          s a sign; the bitmap t says which of two sets
    salient      W[n, k] ~ a[n, 2] c[0, k] s + a[n, 3] c[1, k] s2     a second order, as in BiLLM

and lets row scales, column scales and signs take turns, each at its best for the others, 15 times. Every turn is a
closed form, such as a[n] = sum_k c[k] s W / sum_k c[k]², so that the error never grows. Column scales cost 32 / out
bits a weight, less than the offsets that BiLLM's authors store.

`variant="paper"` is that, with BiLLM's choice of salient columns and of the bitmap, which stays; salient columns are
not split again by a bitmap of their own, for which two bits have no room. The default, `"improved"`, goes on where
BiLLM's does: the bitmap takes part, errors count as outputs feel them, columns are rounded one by one with feedback,
and afterwards all row scales, then all column scales are solved for jointly and every weight moved to its best level
(`optimum_slim/levels.py`). Larger groups pay for the offsets it adds.

Cost: 2 bits for each weight, 64 / group_size for scales, 48 / group_size for offsets if any, and 32 / out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..binarize import assemble, refine, residual_part, split_part
from ..binary_step import BinaryStep
from ..step import register
from .billm import fit_improved, paper_columns, paper_split


@register("arbllm", paper="ARB-LLM: Alternating Refined Binarizations for Large Language Models (arXiv 2410.03129)")
@dataclass(frozen=True, kw_only=True)
class ARBLLM(BinaryStep):
    """Two bits a weight with scales of rows and of columns, fitted in turns.

    Args:
        variant (`str`): `"improved"` or `"paper"`.
        group_size, offset, compensation, iterations, rounds, dampening, asymmetric, sequential, scale_dtype,
        modules_to_not_convert: see `BinaryStep`.
    """

    has_columns = True
    variants: ClassVar[dict[str, tuple]] = {
        "improved": (320, True, "triangular", 8, 3, 0.25, True),
        "paper": (128, False, "triangular", 15, 0, 0.0, False),
    }

    def fit(self, weight, importance, pivots):
        saliency = (weight * pivots).square_()
        if self.variant == "improved":
            return fit_improved(weight, importance, saliency, self.iterations, offset=self.offset, columns=True)
        salient, ones = paper_columns(weight, saliency), torch.ones_like(importance)
        plain, rest = weight[:, ~salient], weight[:, salient]
        split = split_part(plain, paper_split(plain), centred=self.offset, columns=True)
        twice = residual_part(rest, centred=self.offset, columns=True)
        return assemble(
            refine(plain, ones[~salient], split, self.iterations, salient=False, split=False),
            refine(rest, ones[salient], twice, self.iterations, salient=True),
            salient,
        )
