"""One KV cache for a draft and the model that verifies it: seen by either, and taken back to what was accepted.

While the first layers draft they are ahead of the others by the drafted tokens; while the others verify they catch up.
A model asks its cache how long it is, for masks and positions, and looks at some layer for the answer. `view` shows it
a cache in which the layers that do not run are those that do.

Rows of a batch accept different numbers of tokens. They stay aligned at the right end, as generation from prompts of
different lengths has them: `rewind` moves the rows that accepted less to the right, and what is then on their left is
padding for the attention mask. Columns that are padding in every row are dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


KINDS = (DynamicLayer, DynamicSlidingWindowLayer)


def check_cache(cache: Cache | None) -> None:
    """Raise a `ValueError` unless `cache`, after a forward pass, can be taken back by any number of tokens."""
    if cache is None:
        raise ValueError(
            "self-speculation decodes with a KV cache, and the model returned none; pass use_cache=True, or generate "
            "without custom_generate if the model has another kind of cache"
        )
    if getattr(cache, "offloading", False):
        raise ValueError("self-speculation runs layers out of order, which an offloaded cache cannot follow")
    for index, layer in enumerate(getattr(cache, "layers", [cache])):
        if type(layer) not in KINDS:
            raise ValueError(
                f"self-speculation takes back drafted tokens, which layer {index} of this cache "
                f"({type(cache).__name__} of {type(layer).__name__}) cannot do; use the default dynamic cache, or "
                "generate without custom_generate if the model has linear-attention layers"
            )
        if layer.is_sliding and not hasattr(layer, "activate_past_recording"):
            raise ValueError(
                "this version of Transformers cannot take back tokens from a sliding window; upgrade it, or generate "
                "without custom_generate"
            )
        if not layer.is_initialized:
            raise ValueError(
                f"layer {index} keeps no keys and values of its own but shares those of another, so it cannot run "
                "apart from it; generate without custom_generate"
            )


def record(cache: Cache) -> None:
    """Let sliding windows keep what falls out of them until the next `rewind`."""
    for layer in cache.layers:
        if layer.is_sliding:
            layer.activate_past_recording()


def forget_past(cache: Cache) -> None:
    """Let sliding windows drop what falls out of them again."""
    for layer in cache.layers:
        if layer.is_sliding:
            layer.record_past = False


def view(cache: Cache, places: Sequence[int], live: Collection[int]) -> Cache:
    """A cache whose layer j is layer `places[j]` of `cache`; for a place that is not `live`, one like it that is."""
    shown = copy.copy(cache)
    shown.layers = [cache.layers[_living(cache, place, live)] for place in places]
    return shown


def _living(cache: Cache, place: int, live: Collection[int]) -> int:
    if place in live:
        return place
    kind = cache.layers[place].is_sliding
    return next((other for other in live if cache.layers[other].is_sliding == kind), next(iter(live)))


def forget(cache: Cache, layers: Collection[int], tokens: int) -> None:
    """Drop the last `tokens` of some layers."""
    for index in layers if tokens else ():
        _drop_last(cache.layers[index], tokens)


def rewind(cache: Cache, behind: Tensor, padding: int = 0) -> None:
    """Take every row back by a number of tokens of its own, and drop columns on the left.

    Args:
        behind: int64 (batch,), on the CPU.
        padding: columns, counted when the rows are aligned, that are padding in every row.
    """
    least = int(behind.min())
    shift = behind - least
    for layer in cache.layers:
        if shift.any():
            columns = layer.keys.shape[-2] - least
            index = (torch.arange(columns) - shift[:, None]).clamp(min=0).to(layer.keys.device)
            index = index[:, None, :, None]
            layer.keys = layer.keys.take_along_dim(index, dim=-2)
            layer.values = layer.values.take_along_dim(index, dim=-2)
            if layer.is_sliding:
                layer.cumulative_length -= least
        elif least:
            _drop_last(layer, least)
        if layer.is_sliding:
            layer.cumulative_length -= padding
            left = max(0, layer.keys.shape[-2] - min(layer.cumulative_length, layer.sliding_window - 1))
        else:
            left = padding
        if left:
            layer.keys, layer.values = layer.keys[..., left:, :], layer.values[..., left:, :]


def _drop_last(layer: DynamicLayer, tokens: int) -> None:
    layer.keys, layer.values = layer.keys[..., :-tokens, :], layer.values[..., :-tokens, :]
    if layer.is_sliding:
        layer.cumulative_length -= tokens
