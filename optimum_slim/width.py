"""Making a model narrower: fewer neurons, attention heads and hidden channels, with its config kept in step.

Every layer gets the same widths, so that what is left is an ordinary model of its class with a smaller config.
`narrow` takes the kept positions out of the dimensions that are widths (`axes.py`). Before it changes anything, it
compares the result with the model that the new config describes, and lets the first decoder layer run with its neurons
and heads in another order. A width that the config cannot express (heads that are hidden_size / head_dim, a scale
computed from the width) is refused with the name of what differs.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .axes import Axis, Sizes, built, find_axes, resized, shapes_of
from .layer_settings import text_config
from .memory import shared_copy
from .packed import PackedLinear
from .surgery import plain_attributes
from .walk import decoder_layers, walk


HALVES = ("gate_up_proj", "gate_and_up_proj")  # two matrices of neurons, one behind the other
EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon")
EPSILON_ATTRIBUTES = ("variance_epsilon", "eps", "epsilon")


def narrow(
    model: PreTrainedModel,
    *,
    channels: Tensor | None = None,
    neurons: Sequence[Tensor] | None = None,
    heads: Sequence[Tensor] | None = None,
    groups: Sequence[Tensor] | None = None,
    correction: float | None = None,
) -> None:
    """Keep only some neurons, heads and channels of `model`, in place, in the order given.

    Weights become new tensors, so that whoever else holds the old ones keeps them; tied ones stay tied.

    Args:
        model: A Transformers decoder model, dense.
        channels: int64, the hidden channels that stay.
        neurons: for each layer, the neurons that stay, equally many everywhere.
        heads: for each layer, the query heads that stay: equally many of each kept group, group after group.
        groups: for each layer, the key-value heads that stay. Needs `heads`.
        correction: kept share r of the residual stream's energy, in (0, 1]: weights of RMS norms are multiplied by
            sqrt(r d / d'), since they divide by a mean over d' channels instead of d, and their epsilon by d / d' if
            the config has one for them alone. Taking away channels that are 0 (r = 1) then changes nothing. `None`
            leaves the norms as they are, as Minitron's authors do.

    Raises:
        ValueError: unequal numbers, indices out of range, layers that are not dense, or a config that cannot express
            the widths. The model is unchanged then.
    """
    old, (stack, layers) = Sizes.of(model.config), decoder_layers(model)
    _check_dense(model)
    kept = _checked(old, len(layers), channels, neurons, heads, groups)
    new = Sizes(**(vars(old) | {axis: len(index if axis == "channels" else index[0]) for axis, index in kept.items()}))
    config, axes = resized(model.config, new), find_axes(model)
    for axis in kept.keys() - {"groups"}:
        _check_separate(model, axis, axes)
    if kept.keys() - {"channels"} and model.device.type != "meta":
        check_layout(model, axes, old)
    before = built(model, model.config, "its own config")
    if correction is not None and channels is not None:
        _correct_epsilon(config, before, axes, old.channels / new.channels)
    after = built(model, config, "the new widths")
    wanted = shapes_of(after)
    changes = _attribute_changes(model, before, after)
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in tensors:
                continue
            value = parameter
            for axis in axes.get(name, ()):
                value = _take(value, name, axis, kept, old, stack)
            if tuple(value.shape) != wanted[name]:
                raise ValueError(
                    f"{type(model).__name__} cannot get these widths: its config would then give {name} the shape "
                    f"{wanted[name]} instead of {tuple(value.shape)}"
                )
            new_one = value is not parameter
            tensors[id(parameter)] = nn.Parameter(value, parameter.requires_grad) if new_one else parameter
        if correction is not None and channels is not None:
            _correct(model, axes, tensors, correction * old.channels / new.channels)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = tensors[id(parameter)]
    for path, values in changes.items():
        for key, value in values.items():
            setattr(model.get_submodule(path), key, value)
    _update_configs(model, config)


def _checked(old: Sizes, layers: int, channels, neurons, heads, groups) -> dict[str, Any]:
    """The given indices by axis, checked."""
    if groups is not None and heads is None:
        raise ValueError("groups takes query heads away as well; pass heads, those that stay in the kept groups")
    given = {"channels": channels, "neurons": neurons, "heads": heads, "groups": groups}
    kept = {axis: index for axis, index in given.items() if index is not None}
    for axis, index in kept.items():
        each = [index] if axis == "channels" else list(index)
        if axis != "channels" and len(each) != layers:
            raise ValueError(f"{axis} must have one entry for each of {layers} layers, found {len(each)}")
        for one in each:
            if len(one) != len(each[0]) or not len(one):
                raise ValueError(f"{axis} must be equally many in every layer, at least one")
            if one.min() < 0 or one.max() >= getattr(old, axis) or len(one.unique()) < len(one):
                raise ValueError(f"{axis} must be different numbers from 0 to {getattr(old, axis) - 1}")
    of_group = old.heads // old.groups
    for layer, query in enumerate(heads or ()):
        stay = groups[layer] if groups is not None else torch.arange(old.groups)
        if len(query) % len(stay) or not torch.equal(
            (query // of_group).cpu(), stay.cpu().repeat_interleave(len(query) // len(stay))
        ):
            raise ValueError(
                f"heads of layer {layer} must be equally many of each kept group, group after group; found "
                f"{query.tolist()} with {of_group} heads in a group"
            )
    return kept


def _check_separate(model: nn.Module, axis: str, axes: dict[str, tuple[Axis, ...]]) -> None:
    """Raise a `ValueError` unless this width can change while the others stay."""
    named = {name: [entry.dim for entry in found if entry.name == axis] for name, found in axes.items()}
    square = [name for name, dims in named.items() if len(dims) > 1]
    if square or not any(named.values()):
        what = f"both dimensions of {square[0]} follow them" if square else "no weight follows them alone"
        raise ValueError(
            f"{type(model).__name__} cannot be made narrower by its {axis}: {what}, because its head_dim is "
            "hidden_size / num_attention_heads and has no place in the config"
        )


def check_layout(model: PreTrainedModel, axes: dict[str, tuple[Axis, ...]], old: Sizes) -> None:
    """Raise a `ValueError` unless the first decoder layer does the same with its neurons and heads in another order.

    How the parts of a fused matrix lie behind or between one another cannot be seen from shapes.
    """
    name, stack = decoder_layers(model)
    draw = torch.Generator().manual_seed(0)
    groups = torch.randperm(old.groups, generator=draw)
    each = old.heads // old.groups
    heads = torch.cat([group * each + torch.randperm(each, generator=draw) for group in groups])
    neurons = torch.randperm(old.neurons, generator=draw)
    shuffled = {"neurons": [neurons], "heads": [heads], "groups": [groups]}
    block = next(walk(model, torch.arange(8)[None]))
    expected, layer = next(block.outputs()).float(), stack[0]
    stack[0] = shared_copy(layer)
    try:
        for path, module in stack[0].named_modules():
            for key, parameter in module._parameters.items():
                full = f"{name}.0.{path}.{key}" if path else f"{name}.0.{key}"
                value = parameter
                for axis in axes.get(full, ()):
                    value = _take(value, full, axis, shuffled, old, name) if parameter is not None else None
                if value is not None:
                    module._parameters[key] = nn.Parameter(value.detach(), False)
        found = next(block.outputs()).float()
    finally:
        stack[0] = layer
    change = (found - expected).norm() / (expected - block.inputs[0].float()).norm().clamp(min=1e-30)
    if not change < 0.05:
        raise ValueError(
            f"{type(model).__name__} cannot be made narrower: with its neurons and heads in another order its first "
            "decoder layer does something else, so how they lie in its weights is not known"
        )


def _check_dense(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) or hasattr(module, "base_layer") or hasattr(module, "quant_state"):
            raise ValueError(f"{name} is packed, quantized or adapted; make the model narrower first")


def _take(value: Tensor, name: str, axis: Axis, kept: dict[str, Any], old: Sizes, stack: str) -> Tensor:
    """The kept positions of one dimension."""
    if axis.name not in kept and not (axis.name == "heads" and "groups" in kept):
        return value
    if axis.name == "channels":
        return value.index_select(axis.dim, _alone(kept["channels"], axis, name).to(value.device))
    if not name.startswith(f"{stack}."):
        raise ValueError(f"{name} lies outside the decoder layers and follows their {axis.name}")
    layer = int(name.removeprefix(f"{stack}.").partition(".")[0])
    if axis.name == "neurons":
        index = kept["neurons"][layer]
        if axis.size == 2 * axis.count and any(half in name for half in HALVES):
            index = torch.cat([index, index + axis.count])
        else:
            index = _alone(index, axis, name)
        return value.index_select(axis.dim, index.to(value.device))
    query = kept["heads"][layer]
    groups = kept["groups"][layer] if "groups" in kept else torch.arange(old.groups)
    positions = _heads(query, groups, axis, old, name)
    return value.index_select(axis.dim, positions.to(value.device))


def _alone(index: Tensor, axis: Axis, name: str) -> Tensor:
    """The index itself, for members of one position each."""
    if axis.size != axis.count:
        raise ValueError(
            f"{name} has {axis.size} positions for {axis.count} {axis.name}, and how they lie is not known"
        )
    return index


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


def _correct(model: nn.Module, axes: dict, tensors: dict[int, nn.Parameter], ratio: float) -> None:
    """Multiply the weights of RMS norms over the channels by sqrt(ratio)."""
    for path, module in model.named_modules():
        if not is_norm_of_channels(path, module, axes):
            continue
        weight = module.weight
        if not _is_rms(module):
            raise ValueError(
                f"{path} is a {type(module).__name__}, which subtracts a mean: no factor makes up for its missing "
                "channels; pass correction=None"
            )
        offset = _added_one(module)
        scaled = (tensors[id(weight)].data.float() + offset) * math.sqrt(ratio) - offset
        tensors[id(weight)] = nn.Parameter(scaled.to(weight.dtype), weight.requires_grad)


def has_rms_norms(model: PreTrainedModel) -> bool:
    """Whether all norms over the channels are RMS norms, so that `narrow` can correct them."""
    axes = find_axes(model)
    return all(_is_rms(module) for path, module in model.named_modules() if is_norm_of_channels(path, module, axes))


def _is_rms(norm: nn.Module) -> bool:
    return "rms" in type(norm).__name__.lower()


def is_norm_of_channels(path: str, module: nn.Module, axes: dict[str, tuple[Axis, ...]]) -> bool:
    """Whether the module has one weight for each hidden channel."""
    weight, over = module._parameters.get("weight"), axes.get(f"{path}.weight", ())
    return weight is not None and weight.dim() == 1 and [axis.name for axis in over] == ["channels"]


def _correct_epsilon(config: PreTrainedConfig, before: nn.Module, axes: dict, ratio: float) -> None:
    """Multiply the epsilon of the norms over the channels, if no other norm shares its place in the config."""
    text = text_config(config)
    for field in EPSILONS:
        value = vars(text).get(field)
        using = [
            is_norm_of_channels(path, module, axes)
            for path, module in before.named_modules()
            if any(vars(module).get(key) == value for key in EPSILON_ATTRIBUTES)
        ]
        if value and using and all(using):
            setattr(text, field, value * ratio)


def _added_one(norm: nn.Module) -> float:
    """1 for norms that multiply by 1 + weight (Gemma), else 0."""
    probe = copy.deepcopy(norm)
    probe.weight = nn.Parameter(torch.zeros_like(norm.weight))
    return float(probe(torch.ones_like(norm.weight)[None]).abs().max() > 0)


def _attribute_changes(model: nn.Module, before: nn.Module, after: nn.Module) -> dict[str, dict[str, Any]]:
    """What the new config changes in the modules' own attributes: numbers of something, and nothing else."""
    changes: dict[str, dict[str, Any]] = {}
    narrowed = dict(after.named_modules())
    for path, module in before.named_modules():
        old, new = plain_attributes(module), plain_attributes(narrowed[path])
        for key in old:
            if old[key] == new.get(key):
                continue
            sizes = new[key] if isinstance(new[key], list | tuple) else [new[key]]
            if key not in EPSILON_ATTRIBUTES and not all(type(size) is int for size in sizes):
                raise ValueError(
                    f"{type(model).__name__} cannot get these widths: its config would then give {path}.{key} the "
                    f"value {new[key]!r} instead of {old[key]!r}"
                )
            changes.setdefault(path, {})[key] = new[key]
        buffers = [dict(part.named_buffers(recurse=False)) for part in (module, narrowed[path])]
        for key, buffer in buffers[0].items():
            if buffer.shape != buffers[1][key].shape:
                raise ValueError(
                    f"{type(model).__name__} cannot get these widths: its buffer {path}.{key} would change shape"
                )
    return changes


def _update_configs(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give all config objects of `model` that describe its decoder the new values."""
    text, new = text_config(model.config), vars(text_config(config))
    old = dict(vars(text))
    settings = {key: value for key, value in new.items() if old.get(key) != value}
    configs = [text, *(getattr(module, "config", None) for module in model.modules())]
    for found in {id(c): c for c in configs if type(c) is type(text)}.values():
        for key, value in settings.items():
            if found is text or vars(found).get(key) == old.get(key):
                vars(found)[key] = value
