"""The config of a decoder model with some of its layers left out.

Configs say in four ways which layer is which (sliding or full attention, with or without RoPE, dense or sparse MLP):

      a list with one entry per layer       layer_types, no_rope_layers, mlp_layer_types   keep the entries that stay
      a list of layer indices               mlp_only_layers, moe_layers                    renumber them
      a count of first or last layers       first_k_dense_replace, num_kv_shared_layers    count those that stay
      a period                              decoder_sparse_step, attn_layer_period         nothing to edit

The names below are those of Transformers 5.23, found by building the config of every causal language model with two
numbers of layers. A cut that such a config cannot express (a period out of step) shows only in the model built from
it: see `surgery.py`.
"""

import copy
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


ENTRY_PER_LAYER = {
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "indexer_types",
    "intermediate_size",
    "kv_source_layers",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "layers_num_experts",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "swiglu_limits",
    "swiglu_limits_shared",
}
LAYER_INDICES = {
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
}
LAYER_NUMBERS = {"ple_layer_ids"}  # as indices, but the first layer is 1
FIRST_LAYERS = {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers"}
LAST_LAYERS = {"num_kv_shared_layers"}
PERIODS = (
    "aligner_num_add_layers",
    "attn_layer_offset",
    "attn_layer_period",
    "block_types",
    "cross_layer_interval",
    "decoder_sparse_step",
    "expert_layer_offset",
    "expert_layer_period",
    "global_attn_every_n_layers",
    "layer_group_size",
    "moe_layer_interval",
    "n_layers_per_attn_res_block",
    "num_layers_per_stack",
    "num_mem_blocks",
    "scale_attn_by_inverse_layer_idx",
    "scale_depth",
)
UNRELATED = ("freeze_", "mtp_")  # lists with "layer" in their names that concern no decoder layer


def cut_config(config: PreTrainedConfig, drop: Iterable[int]) -> PreTrainedConfig:
    """A copy of `config` without the decoder layers `drop`.

    Args:
        config: The config of a decoder model; for one with several parts, the text part is cut.
        drop: Indices of the layers to leave out, from 0.

    Returns:
        A deep copy with `num_hidden_layers` and every setting that counts, lists or indexes layers adapted. Whether a
        model built from it has the remaining layers unchanged is for `drop_layers` to say.

    Raises:
        ValueError: an index is no layer, appears twice, or none would be left; the config describes an
            encoder-decoder model or holds a list about layers whose meaning is not known.
    """
    text = text_config(config)
    count = text.num_hidden_layers
    kept = kept_layers(count, drop)
    dropped = sorted(set(range(count)) - set(kept))
    _refuse_broken_sources(config, kept, dropped)
    cut = copy.deepcopy(config)
    text = cut.get_text_config(decoder=True)
    overrides = text.to_dict().get("per_layer_config") if getattr(text, "is_heterogeneous", False) else None
    for name, value in vars(text).items():
        vars(text)[name] = _cut_setting(name, value, count, kept)
    before, after = (set(getattr(part, "layer_types", None) or ()) for part in (text_config(config), text))
    rope = vars(text).get("rope_parameters")
    if before - after and isinstance(rope, dict):  # one entry per kind of layer, or the settings of all
        text.rope_parameters = {key: value for key, value in rope.items() if key not in before - after}
    if isinstance(vars(text).get("attention_types"), list):  # GPT-Neo: [[kinds, repeats], ...], from it the list above
        text.attention_types = [[[kind], 1] for kind in text.attention_layers]
    try:
        text.num_hidden_layers = len(kept)
        if overrides is not None:
            text.per_layer_config = {kept.index(int(i)): o for i, o in overrides.items() if int(i) in kept}
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(text).__name__} computes its number of layers, so layers {dropped} cannot be left out: {error}"
        ) from error
    return cut


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes the decoder, or a `ValueError` for an encoder-decoder model."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"{type(config).__name__} describes an encoder-decoder model, whose encoder and decoder layers share "
            "settings. Only decoder models can lose layers."
        )
    return config.get_text_config(decoder=True)


def kept_layers(count: int, drop: Iterable[int]) -> tuple[int, ...]:
    """The indices below `count` that are not in `drop`."""
    drop = list(drop)
    if wrong := [i for i in drop if type(i) is not int or not 0 <= i < count]:
        raise ValueError(f"Layers to drop must be integers from 0 to {count - 1} for {count} layers, found {wrong}.")
    if len(set(drop)) < len(drop):
        raise ValueError(f"Layers to drop must be named once, found {sorted(drop)}.")
    if len(drop) == count:
        raise ValueError(f"All {count} decoder layers would be dropped. Leave at least one.")
    return tuple(i for i in range(count) if i not in drop)


def _cut_setting(name: str, value: Any, count: int, kept: tuple[int, ...]) -> Any:
    """One setting of a config of `count` layers as it reads for the layers `kept`."""
    if type(value) is int:
        if name in FIRST_LAYERS:
            return sum(i < value for i in kept)
        if name in LAST_LAYERS:
            return sum(i >= count - value for i in kept)
        if name == "moe_layer_end_index" and value >= 0:  # the last sparse layer, inclusive
            return sum(i <= value for i in kept) - 1
    if not isinstance(value, list | tuple) or not value:
        return value
    if name == "kv_source_layers":
        return type(value)(kept.index(value[i]) for i in kept)
    if name in LAYER_INDICES:
        return type(value)(kept.index(i) for i in value if i in kept)
    if name in LAYER_NUMBERS:
        return type(value)(kept.index(i - 1) + 1 for i in value if i - 1 in kept)
    if name in ENTRY_PER_LAYER:
        return type(value)(value[i] for i in kept) if len(value) >= count else value
    about_layers = "layer" in name and (len(value) == count or all(type(i) is int for i in value))
    if about_layers and not name.startswith(UNRELATED):
        raise ValueError(
            f"The config's {name} = {value} seems to say something about single layers, but what is not known, so it "
            "cannot be adapted to fewer layers."
        )
    return value


def _refuse_broken_sources(config: PreTrainedConfig, kept: tuple[int, ...], dropped: list[int]) -> None:
    """Refuse to remove layers that feed something which is not in the layers themselves."""
    text = config.get_text_config(decoder=True)
    sources = dict(enumerate(getattr(text, "kv_source_layers", None) or ()))
    found = [("kv_source_layers", i, sources[i]) for i in kept if sources.get(i, i) not in kept]
    full = None
    for i, kind in enumerate(getattr(text, "indexer_types", None) or ()):
        full = i if kind == "full" else full
        if kind == "shared" and i in kept and full not in kept:
            found.append(("indexer_types", i, full))
    if dropped and getattr(text, "rescale_every", 0):
        raise ValueError(
            f"{type(text).__name__} scales weights by the index of their layer while running (rescale_every = "
            f"{text.rescale_every}), so no layer can be dropped."
        )
    if found:
        name, layer, source = found[0]
        raise ValueError(
            f"By the config's {name}, layer {layer} reuses what layer {source} computes: drop both or none."
        )
    vision = getattr(config, "vision_config", None)
    entries = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    entries = max([entries, *(layer + 1 for _, layer in getattr(config, "deepstack_layer_map", None) or ())])
    if dropped and dropped[0] < entries:
        raise ValueError(
            f"{type(config).__name__} feeds image features into layers below {entries} by their index (deepstack), so "
            f"layer {dropped[0]} cannot be dropped. Drop layers from {entries} on."
        )
