"""Making a model narrower: fewer neurons, experts, heads and hidden channels, with its config kept in step.

Every layer gets the same widths, so that what is left is an ordinary model of its class with a smaller config.
`narrow` takes the kept positions out of the dimensions that are widths (`axes.py`). Before it changes anything, it
compares the result with the model that the new config describes, and lets a decoder layer run with its neurons,
experts and heads in another order (`layout.py`). A width that the config cannot express (heads that are
hidden_size / head_dim, a scale computed from the width) is refused with the name of what differs.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .axes import AXES, Axis, Sizes, built, entangled, find_axes, number_in, resized, shapes_of
from .layer_settings import text_config
from .layout import check_layout, take
from .packed import PackedLinear
from .surgery import plain_attributes
from .walk import decoder_layers


PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")
EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon")
EPSILON_ATTRIBUTES = ("variance_epsilon", "eps", "epsilon")


def narrow(
    model: PreTrainedModel,
    *,
    channels: Tensor | None = None,
    neurons: Sequence[Tensor] | None = None,
    experts: Sequence[Tensor] | None = None,
    expert_neurons: Sequence[Tensor] | None = None,
    shared_neurons: Sequence[Tensor] | None = None,
    heads: Sequence[Tensor] | None = None,
    groups: Sequence[Tensor] | None = None,
    correction: float | None = None,
) -> None:
    """Keep only some neurons, experts, heads and channels of `model`, in place, in the order given.

    Weights become new tensors, so that whoever else holds the old ones keeps them; tied ones stay tied.

    Args:
        model: A Transformers decoder model, not packed.
        channels: int64, the hidden channels that stay.
        neurons: for each layer, the neurons that stay, equally many everywhere. Where they are those of experts
            (Mixtral), an entry may be a matrix with a row for each kept expert, in the order of `experts`.
        experts: for each layer, the experts that stay, equally many everywhere; where a router chooses among groups
            of experts first, equally many of each group, group after group.
        expert_neurons: as `neurons`, where experts have a width of their own (moe_intermediate_size).
        shared_neurons: for each layer, the neurons that stay of the shared experts, where their width follows that of
            the others: needed with `expert_neurons` then, n_shared_experts times as many.
        heads: for each layer, the query heads that stay: equally many of each kept group, group after group.
        groups: for each layer, the key-value heads that stay. Needs `heads`. Layers without units of a kind need
            an entry as well, which says nothing.
        correction: kept share r of the residual stream's energy, in (0, 1]: weights of RMS norms are multiplied by
            sqrt(r d / d'), since they divide by a mean over d' channels instead of d, and their epsilon by d / d' if
            the config has one for them alone. Taking away channels that are 0 (r = 1) then changes nothing. `None`
            leaves the norms as they are, as Minitron's authors do.

    Raises:
        ValueError: unequal numbers, indices out of range, fewer experts than a token goes to, packed layers, or a
            config that cannot express the widths. The model is unchanged then.
    """
    old, (stack, layers) = Sizes.of(model.config), decoder_layers(model)
    check_dense(model)
    given = {
        "channels": channels,
        "neurons": neurons,
        "experts": experts,
        "expert_neurons": expert_neurons,
        "shared_neurons": shared_neurons,
        "heads": heads,
        "groups": groups,
    }
    kept = _checked(old, len(layers), {axis: index for axis, index in given.items() if index is not None})
    counts = {axis: count for axis, count in _lengths(kept).items() if axis in AXES}
    new = Sizes(**(vars(old) | counts))
    check_routing(model.config, new.experts)
    config, axes = resized(model.config, new), find_axes(model)
    for axis in kept.keys() - {"groups", "shared_neurons"}:
        _check_separate(model, axis, axes)
    if kept.keys() - {"channels"} and model.device.type != "meta":
        check_layout(model, axes, old, kept.keys())
    before = built(model, model.config, "its own config")
    if correction is not None and channels is not None:
        _correct_epsilon(config, before, axes, old.channels / new.channels)
    after = built(model, config, "the new widths")
    wanted = shapes_of(after)
    changes = _attribute_changes(model, before, after, axes)
    tensors, twice = {}, {"remove_duplicate": False}
    with torch.no_grad():
        for name, value in [*model.named_parameters(**twice), *model.named_buffers(**twice)]:
            if id(value) in tensors:
                continue
            taken = take(value, name, axes.get(name, ()), kept, old, stack)
            is_parameter = isinstance(value, nn.Parameter)
            if (is_parameter or name in axes) and tuple(taken.shape) != wanted[name]:
                raise ValueError(
                    f"{type(model).__name__} cannot get these widths: its config would then give {name} the shape "
                    f"{wanted[name]} instead of {tuple(taken.shape)}"
                )
            renewed = is_parameter and taken is not value
            tensors[id(value)] = nn.Parameter(taken, value.requires_grad) if renewed else taken
        if correction is not None and channels is not None:
            _correct(model, axes, tensors, correction * old.channels / new.channels)
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({key: tensors[id(value)] for key, value in own.items() if value is not None})
    for path, values in changes.items():
        for key, value in values.items():
            setattr(model.get_submodule(path), key, value)
    _update_configs(model, config)


def _checked(old: Sizes, layers: int, kept: dict[str, Any]) -> dict[str, Any]:
    """The given indices by axis, checked."""
    if "groups" in kept and "heads" not in kept:
        raise ValueError("groups takes query heads away as well; pass heads, those that stay in the kept groups")
    for axis, index in kept.items():
        each = [index] if axis == "channels" else list(index)
        count = old.shared * old.expert_neurons if axis == "shared_neurons" else getattr(old, axis)
        if not count:
            raise ValueError(f"this model has no {axis}")
        if axis != "channels" and len(each) != layers:
            raise ValueError(f"{axis} must have one entry for each of {layers} layers, found {len(each)}")
        for one in each:
            if one.shape != each[0].shape or not one.numel():
                raise ValueError(f"{axis} must be equally many in every layer, at least one")
            ordered = one.sort().values
            if one.min() < 0 or one.max() >= count or (ordered[..., 1:] == ordered[..., :-1]).any():
                raise ValueError(f"{axis} must be different numbers from 0 to {count - 1}")
        experts = len(kept["experts"][0]) if "experts" in kept else old.experts
        if each[0].dim() > 1 and (axis not in ("neurons", "expert_neurons") or each[0].shape[:-1] != (experts,)):
            raise ValueError(
                f"{axis} must be one row for each layer, or one for each kept expert; found {tuple(each[0].shape)}"
            )
    lengths = _lengths(kept)
    if "shared_neurons" in kept and lengths["shared_neurons"] != old.shared * lengths.get("expert_neurons", 0):
        raise ValueError(
            f"shared_neurons must be {old.shared} times as many as expert_neurons in this model, found "
            f"{lengths['shared_neurons']} and {lengths.get('expert_neurons', 'none')}"
        )
    of_group = old.heads // old.groups
    for layer, query in enumerate(kept.get("heads", ())):
        stay = kept["groups"][layer] if "groups" in kept else torch.arange(old.groups)
        if len(query) % len(stay) or not torch.equal(
            (query // of_group).cpu(), stay.cpu().repeat_interleave(len(query) // len(stay))
        ):
            raise ValueError(
                f"heads of layer {layer} must be equally many of each kept group, group after group; found "
                f"{query.tolist()} with {of_group} heads in a group"
            )
    if old.expert_groups > 1:
        of_group = old.experts // old.expert_groups
        for layer, index in enumerate(kept.get("experts", ())):
            found = [set((row // of_group).tolist()) for row in index.tensor_split(old.expert_groups)]
            if len(index) % len(found) or {len(row) for row in found} != {1} or len(set.union(*found)) < len(found):
                raise ValueError(
                    f"experts of layer {layer} must be equally many of each of {len(found)} groups, group after "
                    f"group; found {index.tolist()} with {of_group} experts in a group"
                )
    return kept


def _lengths(kept: dict[str, Any]) -> dict[str, int]:
    """How many stay of each axis in a layer, or in an expert."""
    return {axis: (index if axis == "channels" else index[0]).shape[-1] for axis, index in kept.items()}


def check_routing(config: PreTrainedConfig, experts: int) -> None:
    """Raise a `ValueError` unless the routers can choose among so many experts as they do now."""
    old, text = Sizes.of(config), text_config(config)
    if experts == old.experts:
        return
    chosen, groups = number_in(text, PER_TOKEN), old.expert_groups
    best = number_in(text, ["topk_group"]) or groups
    each = max(2, math.ceil(chosen / best)) if groups > 1 else chosen  # a group is rated by its best two
    if experts % groups or experts < groups * each:
        of_groups = f" in {best} of {groups} groups, which keep equally many" if groups > 1 else ""
        raise ValueError(
            f"{type(text).__name__} cannot have {experts} experts: a token goes to {chosen} of them "
            f"(num_experts_per_tok){of_groups}; keep "
            + (f"a multiple of {groups}, " if groups > 1 else "")
            + f"at least {groups * each}"
        )


def _check_separate(model: nn.Module, axis: str, axes: dict[str, tuple[Axis, ...]]) -> None:
    """Raise a `ValueError` unless this width can change while the others stay."""
    named = {name: [entry.dim for entry in found if entry.name == axis] for name, found in axes.items()}
    square = [name for name, dims in named.items() if len(dims) > 1]
    if shared := entangled(axes).get(axis):
        why = f"a dimension of {shared} follows another width as well"
    elif not any(named.values()) and axis not in ("channels", "heads"):
        why = "no weight follows them" + (", experts have expert_neurons" if axis == "neurons" else "")
    elif square or not any(named.values()):
        why = f"both dimensions of {square[0]} follow them" if square else "no weight follows them alone"
        why += ", because its head_dim is hidden_size / num_attention_heads and has no place in the config"
    else:
        return
    raise ValueError(f"{type(model).__name__} cannot be made narrower by its {axis}: {why}")


def check_dense(model: nn.Module) -> None:
    """Raise a `ValueError` if a layer is packed, quantized or adapted."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) or hasattr(module, "base_layer") or hasattr(module, "quant_state"):
            raise ValueError(f"{name} is packed, quantized or adapted; make the model narrower first")


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


def _attribute_changes(model: nn.Module, before: nn.Module, after: nn.Module, axes: dict) -> dict[str, dict[str, Any]]:
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
            if buffer.shape != buffers[1][key].shape and f"{path}.{key}" not in axes:
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
