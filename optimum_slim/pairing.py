"""A slimmed copy of a model as the draft of that model: what they share, and which layer stands in for which.

    draft = make_draft(model, Depth(drop=10))
    model.generate(**inputs, custom_generate=SelfSpeculation(draft=draft))

A draft with the model's own width reads and writes the model's KV cache: each of its layers that of the layer it
stands in for. Its first layers that are the model's own, weight by weight, need not run again when the model verifies.
Weights that are equal are kept once, those of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .memory import shared_copy
from .surgery import plain_attributes
from .walk import decoder_layers


# Of a config, what may differ between models whose first layers do the same.
OF_THE_DEPTH = {"num_hidden_layers", "n_layer", "num_layers", "max_window_layers", "sliding_window_pattern"}
OF_THE_DEPTH |= {"_name_or_path", "architectures", "transformers_version", "quantization_config", "dtype"}
OF_THE_DEPTH |= {"use_cache", "intermediate_size", "ffn_dim", "n_inner"}


@dataclass(frozen=True)
class Pairing:
    """How a draft goes with its model.

    Args:
        places: for each layer of the draft, the layer of the model it stands in for, ascending.
        shared: how many of its first layers are the model's own first layers, fewer than the model has.
        shared_bytes: of weights that both had, and that are now kept once.
    """

    places: tuple[int, ...]
    shared: int
    shared_bytes: int = 0

    def cut(self, exit_layer: int | None) -> Pairing:
        """The pairing when the draft ends behind so many layers."""
        if exit_layer is None:
            return self
        return replace(self, places=self.places[:exit_layer], shared=min(self.shared, exit_layer))


def make_draft(model: PreTrainedModel, steps: Any, data: Any = None, **options: Any) -> PreTrainedModel:
    """A slimmed copy of `model` to draft for it; `model` stays as it is, and what is not slimmed is shared.

    Args:
        model: a Transformers decoder model.
        steps, data, options: as for `slim`.
    """
    from .recipe import slim

    draft = shared_copy(model)
    before = list(decoder_layers(draft)[1])
    slim(draft, steps, data=data, **options)
    places = [next((i for i, old in enumerate(before) if old is layer), None) for layer in decoder_layers(draft)[1]]
    if None not in places:
        draft.stands_for = tuple(places)
    return draft.eval()


def pair(draft: PreTrainedModel, model: PreTrainedModel, layers: Iterable[int] | None = None) -> Pairing:
    """Find out how `draft` goes with `model`, and let it use the model's tensors where they are equal.

    Args:
        layers: which layer of the model each layer of the draft stands in for, ascending; by default those with the
            same weights, or if there are as many, one for one (`make_draft` knows).

    Raises:
        ValueError: they differ in what a common cache needs, or which layers are whose cannot be told.
    """
    ours, theirs = _sizes(draft), _sizes(model)
    for name, size in ours.items():
        if size != theirs[name]:
            raise ValueError(
                f"draft and model have {name} {size} and {theirs[name]}, so they cannot share a "
                "cache; pass the draft to generate as assistant_model, and no custom_generate"
            )
    short, stack = decoder_layers(draft)[1], decoder_layers(model)[1]
    layers = getattr(draft, "stands_for", None) if layers is None else layers
    if layers is None:
        places = tuple(range(len(stack))) if len(short) == len(stack) else _places(short, stack)
    else:
        places = tuple(int(layer) for layer in layers)
    increasing = all(a < b for a, b in pairwise(places))
    if len(places) != len(short) or not increasing or not all(0 <= place < len(stack) for place in places):
        raise ValueError(
            f"draft_layers must name {len(short)} of the model's layers 0 to {len(stack) - 1}, ascending, one for "
            f"each layer of the draft; found {places}"
        )
    shared_bytes = _share(draft, model, short, [stack[place] for place in places])
    same = [place == i and _is(short[i], stack[place]) for i, place in enumerate(places)]
    ends = [getattr(m.get_input_embeddings(), "weight", None) for m in (draft, model)]
    alike = ends[0] is ends[1] and type(draft) is type(model) and _settings(draft) == _settings(model)
    shared = [*same, False].index(False) if alike else 0
    return Pairing(places, min(shared, len(stack) - 1), shared_bytes)


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """What of a config decides how layers compute, above all positions and masks; without what lists or counts them.

    Differences between layers are found in the layers themselves.
    """
    config = model.config.get_text_config(decoder=True)
    values = {key: value for key, value in config.to_dict().items() if key not in OF_THE_DEPTH}
    return {key: value for key, value in values.items() if not isinstance(value, list)} | {
        "attention": config._attn_implementation
    }


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    """What two models must have in common to share a cache and its contents."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "dtype": model.dtype}
    return sizes | {"num_key_value_heads": heads, "head_dim": width}


def _places(short: nn.ModuleList, stack: nn.ModuleList) -> tuple[int, ...]:
    """For each layer of the draft, the layer of the model behind the one before with most equal weights."""
    places: list[int] = []
    for index, layer in enumerate(short):
        counts = {i: _common(layer, stack[i]) for i in range(places[-1] + 1 if places else 0, len(stack))}
        best = max(counts.values(), default=0)
        found = [i for i, count in counts.items() if count == best]
        if not best or len(found) > 1:
            raise ValueError(
                f"which of the model's {len(stack)} layers layer {index} of the draft stands in for cannot be told "
                "from its weights; pass draft_layers, such as (0, 1, 2, 5, 6)"
            )
        places.append(found[0])
    return tuple(places)


def _common(one: nn.Module, other: nn.Module) -> int:
    tensors = dict(other.named_parameters())
    return sum(name in tensors and _equal(value, tensors[name]) for name, value in one.named_parameters())


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    few = one.detach().flatten()[:256], other.detach().flatten()[:256]
    return torch.equal(*few) and torch.equal(one, other)


def _share(draft: PreTrainedModel, model: PreTrainedModel, short: nn.ModuleList, stand_for: list[nn.Module]) -> int:
    """Put the model's parameters in place of equal ones of the draft; returns the bytes of those that were copies."""
    freed: dict[int, int] = {}
    known = {id(layer) for layer in [*short, *stand_for]}
    pairs = list(zip(short, stand_for, strict=True))
    inside = {id(m) for layer in short for m in layer.modules()}
    for name, module in draft.named_modules():
        if id(module) not in inside and id(module) not in known:
            try:
                pairs.append((module, model.get_submodule(name)))
            except AttributeError:
                continue
    for ours, theirs in pairs:
        recurse = id(ours) in known
        tensors = dict(theirs.named_parameters(recurse=recurse))
        for name, value in list(ours.named_parameters(recurse=recurse)):
            other = tensors.get(name)
            if other is None or value is other or not _equal(value, other):
                continue
            owner, _, key = name.rpartition(".")
            ours.get_submodule(owner)._parameters[key] = other
            if value.data_ptr() != other.data_ptr():
                freed[value.data_ptr()] = value.numel() * value.element_size()
    return sum(freed.values())


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in plain_attributes(module).items() if not re.search("idx|index", name)}


def _is(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers do the same: the same modules around the same tensors."""
    kinds = [[(name, type(m), _attributes(m)) for name, m in layer.named_modules()] for layer in (one, other)]
    tensors = [dict([*layer.named_parameters(), *layer.named_buffers()]) for layer in (one, other)]
    return (
        kinds[0] == kinds[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(_equal(value, tensors[1][name]) for name, value in tensors[0].items())
    )
