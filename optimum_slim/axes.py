"""Which dimension of which weight is a width of the model: hidden channels, neurons, heads, experts.

    channels         the residual stream: columns of embeddings, head, q, k, v, gate, up; rows of o, down; every norm
                     over it
    experts          rows of the router and of its biases, matrices of the fused experts
    neurons          of the feed-forward layers: rows of gate and up, columns of down; those of the experts as well
                     where the config has no other name for these (Mixtral)
    expert_neurons   of the experts, where the config has a width for them alone, and of shared experts that follow it
    heads            query heads: rows of q, columns of o
    groups           key-value heads: rows of k and v

None of that is written down for any architecture. `find_axes` builds the model, without weights, from its config and
from its config with one width doubled: a dimension that changes belongs to that width.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from .layer_settings import text_config
from .surgery import model_without_weights


AXES = ("channels", "experts", "neurons", "expert_neurons", "heads", "groups")
NEURONS = ("intermediate_size", "ffn_dim", "n_inner")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERT_NEURONS = "moe_intermediate_size"
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
EXPERT_GROUPS = ("n_group", "num_expert_group")


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, as in its config.

    Args:
        channels, neurons, heads, groups, head_dim: hidden_size, intermediate_size, attention heads and their size.
        experts: routed experts of a layer; 0 in a dense model.
        expert_neurons: moe_intermediate_size; 0 if the config has none, or as another name of intermediate_size.
        shared: experts that every token goes to, which are as wide as so many routed ones together.
        expert_groups: groups of experts among which a router chooses first.
    """

    channels: int
    neurons: int
    heads: int
    groups: int
    head_dim: int
    experts: int = 0
    expert_neurons: int = 0
    shared: int = 0
    expert_groups: int = 1

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Sizes":
        text = text_config(config)
        channels, heads = text.hidden_size, text.num_attention_heads
        neurons = next((getattr(text, name) for name in NEURONS if getattr(text, name, None)), 4 * channels)
        groups = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or channels // heads
        experts = number_in(text, EXPERTS)
        if experts < 2:
            return cls(channels, neurons, heads, groups, head_dim)
        names = text.attribute_map
        alone = names.get(NEURONS[0], NEURONS[0]) != names.get(EXPERT_NEURONS, EXPERT_NEURONS)
        width = number_in(text, [EXPERT_NEURONS]) if alone else 0
        shared, apart = number_in(text, SHARED), number_in(text, EXPERT_GROUPS)
        return cls(channels, neurons, heads, groups, head_dim, experts, width, shared, apart or 1)


def number_in(config: PreTrainedConfig, names: Iterable[str]) -> int:
    """The first of these settings that is a positive integer, else 0."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if type(value) is int and value > 0), 0)


def resized(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """A copy of `config` with these widths, head_dim and the number of neurons written out."""
    cut, old = copy.deepcopy(config), Sizes.of(config)
    text = text_config(cut)
    neurons = [name for name in NEURONS if hasattr(text, name)]
    if getattr(text, "word_embed_proj_dim", None) == old.channels:
        text.word_embed_proj_dim = sizes.channels
    text.head_dim = sizes.head_dim
    if neurons:
        setattr(text, neurons[0], sizes.neurons)
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = sizes.groups
    text.hidden_size, text.num_attention_heads = sizes.channels, sizes.heads
    for name in EXPERTS:
        if sizes.experts != old.experts and getattr(text, name, None) == old.experts:
            setattr(text, name, sizes.experts)
    if sizes.expert_neurons != old.expert_neurons:
        setattr(text, EXPERT_NEURONS, sizes.expert_neurons)
    return cut


def is_accepted(config: PreTrainedConfig, sizes: Sizes) -> bool:
    """Whether the config's class takes these widths; Llama's wants hidden_size as a multiple of the heads."""
    cut = resized(config, sizes)
    try:
        getattr(text_config(cut), "validate", lambda: None)()
    except StrictDataclassError:
        return False
    return True


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor that is a width: `size` positions for its `count` members."""

    name: str
    dim: int
    size: int
    count: int


def find_axes(model: PreTrainedModel) -> dict[str, tuple[Axis, ...]]:
    """For each parameter of `model`, the dimensions that are widths; of its buffers, those that are experts.

    A dimension that follows two widths is there with both; see `entangled`.

    Raises:
        ValueError: the config cannot express a width by itself.
    """
    sizes = Sizes.of(model.config)
    skeleton = built(model, model.config, "its own config")
    whole, parameters = shapes_of(skeleton), dict(skeleton.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[Axis, ...]] = {}
    for axis in AXES:
        if not getattr(sizes, axis):
            continue
        doubled = {axis: 2 * getattr(sizes, axis)} | ({"heads": 2 * sizes.heads} if axis == "groups" else {})
        wide = shapes_of(built(model, resized(model.config, Sizes(**(vars(sizes) | doubled))), f"{axis} doubled"))
        if wide.keys() != whole.keys():  # more experts are more modules: no dimension of a weight
            continue
        for name, shape in whole.items():
            if name not in parameters and axis != "experts":  # rotary frequencies and the like
                continue
            for dim, (before, after) in enumerate(zip(shape, wide[name], strict=True)):
                known = [entry.name for entry in found.get(name, ()) if entry.dim == dim]
                if before == after or (axis == "groups" and "heads" in known):
                    continue
                count = getattr(sizes, axis)
                found[name] = (*found.get(name, ()), Axis(axis, dim, before, count))
    return found


def entangled(axes: dict[str, tuple[Axis, ...]]) -> dict[str, str]:
    """The widths that share a dimension of some weight with another width, each with the name of that weight."""
    return {
        axis.name: name
        for name, found in axes.items()
        for axis in found
        if any(other.dim == axis.dim and other.name != axis.name for other in found)
    }


def built(model: PreTrainedModel, config: PreTrainedConfig, what: str) -> PreTrainedModel:
    """A model of the same class from `config`, without weights; `what` tells what was changed, for the error."""
    try:
        return model_without_weights(type(model), config)
    except StrictDataclassError as error:  # the first line names the validator only
        raise ValueError(f"{type(model).__name__} cannot be built with {what}: {error.__cause__ or error}") from error
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{type(model).__name__} cannot be built with {what}: {error}") from error


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers by name, tied ones by each of their names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}
