"""Taking decoder layers out of a model, with its config kept in step.

A depth-pruned model is an ordinary Transformers model with fewer layers, and its checkpoint an ordinary checkpoint,
if and only if its config still describes it. Lowering `num_hidden_layers` is not enough: layers differ, configs say
which is which in several ways (see `layer_settings.py`), and each layer knows its own index, which is its place in
the KV cache. `drop_layers` edits all of that and, before it changes anything, proves the result: it builds the model
without weights from its config as it would be saved, once whole and once cut, and compares what stays. A cut that the
config cannot express (a period out of step, a layer that reuses the keys and values of a removed one, a scale computed
from the index) is refused with the name of what differs.

While a checkpoint is loading, the kept layers must carry their old indices as names, so that tensors find them and
those of removed layers are never read: `to_checkpoint_names` before, `from_checkpoint_names` after. (Renaming keys
instead loads wrong layers in Transformers 5.3 and later, silently.)
"""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layer_settings import LAST_LAYERS, PERIODS, cut_config, kept_layers, text_config
from .walk import decoder_layers


__all__ = ["cut_config", "drop_layers", "from_checkpoint_names", "to_checkpoint_names"]


def drop_layers(model: PreTrainedModel, drop: Iterable[int]) -> tuple[int, ...]:
    """Take decoder layers out of `model`, in place, in memory or on the meta device.

    The remaining layers close up and are renumbered, and the model's config objects are edited, so that the model
    runs, generates, trains, saves and reloads as any other of its class. Packed layers, adapters and hooks inside
    the remaining layers stay as they are. Removed layers keep their weights and indices for whoever else holds them.

    Args:
        model: A Transformers decoder model.
        drop: Indices of the layers to remove, from 0, in any order.

    Returns:
        The old indices of the layers that stay, ascending.

    Raises:
        ValueError: as `cut_config`, or the config cannot express the model without these layers, in which case the
            message names the module and the setting that stand in the way. The model is unchanged then.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Layers can be dropped from a Transformers model, not from a {type(model).__name__}. "
            "Pass the model inside it (for PEFT, model.get_base_model(); for torch.compile, model._orig_mod)."
        )
    text = text_config(model.config)
    name, stack = decoder_layers(model)
    kept = kept_layers(len(stack), drop)
    cut = cut_config(model.config, drop)
    renumbered, outside = _check(model, cut, kept)
    settings = vars(cut.get_text_config(decoder=True))
    settings = {key: value for key, value in settings.items() if vars(text).get(key) != value}
    old = {key: vars(text).get(key) for key in settings}

    _rename(stack, [stack[i] for i in kept], range(len(kept)))
    for layer, changes in zip(stack, renumbered, strict=True):
        _set_attributes(layer.modules(), changes)
    _set_attributes(_modules_outside(model, stack), outside)
    configs = [text, *(getattr(module, "config", None) for module in model.modules())]
    for config in {id(c): c for c in configs if type(c) is type(text)}.values():
        for key, value in settings.items():
            if config is text or (key in vars(config) and vars(config)[key] == old[key]):
                vars(config)[key] = value
    _rename_device_map(model, name, kept)
    return kept


def to_checkpoint_names(model: PreTrainedModel, kept: Iterable[int]) -> None:
    """Name the layers of a cut model by their indices in the checkpoint that is about to be loaded into it.

    Tensors of other layers then match nothing, are not read, and are not reported as unexpected.

    Args:
        model: A model on the meta device, as `drop_layers` left it.
        kept: What `drop_layers` returned.
    """
    kept = tuple(kept)
    name, stack = decoder_layers(model)
    _rename(stack, list(stack), kept)
    stem = re.escape(name.removeprefix(f"{model.base_model_prefix}."))  # a base model's checkpoint lacks the prefix
    others = rf"(^|\.){stem}\.(?!({'|'.join(map(str, kept))})\.)\d+\."
    model._keys_to_ignore_on_load_unexpected = _Patterns(model._keys_to_ignore_on_load_unexpected, others)


def from_checkpoint_names(model: PreTrainedModel, kept: Iterable[int]) -> None:
    """Undo `to_checkpoint_names` after loading: layers are named 0, 1, 2, ... again, in `hf_device_map` too."""
    name, stack = decoder_layers(model)
    _rename(stack, list(stack), range(len(stack)))
    if isinstance(model._keys_to_ignore_on_load_unexpected, _Patterns):
        model._keys_to_ignore_on_load_unexpected = model._keys_to_ignore_on_load_unexpected.original
    _rename_device_map(model, name, tuple(kept))


class _Patterns(list):
    """Patterns of keys to ignore, plus one.

    Transformers joins them by `+` with a list up to 5.8, by `|` with a set later.
    """

    def __init__(self, original, extra: str):
        super().__init__([*(original or ()), extra])
        self.original = original

    def __or__(self, other):
        return set(self) | set(other)


def model_without_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model, without weights, that a saved copy of `config` gives."""
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    saved = type(config).from_dict(settings)
    saved._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        return model_class(saved)


