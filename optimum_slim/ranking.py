"""Which neurons, experts, heads and channels stay, by their scores, and Minitron's merge of the heads that go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .axes import Sizes, find_axes
from .importance import Importance
from .layout import check_layout
from .walk import decoder_layers


def kept_widths(old: Sizes, new: Sizes, layers: int, scores: Importance | None = None) -> dict[str, Any]:
    """What `narrow` is to keep: the most important of each width, ascending; the first ones without scores.

    Each expert keeps its own neurons, and each group of experts equally many.

    Raises:
        ValueError: a width for which the model has no scores.
    """

    def found(axis: str, count: int) -> Tensor:
        if scores is None:
            order = -torch.arange(float(count))
            return order if axis == "channels" else order.expand(layers, count)
        if getattr(scores, axis) is None:
            raise ValueError(f"this model's {axis} are no width of their own or could not be scored; leave them")
        return getattr(scores, axis)

    kept: dict[str, Any] = {}
    if new.channels < old.channels:
        kept["channels"] = _best(found("channels", old.channels), new.channels)
    if new.experts < old.experts:
        table = found("experts", old.experts).unflatten(1, (old.expert_groups, -1))
        best = _best(table, new.experts // old.expert_groups)
        kept["experts"] = list((best + torch.arange(old.expert_groups)[:, None] * table.shape[2]).flatten(1))
    counts = {"neurons": (old.neurons, new.neurons), "expert_neurons": (old.expert_neurons, new.expert_neurons)}
    if old.shared and (scores is None or scores.shared_neurons is not None):
        counts["shared_neurons"] = (old.shared * old.expert_neurons, old.shared * new.expert_neurons)
    for axis, (before, after) in counts.items():
        if after < before:
            values = found(axis, before)
            if values.dim() == 3 and "experts" in kept:
                values = torch.stack([row[stay] for row, stay in zip(values, kept["experts"], strict=True)])
            kept[axis] = list(_best(values, after))
    if (new.heads, new.groups) != (old.heads, old.groups):
        both = [_heads(old, new, scores.heads[i] if scores else torch.zeros(old.heads)) for i in range(layers)]
        kept["heads"] = [heads for heads, _ in both]
        if new.groups < old.groups:
            kept["groups"] = [groups for _, groups in both]
    return kept


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores of each row, ascending."""
    return scores.topk(count).indices.sort().values


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
    check_layout(model, axes, old, ("heads",))
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
