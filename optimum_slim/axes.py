"""Which dimension of which weight is a width of the model: hidden channels, neurons, heads.

    channels   the residual stream: columns of embeddings, head, q, k, v, gate, up; rows of o, down; every norm over it
    neurons    of the feed-forward layers: rows of gate and up, columns of down
    heads      query heads: rows of q, columns of o
    groups     key-value heads: rows of k and v

None of that is written down for any architecture. `find_axes` builds the model, without weights, from its config and
from its config with one width doubled: a dimension that changes belongs to that width.
"""

import copy
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from .layer_settings import text_config
from .surgery import model_without_weights


AXES = ("channels", "neurons", "heads", "groups")
NEURONS = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, by the names of its config: hidden_size, intermediate_size, heads and their size."""

    channels: int
    neurons: int
    heads: int
    groups: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Sizes":
        text = text_config(config)
        channels, heads = text.hidden_size, text.num_attention_heads
        neurons = next((getattr(text, name) for name in NEURONS if getattr(text, name, None)), 4 * channels)
        groups = getattr(text, "num_key_value_heads", None) or heads
        return cls(channels, neurons, heads, groups, getattr(text, "head_dim", None) or channels // heads)


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
    """One dimension of a parameter that is a width: `size` positions for each of its `count` members."""

    name: str
    dim: int
    size: int
    count: int


def find_axes(model: PreTrainedModel) -> dict[str, tuple[Axis, ...]]:
    """For each parameter of `model`, the dimensions that are widths.

    Raises:
        ValueError: the config cannot express a width by itself, or a dimension belongs to two of them.
    """
    sizes = Sizes.of(model.config)
    whole = shapes_of(built(model, model.config, "its own config"))
    found: dict[str, tuple[Axis, ...]] = {}
    for axis in AXES:
        doubled = {axis: 2 * getattr(sizes, axis)} | ({"heads": 2 * sizes.heads} if axis == "groups" else {})
        wide = shapes_of(built(model, resized(model.config, Sizes(**(vars(sizes) | doubled))), f"{axis} doubled"))
        for name, shape in whole.items():
            for dim, (before, after) in enumerate(zip(shape, wide[name], strict=True)):
                known = {entry.dim: entry.name for entry in found.get(name, ())}
                if before == after or (axis == "groups" and known.get(dim) == "heads"):
                    continue
                if dim in known:
                    raise ValueError(
                        f"{type(model).__name__} cannot be made narrower: dimension {dim} of {name} follows both its "
                        f"{known[dim]} and its {axis}"
                    )
                count = getattr(sizes, axis)
                found[name] = (*found.get(name, ()), Axis(axis, dim, before, count))
    return found


def built(model: PreTrainedModel, config: PreTrainedConfig, what: str) -> PreTrainedModel:
    """A model of the same class from `config`, without weights; `what` tells what was changed, for the error."""
    try:
        return model_without_weights(type(model), config)
    except StrictDataclassError as error:  # the first line names the validator only
        raise ValueError(f"{type(model).__name__} cannot be built with {what}: {error.__cause__ or error}") from error
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{type(model).__name__} cannot be built with {what}: {error}") from error


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name, tied ones by each of their names."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
