"""Which neurons, heads and channels stay, by their scores, and Minitron's merge of the heads that go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .axes import Sizes, find_axes
from .importance import Importance
from .walk import decoder_layers
from .width import check_layout


def kept_widths(old: Sizes, new: Sizes, layers: int, scores: Importance | None = None) -> dict[str, Any]:
    """What `narrow` is to keep: the most important of each width, ascending; the first ones without scores.

    Raises:
        ValueError: a width for which the model has no scores.
    """

    def best(axis: str, values: Tensor | None, count: int) -> Tensor:
        if scores is None:
            values = -torch.arange(float(getattr(old, axis)))
        if values is None:
            raise ValueError(f"this model's {axis} lie in fused experts or are no width of their own; leave them")
        return values.topk(count).indices.sort().values

    kept: dict[str, Any] = {}
    if new.channels < old.channels:
        kept["channels"] = best("channels", scores and scores.channels, new.channels)
    if new.neurons < old.neurons:
        rows = [None] * layers if scores is None or scores.neurons is None else scores.neurons
        kept["neurons"] = [best("neurons", row, new.neurons) for row in rows]
    if (new.heads, new.groups) != (old.heads, old.groups):
        found = [_heads(old, new, scores.heads[i] if scores else torch.zeros(old.heads)) for i in range(layers)]
        kept["heads"] = [heads for heads, _ in found]
        if new.groups < old.groups:
            kept["groups"] = [groups for _, groups in found]
    return kept


def _heads(old: Sizes, new: Sizes, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Query heads and groups that stay in one layer: groups by the sum of their heads, heads within each group."""
    table = scores.view(old.groups, -1)
    groups = table.sum(1).topk(new.groups).indices.sort().values
    inside = table[groups].topk(new.heads // new.groups, dim=1).indices.sort(dim=1).values
    return (groups[:, None] * table.shape[1] + inside).flatten(), groups


@torch.no_grad()
def merge_heads(model: nn.Module, new: Sizes, scores: Tensor) -> None:
    """Minitron's merge: of L heads ranked by importance and K to stay, head i gets 2 head_i - head_{2K - i + 1}.

    That is done for i from 2K - L + 1 to K, heads being rows of q, and of k and v where every head has its own.
    Weights become new tensors.

    Args:
        new: the widths to come.
        scores: (layers, heads).

    Raises:
        ValueError: how heads lie in the weights is not known. The model is unchanged then.
    """
    old, axes = Sizes.of(model.config), find_axes(model)
    check_layout(model, axes, old)
    prefix, stack = decoder_layers(model)
    alone = old.heads == old.groups
    whole, stay = heads_together(old, new)
    order = scores.view(len(stack), -1, whole).argsort(dim=-1, descending=True, stable=True)
    order = order + torch.arange(order.shape[1])[:, None] * whole
    for name, found in axes.items():
        first = next((axis for axis in found if axis.dim == 0), None)
        if first is None or first.size != first.count * old.head_dim or first.name not in ("heads", "groups"):
            continue
        if first.name == "groups" and not alone:
            continue
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, key)
        merged = weight.detach().clone().view(first.count, old.head_dim, -1)
        for ranked in order[int(name.removeprefix(f"{prefix}.").partition(".")[0])]:
            for i in range(2 * stay - whole, stay):
                merged[ranked[i]].mul_(2).sub_(weight.view_as(merged)[ranked[2 * stay - i - 1]])
        setattr(module, key, nn.Parameter(merged.view_as(weight), weight.requires_grad))


def heads_together(old: Sizes, new: Sizes) -> tuple[int, int]:
    """Of how many heads, ranked together, how many stay: those of a group, or all where each has keys of its own."""
    if old.heads == old.groups:
        return old.heads, new.heads
    return old.heads // old.groups, new.heads // new.groups
