"""Depth pruning: whole decoder layers are dropped.

Layers late in a model change the residual stream little, so that a block of them can go with little harm (Gromov et
al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887). What is left is an ordinary model with
fewer layers. How the layers are chosen:

* `angular`: the block of n layers with the least angular distance between its input and output (`distance.py`);
* `deepest`: the last n layers before the final one, the paper's simple rule, which needs healing afterwards;
* `block_influence`: the n layers of least block influence, anywhere (ShortGPT, arXiv 2403.03853);
* `perplexity`: one by one, the layer whose removal raises the calibration loss least (SLEB, arXiv 2402.09025).

The final layer is kept by the first two, as the paper asks. Follow with `Heal`, or close the gap without training by
`linear_patch` (`patch.py`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from ..distance import angular_distances, block_influence, last_token_states
from ..layer_loss import losses_without
from ..patch import fit_patches, merge_patch
from ..processes import from_main
from ..step import Step, StepReport, register
from ..surgery import drop_layers
from ..walk import decoder_layers, skipping


METRICS = ("angular", "deepest", "block_influence", "perplexity")


@register("depth", paper="The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887)")
@dataclass(frozen=True, kw_only=True)
class Depth(Step):
    """Drop whole decoder layers, chosen by angular distance, depth, block influence or perplexity, or given.

    Args:
        drop (`int` or `float`): how many layers, or which fraction of them, between 0 and 1.
        metric (`str`): `"angular"`, `"deepest"`, `"block_influence"` or `"perplexity"`.
        layers (`tuple[int]`, *optional*): the layers to drop, 0-based; then nothing is measured.
        linear_patch (`bool`): merge the least-squares linear map that stands in for the dropped layers into the layer
            before them (ReplaceMe, arXiv 2505.02819). Needs calibration data and no training.
        patch_ridge (`float`): pull of that map towards the identity.

    Raises:
        `ValueError`: no such number of layers in the model, or layers its config cannot do without.
    """

    drop: int | float | None = None
    metric: str = "angular"
    layers: tuple[int, ...] | None = None
    linear_patch: bool = False
    patch_ridge: float = 1e-3

    before_packing: ClassVar[bool] = True

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, found {self.metric!r}")
        if self.layers is not None:
            layers = tuple(self.layers)
            if not layers or len(set(layers)) != len(layers) or any(type(i) is not int or i < 0 for i in layers):
                raise ValueError(f"layers must be different 0-based layer numbers, found {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if self.drop is None and self.layers is None:
            raise ValueError("depth needs to know what to drop; pass Depth(drop=4), Depth(drop=0.25) or layers=(...)")
        whole = type(self.drop) is int and self.drop >= 1
        part = type(self.drop) is float and 0 < self.drop < 1
        if self.drop is not None and not (whole or part):
            raise ValueError(f"drop must be a number of layers or a fraction between 0 and 1, found {self.drop!r}")
        if whole and self.layers is not None and len(self.layers) != self.drop:
            raise ValueError(f"drop={self.drop} and {len(self.layers)} layers were given; pass one of the two")
        if not self.patch_ridge >= 0:
            raise ValueError(f"patch_ridge must not be negative, found {self.patch_ridge!r}")

    @property
    def needs_data(self) -> bool:
        return self.linear_patch or (self.layers is None and self.metric != "deepest")

    def count(self, total: int) -> int:
        """How many of `total` layers are dropped."""
        if self.layers is not None:
            return len(self.layers)
        return self.drop if isinstance(self.drop, int) else round(self.drop * total)

    def resolve(self, model: nn.Module) -> Depth:
        """The step with its layers written out, where no data is needed to know them."""
        total = len(decoder_layers(model)[1])
        count = self.count(total)
        if count < 1:
            raise ValueError(f"drop={self.drop} of {total} layers is less than one layer; pass a larger fraction")
        if count >= total:
            raise ValueError(f"{count} of {total} layers cannot be dropped; at least one must stay")
        if self.layers is not None and self.layers[-1] >= total:
            raise ValueError(f"layers={self.layers}: the model has layers 0 to {total - 1}")
        if self.linear_patch and count == total - 1 and self.layers is None:
            raise ValueError("linear_patch keeps the layer before the dropped ones and the last; drop fewer layers")
        if self.layers is None and self.metric == "deepest":
            return dataclasses.replace(self, layers=tuple(range(total - 1 - count, total - 1)))
        return self

    def sketch(self, model: nn.Module) -> None:
        total = len(decoder_layers(model)[1])
        step = self.resolve(model)
        drop_layers(model, step.layers or range(total - 1 - step.count(total), total - 1))

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start, (prefix, stack) = time.perf_counter(), decoder_layers(model)
        total, step = len(stack), self.resolve(model)
        values, tables, why = {}, {}, "as given" if self.metric != "deepest" else "the deepest but the last"
        if step.layers is None:
            layers, values, tables, why = from_main(step._choose(model, tokens))
            step = dataclasses.replace(step, layers=layers)
        gaps = runs(step.layers)
        patches = fit_patches(model, tokens, gaps, ridge=self.patch_ridge) if self.linear_patch else []
        patched = [model.get_submodule(patch.name) for patch in patches]
        rows = [{"name": f"{prefix}.{i}", "parameters": _size(stack[i]), **values.get(i, {})} for i in step.layers]
        drop_layers(model, step.layers)
        for module, patch in zip(patched, patches, strict=True):
            merge_patch(module, patch)
        spans = ", ".join(str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in gaps)
        notes = [f"dropped {len(step.layers)} of {total} decoder layers: {spans} ({why})"]
        notes += [f"{patch.name}: linear patch leaves {patch.left:.1%} of the gap's energy" for patch in patches]
        return StepReport(step.to_dict(), time.perf_counter() - start, rows, notes, tables)

    def _choose(self, model, tokens) -> tuple[tuple[int, ...], dict[int, dict], dict, str]:
        """The layers to drop by the metric, figures of single layers, tables for the report, and the reason."""
        total = len(decoder_layers(model)[1])
        count, first = self.count(total), int(self.linear_patch)
        if self.metric == "angular":
            table = angular_distances(last_token_states(model, tokens))
            start = min(range(first, total - count), key=lambda first: table[first, first + count].item())
            why = f"angular distance {table[start, start + count].item():.4f}"
            rounded = [[round(x, 6) for x in row] for row in table.tolist()]
            return tuple(range(start, start + count)), {}, {"angular_distance": rounded}, why
        if self.metric == "block_influence":
            influence = block_influence(model, tokens).tolist()
            layers = sorted(sorted(range(first, total), key=influence.__getitem__)[:count])
            values = {i: {"block_influence": influence[i]} for i in layers}
            return tuple(layers), values, {"block_influence": influence}, "least block influence"
        order, losses = greedy_order(model, tokens, count, range(first, total))
        values = {i: {"perplexity_without": loss} for i, loss in zip(order, losses, strict=True)}
        return tuple(sorted(order)), values, {}, f"least perplexity without them, {losses[-1]:.4g}"


def greedy_order(model: nn.Module, tokens: Tensor, count: int, candidates) -> tuple[list[int], list[float]]:
    """SLEB: the layers whose removal hurts least, one after the other, and the perplexity after each removal.

    Args:
        tokens: int64 (samples, length); perplexity is measured on each sample by itself.
    """
    stack, left = decoder_layers(model)[1], list(candidates)
    removed: list[int] = []
    perplexities: list[float] = []
    for _ in range(count):
        with skipping([stack[i] for i in removed]):
            found = dict(zip(left, losses_without(model, tokens, [(i, i + 1) for i in left]), strict=True))
        best = min(left, key=found.__getitem__)
        left.remove(best)
        removed.append(best)
        perplexities.append(math.exp(found[best]))
    return removed, perplexities


def runs(layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sorted layer numbers as half-open intervals of neighbours: (3, 4, 7) is [(3, 5), (7, 8)]."""
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a + 1 for a, b in pairwise(layers) if b != a + 1), layers[-1] + 1]
    return list(zip(starts, ends, strict=True))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
