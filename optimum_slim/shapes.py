"""Which shapes a model could have at a given number of parameters (Minitron's light architecture search).

A shape is the widths of a model and its number of layers. For each number of layers, of heads and of hidden channels,
the neurons follow from the number of parameters: those of the experts, if these have a width of their own. How many
experts there are stays, since fewer spare memory and no computation. Widths are multiples of what hardware likes, and
of those that come within a tolerance the ones are kept that cut no width to the quick while sparing the others.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

from torch import nn
from transformers import PreTrainedConfig

from .axes import Axis, Sizes, entangled, find_axes, is_accepted
from .walk import decoder_layers


MOST = 19  # candidates: the paper looks at fewer than 20


@dataclass(frozen=True)
class Shape:
    """Widths and number of layers of a model, and how many parameters it has with them."""

    sizes: Sizes
    layers: int
    parameters: int


class Counter:
    """Counts the parameters that `model` would have with other widths and fewer layers.

    Layers that differ count with their mean, since it is open which ones go.
    """

    def __init__(self, model: nn.Module):
        self.old, (prefix, stack) = Sizes.of(model.config), decoder_layers(model)
        axes, self.layers = find_axes(model), len(stack)
        self.inside: list[tuple[tuple[int, ...], tuple[Axis, ...], str]] = []
        self.outside: list[tuple[tuple[int, ...], tuple[Axis, ...], str]] = []
        for name, parameter in model.named_parameters():
            place = self.inside if name.startswith(f"{prefix}.") else self.outside
            place.append((tuple(parameter.shape), axes.get(name, ()), name))
        self.together = entangled(axes)
        self.separate_heads = any(axis.name == "heads" for found in axes.values() for axis in found)
        self.separate_heads &= "heads" not in self.together
        self.embeddings = sum(prod(shape) for shape, _, _ in self.outside)

    def count(self, sizes: Sizes, layers: int) -> int:
        inside = sum(self._size(*entry, sizes) for entry in self.inside)
        return round(inside * layers / self.layers) + sum(self._size(*entry, sizes) for entry in self.outside)

    def _size(self, shape: tuple[int, ...], axes: tuple[Axis, ...], name: str, new: Sizes) -> int:
        lengths = list(shape)
        for axis in axes:
            if "qkv" in name and axis.name in ("heads", "groups"):
                lengths[axis.dim] = (new.heads + 2 * new.groups) * new.head_dim
            else:
                lengths[axis.dim] = axis.size // axis.count * getattr(new, axis.name)
        return prod(lengths)


def candidates(
    model: nn.Module,
    parameters: int,
    *,
    tolerance: float = 0.05,
    max_width: float = 0.5,
    max_depth: float = 0.2,
) -> list[Shape]:
    """Shapes with about so many parameters, fewer than 20, the most even cut first.

    Args:
        model: A Transformers decoder model; only its shapes are looked at.
        parameters: How many to have, embeddings included.
        tolerance: How far off that number may be, as a share of it.
        max_width, max_depth: Largest share of a width, and of the layers, to cut.

    Raises:
        ValueError: no shape comes close enough; says what the nearest has.
    """
    counter = Counter(model)
    old, layers = counter.old, counter.layers
    found, nearest = [], None
    for depth in range(layers, ceil((1 - max_depth) * layers) - 1, -2):
        for heads, groups in _heads(counter, max_width):
            most = 0.0 if "channels" in counter.together else max_width
            for part in _channels(model.config, replace(old, heads=heads, groups=groups), most):
                sizes = _fit_neurons(counter, part, depth, parameters, max_width)
                shape = Shape(sizes, depth, counter.count(sizes, depth))
                off = abs(shape.parameters - parameters) / parameters
                if nearest is None or off < nearest[0]:
                    nearest = off, shape.parameters
                if off <= tolerance and (sizes, depth) != (old, layers):
                    found.append(shape)
    if not found:
        raise ValueError(
            f"no shape of this model has about {parameters:,} parameters: it has {counter.count(old, layers):,}, and "
            f"the nearest to be had by cutting widths by {max_width:.0%} and depth by {max_depth:.0%} has "
            f"{nearest[1]:,}; ask for more, or cut in two steps"
        )
    return sorted(found, key=lambda shape: _unevenness(shape, old, layers))[:MOST]


def _unevenness(shape: Shape, old: Sizes, layers: int) -> float:
    """The largest share that is cut of anything; heads and layers, which the paper cuts last, count more."""
    new = shape.sizes
    inside = _inside(old)
    cut = (1 - new.channels / old.channels, 1 - getattr(new, inside) / getattr(old, inside))
    return max(*cut, 1.5 * (1 - new.heads / old.heads), 2 * (1 - shape.layers / layers))


def _fit_neurons(counter: Counter, sizes: Sizes, layers: int, parameters: int, max_width: float) -> Sizes:
    """The number of neurons that comes nearest to so many parameters."""
    inside = _inside(sizes)
    size = getattr(sizes, inside)
    step = 512 if size >= 4096 else min(64, max(1, size // 8))
    options = [replace(sizes, **{inside: n}) for n in _multiples(size, max_width, step)]
    return min(options, key=lambda option: abs(counter.count(option, layers) - parameters))


def _inside(sizes: Sizes) -> str:
    """The neurons to fit: those of experts that have a width of their own, where most parameters are."""
    return "expert_neurons" if sizes.expert_neurons else "neurons"


def _channels(config: PreTrainedConfig, sizes: Sizes, most: float) -> list[Sizes]:
    """As many channels and fewer: multiples of the largest step of which the config takes three."""
    step = 256 if sizes.channels >= 2048 else min(64, max(1, sizes.channels // 8))
    while True:
        widths = [replace(sizes, channels=n) for n in _multiples(sizes.channels, most, step)]
        fit = [width for width in widths if is_accepted(config, width)]
        if len(fit) > 3 or step <= 8:
            return fit
        step //= 2


def _multiples(size: int, most: float, step: int) -> list[int]:
    """The size itself, and its smaller multiples of a step."""
    return [size, *(n for n in range((size - 1) // step * step, 0, -step) if n >= (1 - most) * size)]


def _heads(counter: Counter, most: float) -> list[tuple[int, int]]:
    """Numbers of query heads and groups; only the old one where the config has no place for others."""
    old = counter.old
    if not counter.separate_heads:
        return [(old.heads, old.groups)]
    if old.heads == old.groups:
        return [(n, n) for n in range(old.heads, 0, -1) if n >= (1 - most) * old.heads]
    each = old.heads // old.groups
    return [(old.groups * n, old.groups) for n in range(each, 0, -1) if n >= (1 - most) * each]


def number_of(value: int | float | str) -> int:
    """A number of parameters: 4000000000, 4e9 or "4B"."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    try:
        text = value.strip().upper() if isinstance(value, str) else value
        unit = units.get(text[-1:], 1) if isinstance(text, str) else 1
        count = float(text.rstrip("KMB")) * unit if isinstance(text, str) else float(text)
    except (TypeError, ValueError):
        count = 0.0
    if not count >= 1:
        raise ValueError(f"params must be a number of parameters such as 4e9 or '4B', found {value!r}")
    return round(count)
