"""Minitron: a smaller model of the same kind, by one look at its activations (arXiv 2407.14679, 2408.11796).

Neurons, attention heads, hidden channels, experts and layers are scored in one pass over calibration data
(`optimum_slim/importance.py`) and the least important ones are taken out (`optimum_slim/width.py`, `surgery.py`). All
layers keep the same widths, so that what is left is an ordinary model with a smaller config, which loads without this
package. It needs training afterwards, best by distillation from the model it was:

    SlimConfig([Minitron(intermediate_size=1024, hidden_size=448), Heal(method="full", steps=300)])

Query heads are ranked within the group of their key-value head, and each group keeps equally many; so are experts in
the groups of a group-limited router. Each layer keeps its own experts, each expert its own neurons. Layers go by block
influence, 1 - E[cos(in, out)], wherever they are, or by the loss without them (`layer_loss.py`).

With `params` or `ratio` in place of sizes, all shapes near that number of parameters (`shapes.py`) are cut out of the
model, trained for `search_steps` if asked for, and ranked by their perplexity on held-out samples (`shape_search.py`);
the best one stays, and the report has them all.

A norm divides by a mean over the channels that are left. `norm_correction` multiplies its weight so that what comes
out keeps its size, given the share of the stream's energy that was kept; removing dead channels is exact that way. The
authors leave that to the distillation.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..axes import Sizes, find_axes
from ..compensation import compensate
from ..importance import AGGREGATES, Importance, importance
from ..journal import digest
from ..layer_loss import LAYER_METRICS, least_layers, with_losses
from ..layout import check_layout
from ..processes import from_main
from ..ranking import heads_together, kept_widths, merge_heads
from ..shape_search import rank_shapes
from ..shapes import Counter, Shape, candidates, number_of
from ..step import Step, StepReport, register
from ..surgery import drop_layers
from ..walk import decoder_layers
from ..width import check_dense, check_routing, has_rms_norms, narrow


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
            on the calibration data (`compensation.py`). Takes as long as two or three passes over them. Shapes are
            compared without it.
        layer_metric (`str`): which layers go: `"block_influence"`, those that change the hidden states least;
            `"loss"`, those without which, one by one, the loss grows least; `"contiguous"`, the block of neighbours
            without which it grows least, never the first or last layer. Losses are measured on 16 samples.
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
    layer_metric: str = "block_influence"
    batch_size: int = 8

    before_packing: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "aggregate", tuple(self.aggregate))
        if self.scores is not None:
            object.__setattr__(self, "scores", str(self.scores))
        if len(self.aggregate) != 2 or any(name not in AGGREGATES for name in self.aggregate):
            raise ValueError(f"aggregate must be two of {', '.join(AGGREGATES)}, found {self.aggregate!r}")
        if self.layer_metric not in LAYER_METRICS:
            raise ValueError(f"layer_metric must be one of {', '.join(LAYER_METRICS)}, found {self.layer_metric!r}")
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
        if not self.searches and (self.search_steps or self.tolerance != Minitron.tolerance):
            raise ValueError("search_steps and tolerance belong to a search; pass params='4B' or ratio=0.5 with them")

    @property
    def needs_data(self) -> bool:
        fitted = (self.intermediate_size, self.num_attention_heads, self.num_key_value_heads)
        compensated = self.compensate and any(size is not None for size in fitted)
        return self.scores is None or compensated or self.searches

    @property
    def keeps_journal(self) -> bool:
        return self.searches

    @property
    def searches(self) -> bool:
        """Whether the shape is looked for, not given."""
        return self.params is not None or self.ratio is not None

    def shapes(self, model: nn.Module) -> list[Shape]:
        """What the model may be cut to: the sizes asked for, or those with about so many parameters."""
        counter = Counter(model)
        if not self.searches:
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
        scores = self._scores(model, tokens, shapes)
        ranked = from_main(self._ranked(model, tokens, shapes, scores, journal)) if len(shapes) > 1 else {}
        shape, layers = next(iter(ranked or shapes)), len(stack)
        dropped, energy, fitted = self._cut(model, shape, scores, tokens if self.compensate else None)
        rows = [{"name": f"{prefix}.{i}", "block_influence": value.item()} for i, value in enumerate(scores.layers)]
        for row, value in zip(rows, [] if scores.loss_increase is None else scores.loss_increase[0], strict=False):
            row |= {} if value.isnan() else {"loss_increase": value.item()}
        notes = [f"{before:,} parameters became {model.num_parameters():,}"]
        changed = [
            f"{name} {getattr(old, axis)} to {getattr(shape.sizes, axis)}"
            for name, axis in FIELDS.items()
            if getattr(old, axis) != getattr(shape.sizes, axis)
        ]
        notes += [f"narrower: {', '.join(changed)}"] if changed else []
        notes += [f"kept {energy:.1%} of the residual stream's energy"] if energy is not None else []
        if fitted:
            cut, left = (sum(row[key] for row in fitted) / len(fitted) for key in ("cut", "compensated"))
            notes.append(f"error of the outputs of {len(fitted)} projections {cut:.1%}, compensated {left:.1%}")
        why = LAYER_METRICS[self.layer_metric]
        notes += [f"dropped layers {', '.join(map(str, dropped))} of {layers} by {why}"] if dropped else []
        notes += [f"the best of {len(ranked)} shapes, {_outcome(ranked[shape], self.search_steps)}"] if ranked else []
        step = dataclasses.replace(
            self,
            params=None,
            ratio=None,
            tolerance=Minitron.tolerance,
            search_steps=0,
            scores=None,
            aggregate=scores.aggregate,
            **{name: getattr(shape.sizes, axis) or None for name, axis in FIELDS.items()},
            num_hidden_layers=shape.layers,
        )
        tables = {"shapes": _table(ranked)} if ranked else {}
        return StepReport(step.to_dict(), time.perf_counter() - start, rows, notes, tables)

    def ranking(self, model: nn.Module, tokens: Tensor, *, journal=None) -> list[dict[str, Any]]:
        """How the shapes that the step has to choose from do, best first; `model` is not changed.

        Args:
            tokens: int64 (samples, length).
            journal: as for `apply`.

        Returns:
            A row for each: `rank`, the sizes by the names of the config, `parameters`, `perplexity` as it is cut and
            `perplexity_healed` after `search_steps` (`None` without).

        Raises:
            `ValueError`: no shape has so many parameters.
        """
        shapes = self.shapes(model)
        return _table(self._ranked(model, tokens, shapes, self._scores(model, tokens, shapes), journal))

    def _scores(self, model: nn.Module, tokens: Tensor | None, shapes: list[Shape]) -> Importance:
        if self.scores is None:
            scores = importance(model, tokens, aggregate=self.aggregate, batch_size=self.batch_size)
        else:
            scores = self._read_scores(model)
        drops = {len(scores.layers) - shape.layers for shape in shapes} - {0}
        return from_main(with_losses(scores, model, tokens, drops, self.layer_metric))

    def _read_scores(self, model: nn.Module) -> Importance:
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
            "loss_increase": (layers, layers),
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
    ) -> tuple[list[int], float | None, list[dict[str, Any]]]:
        """Give `model` this shape; with `tokens`, what stays makes up for what went.

        Returns:
            The layers that went, the share of the stream's energy that stayed, and what `compensate` did.
        """
        count, energy, old, fitted = len(decoder_layers(model)[1]), None, Sizes.of(model.config), []
        kept = kept_widths(old, shape.sizes, count, scores)
        check_dense(model)  # all that can be wrong is found before anything changes
        rms = "channels" in kept and has_rms_norms(model)
        if "channels" in kept and self.norm_correction and not rms:
            raise ValueError(
                f"the norms of {type(model).__name__} subtract a mean, so no factor makes up for missing channels; "
                "pass norm_correction=False"
            )
        if kept.keys() - {"channels"}:
            check_layout(model, find_axes(model), old, kept.keys())
        dropped = least_layers(scores, count - shape.layers, self.layer_metric)
        drop_layers(model, dropped)
        stay = [layer for layer in range(count) if layer not in dropped]
        kept |= {axis: [kept[axis][layer] for layer in stay] for axis in kept.keys() - {"channels"}}
        if "channels" in kept:
            energy = float(scores.energy[kept["channels"]].sum() / scores.energy.sum())
        if self.merge_heads and "heads" in kept:
            merge_heads(model, shape.sizes, scores.heads[stay])
        inner = {axis: kept[axis] for axis in ("neurons", "heads") if axis in kept}
        if self.merge_heads:  # the merged heads make up for the others already
            inner.pop("heads", None)
        if inner and tokens is not None:
            fitted = compensate(model, tokens, **inner, batch_size=self.batch_size)
        if kept:
            narrow(model, **kept, correction=energy if rms and self.norm_correction is not False else None)
        return dropped, energy, fitted

    def _ranked(self, model, tokens, shapes: list[Shape], scores: Importance, journal) -> dict[Shape, dict[str, Any]]:
        settings = self.to_dict()
        if self.scores is not None:
            settings["scores"] = digest((n, value) for n, value in vars(scores).items() if isinstance(value, Tensor))
        cut, steps = partial(self._cut, scores=scores), self.search_steps
        return rank_shapes(model, tokens, shapes, cut, steps=steps, journal=journal, settings=settings)


def _table(ranked: dict[Shape, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for the report, sizes by the names of the config."""
    rows = []
    for shape, figures in ranked.items():
        sizes = {name: getattr(shape.sizes, axis) for name, axis in FIELDS.items() if getattr(shape.sizes, axis)}
        rows.append({"rank": figures["rank"]} | sizes | {"num_hidden_layers": shape.layers} | figures)
    return rows


def _outcome(figures: dict[str, Any], steps: int) -> str:
    healed = f", {figures['perplexity_healed']:.4g} after {steps} steps" if steps else ""
    return f"perplexity {figures['perplexity']:.4g}{healed}"