def _check(model: PreTrainedModel, cut: PreTrainedConfig, kept: tuple[int, ...]) -> tuple[list[dict], dict]:
    """Compare the skeletons of the whole and of the cut config in what stays.

    Skeletons and not the model itself, so that it makes no difference what its layers hold by now.

    Returns:
        For each layer that stays, and for the modules outside the stack, the attributes that number or list layers:
        {(name, repr of the old value): new value}.
    """
    whole = model_without_weights(type(model), model.config)
    name, before = decoder_layers(whole)
    count = len(before)
    refuse = _Refusal(model, sorted(set(range(count)) - set(kept)))
    try:
        short = model_without_weights(type(model), cut)
        after = decoder_layers(short)[1]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise refuse(f"the config without them is refused: {error}") from error
    tied = getattr(whole, "all_tied_weights_keys", None) or {}
    if shared := [key for pair in tied.items() for key in pair if key.startswith(f"{name}.")]:
        raise refuse(f"{shared[0]} is tied to other weights")

    places = {i: j for j, i in enumerate(kept)} | {count: len(kept)}
    renumbered = []
    for j, i in enumerate(kept):
        pairs = _pairs(dict(before[i].named_modules()), dict(after[j].named_modules()))
        renumbered.append(_compare(pairs, f"{name}.{i}", refuse, lambda x, y: places.get(x) == y))
    bookkeeping = {x: sum(i < x for i in kept) for x in range(count + 1)}

    def follows(x, y):
        return bookkeeping.get(x) == y if type(x) is int else isinstance(x, bool) or len(x) == count

    modules = [dict(_named_modules_outside(m, s)) for m, s in ((whole, before), (short, after))]
    return renumbered, _compare(_pairs(*modules), "", refuse, follows)


class _Refusal:
    """Makes the error for a cut that cannot be expressed."""

    def __init__(self, model: PreTrainedModel, dropped: list[int]):
        text = model.config.get_text_config(decoder=True)
        fields = [f"{field} = {vars(text)[field]}" for field in (*PERIODS, *LAST_LAYERS) if vars(text).get(field)]
        self.start = f"{type(model).__name__} cannot lose decoder layers {dropped}: "
        self.end = f". Its config places layers by {', '.join(fields)}" if fields else ""

    def __call__(self, reason: str) -> ValueError:
        return ValueError(f"{self.start}{reason.rstrip('.')}{self.end}. Drop other layers.")


def _pairs(before: dict[str, nn.Module], after: dict[str, nn.Module]) -> dict[str, tuple]:
    return {path: (before.get(path), after.get(path)) for path in {**before, **after}}


def _compare(pairs: dict[str, tuple], prefix: str, refuse: _Refusal, follows) -> dict[tuple[str, str], Any]:
    """Refuse unless the modules of each pair are alike, but for attributes that follow from the renumbering."""
    changes = {}
    for path, modules in pairs.items():
        name = f"{prefix}.{path}".strip(".")
        kinds = [type(m).__name__ if m is not None else "no module" for m in modules]
        if kinds[0] != kinds[1]:
            raise refuse(f"its config would then describe {name} as {kinds[1]} instead of {kinds[0]}")
        before, after = (_shapes(module) for module in modules)
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                raise refuse(
                    f"its config would then give {name}.{key} the shape {after.get(key)} instead of {before.get(key)}"
                )
        before, after = (plain_attributes(module) for module in modules)
        for key in {**before, **after}:
            if not prefix and key not in after:  # a kind of layer that is gone, such as its rotary scaling
                continue
            x, y = before.get(key), after.get(key)
            if x == y or (isinstance(x, list | tuple) and (prefix or not follows(x, y))):
                continue
            numbers_layers = type(x) is int and type(y) is int and re.search("layer|idx|index", key)
            if not (numbers_layers or (not prefix and isinstance(x, bool | list | tuple))) or not follows(x, y):
                raise refuse(f"its config would then give {name}.{key} the value {y!r} instead of {x!r}")
            changes[key, repr(x)] = y
    return changes


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own parameters and saved buffers."""
    buffers = {k: b for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
    return {k: tuple(t.shape) for k, t in {**dict(module.named_parameters(recurse=False)), **buffers}.items()}


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The module's own public attributes that are plain values or lists."""
    kinds = bool | int | float | str | list | tuple | None
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training" and isinstance(v, kinds)}


def _named_modules_outside(model: nn.Module, stack: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    inside = {id(module) for module in stack.modules()}
    return ((name, module) for name, module in model.named_modules() if id(module) not in inside)


def _modules_outside(model: nn.Module, stack: nn.ModuleList) -> Iterator[nn.Module]:
    return (module for _, module in _named_modules_outside(model, stack))


def _set_attributes(modules: Iterable[nn.Module], changes: dict[tuple[str, str], Any]) -> None:
    for module in modules:
        for (name, old), new in changes.items():
            if name in vars(module) and repr(vars(module)[name]) == old:
                setattr(module, name, copy.copy(new))


def _rename(stack: nn.ModuleList, layers: list[nn.Module], names: Iterable[int]) -> None:
    """Make `layers` the members of `stack` under the given numbers."""
    stack._modules.clear()
    stack._modules.update({str(name): layer for name, layer in zip(names, layers, strict=True)})


def _rename_device_map(model: PreTrainedModel, name: str, kept: tuple[int, ...]) -> None:
    """Let `hf_device_map` speak of the layers by their new numbers."""
    if not hasattr(model, "hf_device_map"):
        return
    renamed = {}
    for key, device in model.hf_device_map.items():
        match = re.fullmatch(rf"({re.escape(name)}\.)(\d+)((?:\..*)?)", key)
        if match is None:
            renamed[key] = device
        elif int(match[2]) in kept:
            renamed[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = device
    model.hf_device_map = renamed
