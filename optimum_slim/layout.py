"""Where the members of a width lie in a weight, and whether that is so.

Shapes tell which dimension of a weight follows a width (`axes.py`), not how the parts of a fused matrix lie behind or
between one another:

    gate_up_proj   gate | up                     one neuron is a row of each
    qkv_proj       q heads | k heads | v heads   a head is head_dim neighbouring rows
    experts        one matrix of each expert     an expert's neurons lie in its own matrix alone

`check_layout` lets a decoder layer run with its members in another order; it must do the same.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .axes import Axis, Sizes
from .memory import shared_copy
from .walk import decoder_layers, walk


HALVES = ("gate_up_proj", "gate_and_up_proj")  # two matrices of neurons, one behind the other


def take(value: Tensor, name: str, axes: tuple[Axis, ...], kept: dict[str, Any], old: Sizes, stack: str) -> Tensor:
    """The kept positions of one parameter or buffer; the tensor itself if none of its widths changes.

    Args:
        name: its name in the model.
        axes: its dimensions that are widths.
        kept: what stays by axis, as for `narrow`; for all but the channels by layer.
        stack: name of the stack of decoder layers.

    Raises:
        ValueError: how the positions lie is not known.
    """
    fused = any(axis.name == "experts" for axis in axes)
    for axis in axes:
        key = "heads" if axis.name == "groups" else axis.name
        if key not in kept:
            continue
        if key == "channels":
            value = value.index_select(axis.dim, _places(kept[key], axis, axis.count, name).to(value.device))
            continue
        if not name.startswith(f"{stack}."):
            raise ValueError(f"{name} lies outside the decoder layers and follows their {axis.name}")
        layer = int(name.removeprefix(f"{stack}.").partition(".")[0])
        if key == "heads":
            groups = kept["groups"][layer] if "groups" in kept else torch.arange(old.groups)
            index = _heads(kept[key][layer], groups, axis, old, name)
        elif key == "expert_neurons" and not fused:
            if "shared_neurons" not in kept:
                raise ValueError(f"{name} belongs to no single expert and follows their width; pass shared_neurons")
            index = _places(kept["shared_neurons"][layer], axis, old.shared * axis.count, name)
        else:
            index = _places(kept[key][layer], axis, axis.count, name)
        if index.dim() == 1:
            value = value.index_select(axis.dim, index.to(value.device))
        elif fused:
            shape = [len(index), *[1] * (value.dim() - 1)]
            shape[axis.dim] = index.shape[1]
            value = value.take_along_dim(index.view(shape).to(value.device), axis.dim)
        else:
            raise ValueError(
                f"{name} belongs to no single expert and follows their width; pass the same {key} for all experts"
            )
    return value


def check_layout(
    model: PreTrainedModel, axes: dict[str, tuple[Axis, ...]], old: Sizes, names: Collection[str]
) -> None:
    """Raise a `ValueError` unless decoder layers do the same with the members of these widths in another order.

    Looked at is, for each width, the first layer that has it. A few tokens may change: in half precision, experts can
    be equally good, and their order decides.
    """
    prefix, stack = decoder_layers(model)
    draw = torch.Generator().manual_seed(0)
    groups = torch.randperm(old.groups, generator=draw)
    orders = {
        "neurons": torch.randperm(old.neurons, generator=draw),
        "expert_neurons": torch.randperm(old.expert_neurons, generator=draw),
        "shared_neurons": torch.randperm(old.shared * old.expert_neurons, generator=draw),
        "experts": _inside(torch.randperm(old.expert_groups, generator=draw), old.experts // old.expert_groups, draw),
        "heads": _inside(groups, old.heads // old.groups, draw),
        "groups": groups,
    }
    names = {*names, "groups"} & orders.keys() if "heads" in names else orders.keys() & names
    shuffled = {axis: [order] * len(stack) for axis, order in orders.items() if axis in names}
    first: dict[str, int] = {}
    for name in (name for name in axes if name.startswith(f"{prefix}.")):
        layer = int(name.removeprefix(f"{prefix}.").partition(".")[0])
        first |= {axis.name: min(layer, first.get(axis.name, layer)) for axis in axes[name] if axis.name in names}
    for block in walk(model, torch.arange(32)[None]):
        if block.index in first.values():
            expected, layer = next(block.outputs()).float(), block.layer
            stack[block.index] = _reordered(layer, f"{prefix}.{block.index}", axes, shuffled, old, prefix)
            try:
                found = next(block.outputs()).float()
            finally:
                stack[block.index] = layer
            change = (found - expected).norm(dim=-1)
            change = change / (expected - block.inputs[0].float()).norm(dim=-1).clamp(min=1e-30)
            if not change.quantile(0.75) < 0.05:
                raise ValueError(
                    f"{type(model).__name__} cannot be made narrower: with its {', '.join(sorted(names))} in another "
                    f"order, {block.name} does something else, so how they lie in its weights is not known"
                )
        if block.index >= max(first.values(), default=0):
            return


def _reordered(layer: nn.Module, name: str, axes: dict, order: dict[str, Any], old: Sizes, stack: str) -> nn.Module:
    """A copy of a decoder layer with the members of its widths in another order."""
    layer = shared_copy(layer)
    for path, module in layer.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, value in tensors.items():
                full = ".".join(part for part in (name, path, key) if part)
                if value is not None and full in axes:
                    taken = take(value.detach(), full, axes[full], order, old, stack)
                    tensors[key] = nn.Parameter(taken, False) if tensors is module._parameters else taken
    return layer


def _inside(groups: Tensor, each: int, draw: torch.Generator) -> Tensor:
    """Members of groups of `each` in a random order, group after group."""
    return torch.cat([group * each + torch.randperm(each, generator=draw) for group in groups])


def _places(index: Tensor, axis: Axis, count: int, name: str) -> Tensor:
    """Positions of members that have one each, or one in each of two halves."""
    if axis.size == count:
        return index
    if axis.size == 2 * count and any(half in name for half in HALVES):
        return torch.cat([index, index + count], dim=-1)
    raise ValueError(f"{name} has {axis.size} positions for {count} {axis.name}, and how they lie is not known")


def runs(index: Tensor, unit: int) -> Tensor:
    """Each index as `unit` neighbouring positions."""
    return (index[:, None] * unit + torch.arange(unit, device=index.device)).flatten()


def _heads(query: Tensor, groups: Tensor, axis: Axis, old: Sizes, name: str) -> Tensor:
    """Positions of heads: query heads, key-value heads, or q, k and v behind one another."""
    size = old.head_dim
    q, kv = old.heads * size, old.groups * size
    if axis.size == (q if axis.name == "heads" else kv):
        return runs(query if axis.name == "heads" else groups, size)
    if axis.size == q + 2 * kv and "qkv" in name:
        keys = runs(groups, size)
        return torch.cat([runs(query, size), q + keys, q + kv + keys])
    if axis.size == axis.count:  # a number for each head
        return query if axis.name == "heads" else groups
    raise ValueError(f"{name} has {axis.size} positions for {axis.count} {axis.name}, and how they lie is not known")
