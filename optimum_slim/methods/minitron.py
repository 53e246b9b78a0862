"""Minitron: a smaller model of the same kind, by one look at its activations (arXiv 2407.14679, 2408.11796).

Neurons, attention heads, hidden channels and layers are scored in one pass over calibration data
(`optimum_slim/importance.py`) and the least important ones are taken out (`optimum_slim/width.py`, `surgery.py`). All
layers keep the same widths, so that what is left is an ordinary model with a smaller config, which loads without this
package. It needs training afterwards, best by distillation from the model it was:

    SlimConfig([Minitron(intermediate_size=1024, hidden_size=448), Heal(method="full", steps=300)])

Query heads are ranked within the group of their key-value head, and each group keeps equally many. Layers go by block
influence, 1 - E[cos(in, out)], wherever they are.

A norm divides by a mean over the channels that are left. `norm_correction` multiplies its weight so that what comes
out keeps its size, given the share of the stream's energy that was kept; removing dead channels is exact that way. The
authors leave that to the distillation.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..importance import AGGREGATES, Importance, importance
from ..step import Step, StepReport, register
from ..surgery import drop_layers
from ..walk import decoder_layers
from ..width import Sizes, narrow


FIELDS = {
    "hidden_size": "channels",
    "intermediate_size": "neurons",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
}


@register("minitron", paper="Compact Language Models via Pruning and Knowledge Distillation (arXiv 2407.14679)")
@dataclass(frozen=True, kw_only=True)
class Minitron(Step):
    """Make a model narrower, and shallower, by the importance of its neurons, heads, channels and layers.

    Args:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, num_hidden_layers (`int`,
            *optional*): of the pruned model, as in its config; what is not given stays.
        aggregate (`tuple[str, str]`): how activations are aggregated over samples and over the tokens of one: `"mean"`
            of magnitudes, `"l2"` or `"variance"`.
        norm_correction (`bool`): scale the norms to the share of the residual stream's energy that stays.
        batch_size (`int`): samples per forward pass.

    Raises:
        `ValueError`: sizes larger than the model's, or that its config cannot express.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    num_hidden_layers: int | None = None
    aggregate: tuple[str, str] = ("l2", "mean")
    norm_correction: bool = False
    batch_size: int = 8

    needs_data: ClassVar[bool] = True
    before_packing: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "aggregate", tuple(self.aggregate))
        if len(self.aggregate) != 2 or any(name not in AGGREGATES for name in self.aggregate):
            raise ValueError(f"aggregate must be two of {', '.join(AGGREGATES)}, found {self.aggregate!r}")
        for name in (*FIELDS, "num_hidden_layers", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        if all(getattr(self, name) is None for name in (*FIELDS, "num_hidden_layers")):
            raise ValueError("minitron needs to know what to make smaller; pass for example intermediate_size=1024")

    def sizes(self, model: nn.Module) -> Sizes:
        """The widths of the pruned model. Raises a `ValueError` if they are none that `model` can be cut to."""
        old = Sizes.of(model.config)
        given = {axis: getattr(self, name) for name, axis in FIELDS.items() if getattr(self, name) is not None}
        new = dataclasses.replace(old, **given)
        if "heads" in given and "groups" not in given and old.heads == old.groups:
            new = dataclasses.replace(new, groups=new.heads)  # without groups, a head takes its keys and values along
        for name, axis in FIELDS.items():
            if getattr(new, axis) > getattr(old, axis):
                raise ValueError(f"{name}={getattr(new, axis)} is more than the {getattr(old, axis)} of this model")
        if new.heads % new.groups or new.heads // new.groups > old.heads // old.groups:
            raise ValueError(
                f"{new.heads} query heads cannot be shared evenly by {new.groups} key-value heads with at most "
                f"{old.heads // old.groups} each; pass num_attention_heads and num_key_value_heads that fit"
            )
        layers = len(decoder_layers(model)[1])
        if (self.num_hidden_layers or layers) > layers:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is more than the {layers} of this model")
        if new == old and (self.num_hidden_layers or layers) == layers:
            raise ValueError("minitron would change nothing: the model has these sizes already")
        return new

    def resolve(self, model: nn.Module) -> Minitron:
        with torch.device("meta"):
            skeleton = type(model)(copy.deepcopy(model.config))
        self.sketch(skeleton)  # what cannot be is refused before anything is measured or changed
        return self

    def sketch(self, model: nn.Module) -> None:
        layers = len(decoder_layers(model)[1])
        with torch.device("cpu"):  # indices are numbers even where Transformers makes all tensors on meta
            narrow(model, **kept_widths(Sizes.of(model.config), self.sizes(model), layers))
        drop_layers(model, range(self.num_hidden_layers or layers, layers))

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start, old, new = time.perf_counter(), Sizes.of(model.config), self.sizes(model)
        before, (prefix, stack) = model.num_parameters(), decoder_layers(model)
        scores = importance(model, tokens, aggregate=self.aggregate, batch_size=self.batch_size)
        kept = kept_widths(old, new, len(stack), scores)
        energy = None
        if "channels" in kept:
            energy = float(scores.energy[kept["channels"]].sum() / scores.energy.sum())
        narrow(model, **kept, correction=energy if self.norm_correction else None)
        rows = [{"name": f"{prefix}.{i}", "block_influence": value.item()} for i, value in enumerate(scores.layers)]
        count = len(stack) - (self.num_hidden_layers or len(stack))
        dropped = sorted(scores.layers.argsort(stable=True)[:count].tolist())
        drop_layers(model, dropped)
        notes = [f"{before:,} parameters became {model.num_parameters():,}"]
        changed = [
            f"{name} {getattr(old, axis)} to {getattr(new, axis)}" for name, axis in FIELDS.items() if axis in kept
        ]
        notes += [f"narrower: {', '.join(changed)}"] if changed else []
        notes += [f"kept {energy:.1%} of the residual stream's energy"] if energy is not None else []
        notes += [f"dropped layers {', '.join(map(str, dropped))} by block influence"] if dropped else []
        return StepReport(self.to_dict(), time.perf_counter() - start, rows, notes)


def kept_widths(old: Sizes, new: Sizes, layers: int, scores: Importance | None = None) -> dict[str, Any]:
    """What `narrow` is to keep: the most important of each width, ascending; the first ones without scores.

    Raises:
        ValueError: a width for which the model has no scores.
    """

    def best(axis: str, values: Tensor | None, count: int) -> Tensor:
        if scores is None:
            values = -torch.arange(float(getattr(old, axis)))
        if values is None:
            raise ValueError(f"this model's {axis} lie in fused experts or are no width of their own; leave them")
        return values.topk(count).indices.sort().values

    kept: dict[str, Any] = {}
    if new.channels < old.channels:
        kept["channels"] = best("channels", scores and scores.channels, new.channels)
    if new.neurons < old.neurons:
        rows = [None] * layers if scores is None or scores.neurons is None else scores.neurons
        kept["neurons"] = [best("neurons", row, new.neurons) for row in rows]
    if (new.heads, new.groups) != (old.heads, old.groups):
        found = [_heads(old, new, scores.heads[i] if scores else torch.zeros(old.heads)) for i in range(layers)]
        kept["heads"] = [heads for heads, _ in found]
        if new.groups < old.groups:
            kept["groups"] = [groups for _, groups in found]
    return kept


def _heads(old: Sizes, new: Sizes, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Query heads and groups that stay in one layer: groups by the sum of their heads, heads within each group."""
    table = scores.view(old.groups, -1)
    groups = table.sum(1).topk(new.groups).indices.sort().values
    inside = table[groups].topk(new.heads // new.groups, dim=1).indices.sort(dim=1).values
    return (groups[:, None] * table.shape[1] + inside).flatten(), groups
