"""Minitron: a smaller model of the same kind, by one look at its activations (arXiv 2407.14679, 2408.11796).

Neurons, attention heads, hidden channels, experts and layers are scored in one pass over calibration data
(`optimum_slim/importance.py`) and the least important ones are taken out (`optimum_slim/width.py`, `surgery.py`). All
layers keep the same widths, so that what is left is an ordinary model with a smaller config, which loads without this
package. It needs training afterwards, best by distillation from the model it was:

    SlimConfig([Minitron(intermediate_size=1024, hidden_size=448), Heal(method="full", steps=300)])

Query heads are ranked within the group of their key-value head, and each group keeps equally many; so are experts in
the groups of a group-limited router. Each layer keeps its own experts, each expert its own neurons. Layers go by block
influence, 1 - E[cos(in, out)], wherever they are.

With `params` or `ratio` in place of sizes, all shapes near that number of parameters are cut out of the model
(`shapes.py`), trained for `search_steps` if asked for, and measured; the one of least perplexity on held-out samples
stays, and the report has them all.

A norm divides by a mean over the channels that are left. `norm_correction` multiplies its weight so that what comes
out keeps its size, given the share of the stream's energy that was kept; removing dead channels is exact that way. The
authors leave that to the distillation.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..axes import Sizes, find_axes
from ..compensation import compensate
from ..evaluate import perplexity
from ..importance import AGGREGATES, Importance, importance
from ..layout import check_layout
from ..memory import shared_copy
from ..ranking import heads_together, kept_widths, merge_heads
from ..shapes import Counter, Shape, candidates
from ..step import Step, StepReport, register
from ..surgery import drop_layers
from ..walk import decoder_layers
from ..width import check_routing, has_rms_norms, narrow
from .heal import Heal


FIELDS = {
    "hidden_size": "channels",
    "intermediate_size": "neurons",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
    "num_experts": "experts",
    "moe_intermediate_size": "expert_neurons",
}


@register("minitron", paper="Compact Language Models via Pruning and Knowledge Distillation (arXiv 2407.14679)")
@dataclass(frozen=True, kw_only=True)
class Minitron(Step):
    """Make a model narrower, and shallower, by the importance of its neurons, heads, channels and layers.

    Args:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, num_hidden_layers (`int`,
            *optional*): of the pruned model, as in its config; what is not given stays.
        num_experts (`int`, *optional*): experts of each layer, whatever the config calls them (num_local_experts,
            n_routed_experts); at least as many as a token goes to.
        moe_intermediate_size (`int`, *optional*): width of each expert, if the config has it apart from
            intermediate_size; with shared experts that are as wide.
        params (`int` or `str`, *optional*): how many parameters to have, such as 4e9 or `"4B"`, in place of sizes.
        ratio (`float`, *optional*): the same as a share of the parameters outside of embeddings and head.
        tolerance (`float`): how far the number of parameters may be off, as a share of it.
        search_steps (`int`): steps of distillation, in full, with which each shape is trained before it is measured.
        scores (`str`, *optional*): file of importance scores, as `slim inspect --widths` saves them, in place of
            measuring them again.
        aggregate (`tuple[str, str]`): how activations are aggregated over samples and over the tokens of one: `"mean"`
            of magnitudes, `"l2"` or `"variance"`.
        merge_heads (`bool`): add to the last kept query heads of a group what tells them from the dropped ones, as the
            paper does (its authors' code does not); at most half of a group can go then.
        norm_correction (`bool`, *optional*): scale the norms to the share of the residual stream's energy that stays;
            by default where that is possible, with RMS norms.
        compensate (`bool`): fit the down and output projections to the neurons and heads that stay, by least squares
            on the calibration data (`compensation.py`). Takes as long as two or three passes over them.
        batch_size (`int`): samples per forward pass.

    Raises:
        `ValueError`: sizes larger than the model's, or that its config cannot express.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    params: int | float | str | None = None
    ratio: float | None = None
    tolerance: float = 0.05
    search_steps: int = 0
    scores: str | None = None
    aggregate: tuple[str, str] = ("l2", "mean")
    merge_heads: bool = False
    norm_correction: bool | None = None
    compensate: bool = True
    batch_size: int = 8

    before_packing: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "aggregate", tuple(self.aggregate))
        if self.scores is not None:
            object.__setattr__(self, "scores", str(self.scores))
        if len(self.aggregate) != 2 or any(name not in AGGREGATES for name in self.aggregate):
            raise ValueError(f"aggregate must be two of {', '.join(AGGREGATES)}, found {self.aggregate!r}")
        for name in (*FIELDS, "num_hidden_layers", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        given = [name for name in (*FIELDS, "num_hidden_layers") if getattr(self, name) is not None]
        targets = [name for name in ("params", "ratio") if getattr(self, name) is not None]
        if len(targets) + bool(given) != 1:
            raise ValueError(
                "minitron needs one thing to go by: sizes (intermediate_size=1024, ...), params='4B' or ratio=0.5; "
                f"found {', '.join([*given, *targets]) or 'none'}"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, found {self.ratio!r}")
        if self.params is not None:
            object.__setattr__(self, "params", number_of(self.params))
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, found {self.tolerance!r}")
        if type(self.search_steps) is not int or self.search_steps < 0:
            raise ValueError(f"search_steps must be an integer of at least 0, found {self.search_steps!r}")

    @property
    def needs_data(self) -> bool:
        return self.scores is None or self.compensate or self.params is not None or self.ratio is not None

    def shapes(self, model: nn.Module) -> list[Shape]:
        """What the model may be cut to: the sizes asked for, or those with about so many parameters."""
        counter = Counter(model)
        if self.params is None and self.ratio is None:
            sizes, layers = self.sizes(model), self.num_hidden_layers or counter.layers
            return [Shape(sizes, layers, counter.count(sizes, layers))]
        target = self.params
        if target is None:
            inside = counter.count(counter.old, counter.layers) - counter.embeddings
            target = round(counter.embeddings + self.ratio * inside)
        return candidates(model, target, tolerance=self.tolerance)

    def sizes(self, model: nn.Module) -> Sizes:
        """The widths of the pruned model. Raises a `ValueError` if they are none that `model` can be cut to."""
        old = Sizes.of(model.config)
        given = {axis: getattr(self, name) for name, axis in FIELDS.items() if getattr(self, name) is not None}
        new = dataclasses.replace(old, **given)
        if "heads" in given and "groups" not in given and old.heads == old.groups:
            new = dataclasses.replace(new, groups=new.heads)  # without groups, a head takes its keys and values along
        for name, axis in FIELDS.items():
            if getattr(new, axis) and not getattr(old, axis):
                hint = "; the width of its experts is intermediate_size" if old.experts else ""
                raise ValueError(f"this model has no {name}{hint}")
            if getattr(new, axis) > getattr(old, axis):
                raise ValueError(f"{name}={getattr(new, axis)} is more than the {getattr(old, axis)} of this model")
        if new.heads % new.groups or new.heads // new.groups > old.heads // old.groups:
            raise ValueError(
                f"{new.heads} query heads cannot be shared evenly by {new.groups} key-value heads with at most "
                f"{old.heads // old.groups} each; pass num_attention_heads and num_key_value_heads that fit"
            )
        check_routing(model.config, new.experts)
        whole, stay = heads_together(old, new)
        if self.merge_heads and 2 * stay < whole:
            raise ValueError(
                f"merge_heads puts each dropped head into one that stays, and {stay} of {whole} stay; keep at least "
                "half, or pass merge_heads=False"
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
        shape = self.shapes(model)[0]
        with torch.device("cpu"):  # indices are numbers even where Transformers makes all tensors on meta
            narrow(model, **kept_widths(Sizes.of(model.config), shape.sizes, len(decoder_layers(model)[1])))
        drop_layers(model, range(shape.layers, len(decoder_layers(model)[1])))

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start, old, shapes = time.perf_counter(), Sizes.of(model.config), self.shapes(model)
        before, (prefix, stack) = model.num_parameters(), decoder_layers(model)
        scores = self._scores(model, tokens)
        table = self._search(model, tokens, shapes, scores) if len(shapes) > 1 else []
        best = min(range(len(shapes)), key=lambda i: table[i]["perplexity"]) if table else 0
        shape, layers = shapes[best], len(stack)
        dropped, energy = self._cut(model, shape, scores, tokens if self.compensate else None)
        rows = [{"name": f"{prefix}.{i}", "block_influence": value.item()} for i, value in enumerate(scores.layers)]
        notes = [f"{before:,} parameters became {model.num_parameters():,}"]
        changed = [
            f"{name} {getattr(old, axis)} to {getattr(shape.sizes, axis)}"
            for name, axis in FIELDS.items()
            if getattr(old, axis) != getattr(shape.sizes, axis)
        ]
        notes += [f"narrower: {', '.join(changed)}"] if changed else []
        notes += [f"kept {energy:.1%} of the residual stream's energy"] if energy is not None else []
        notes += [f"dropped layers {', '.join(map(str, dropped))} of {layers} by block influence"] if dropped else []
        notes += [f"the best of {len(table)} shapes, perplexity {table[best]['perplexity']:.4g}"] if table else []
        step = dataclasses.replace(
            self,
            params=None,
            ratio=None,
            scores=None,
            **{name: getattr(shape.sizes, axis) or None for name, axis in FIELDS.items()},
            num_hidden_layers=shape.layers,
        )
        tables = {"shapes": table} if table else {}
        return StepReport(step.to_dict(), time.perf_counter() - start, rows, notes, tables)

    def _scores(self, model: nn.Module, tokens: Tensor | None) -> Importance:
        if self.scores is None:
            return importance(model, tokens, aggregate=self.aggregate, batch_size=self.batch_size)
        scores, sizes, layers = Importance.load(self.scores), Sizes.of(model.config), len(decoder_layers(model)[1])
        of_experts = scores.neurons is not None and scores.neurons.dim() == 3
        wanted = {
            "neurons": (layers, *[sizes.experts] * of_experts, sizes.neurons),
            "experts": (layers, sizes.experts),
            "expert_neurons": (layers, sizes.experts, sizes.expert_neurons),
            "shared_neurons": (layers, sizes.shared * sizes.expert_neurons),
            "heads": (layers, sizes.heads),
            "channels": (sizes.channels,),
            "layers": (layers,),
        }
        for name, shape in wanted.items():
            found = getattr(scores, name)
            if found is not None and tuple(found.shape) != shape:
                raise ValueError(
                    f"{self.scores} has scores of another model: {name} of shape {tuple(found.shape)}, not {shape}"
                )
        return scores

    def _cut(
        self, model: nn.Module, shape: Shape, scores: Importance, tokens: Tensor | None = None
    ) -> tuple[list[int], float | None]:
        """Give `model` this shape; the layers that went, and the share of the stream's energy that stayed.

        With `tokens`, what stays makes up for what went.
        """
        count, energy, old = len(decoder_layers(model)[1]), None, Sizes.of(model.config)
        kept = kept_widths(old, shape.sizes, count, scores)
        if kept.keys() - {"channels"}:
            check_layout(model, find_axes(model), old, kept.keys())  # before anything changes
        dropped = sorted(scores.layers.argsort(stable=True)[: count - shape.layers].tolist())
        drop_layers(model, dropped)
        stay = [layer for layer in range(count) if layer not in dropped]
        kept |= {axis: [kept[axis][layer] for layer in stay] for axis in kept.keys() - {"channels"}}
        if "channels" in kept:
            energy = float(scores.energy[kept["channels"]].sum() / scores.energy.sum())
        if self.merge_heads and "heads" in kept:
            merge_heads(model, shape.sizes, scores.heads[stay])
        inner = {axis: kept[axis] for axis in ("neurons", "heads") if axis in kept}
        if inner and tokens is not None:
            compensate(model, tokens, **inner, batch_size=self.batch_size)
        if kept:
            corrected = has_rms_norms(model) if self.norm_correction is None else self.norm_correction
            narrow(model, **kept, correction=energy if corrected else None)
        return dropped, energy

    def _search(self, model: nn.Module, tokens: Tensor, shapes: list[Shape], scores: Importance) -> list[dict]:
        """The perplexity of each shape on an eighth of the samples, on which none is trained."""
        held = max(1, len(tokens) // 8)
        rows = []
        for shape in tqdm(shapes, desc="shapes", unit="shape", disable=None):
            copied = shared_copy(model)
            self._cut(copied, shape, scores)
            if self.search_steps:
                Heal(method="full", steps=self.search_steps).apply(copied, tokens[held:], teacher=model)
            found = {name: getattr(shape.sizes, axis) for name, axis in FIELDS.items() if getattr(shape.sizes, axis)}
            found |= {"num_hidden_layers": shape.layers, "parameters": shape.parameters}
            rows.append(found | {"perplexity": perplexity(copied, tokens[:held].flatten(), tokens.shape[1])})
        return rows


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
