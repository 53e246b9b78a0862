"""A step is one method with its hyper-parameters; a recipe is a list of steps.

`Step` is a frozen dataclass: its fields are the method's hyper-parameters with the paper's defaults, and `apply`
edits a model in place. `LinearStep` is the one abstract kind in between, for methods that treat each linear layer
alike; it asks only for `compress(weight, gram)`, a pure function of tensors, and `empty`, the packed layer that
takes the result. Registering a step makes it known by name to `SlimConfig`, YAML recipes and the shell.
"""

import dataclasses
import difflib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .block import Group
from .calibration import Calibration
from .hessian import asymmetric_map
from .memory import shared_copy
from .packed import PackedLinear, linear_weight
from .walk import decoder_layers, walk


STEPS: dict[str, type["Step"]] = {}


def register(name: str, *, paper: str):
    """Class decorator that makes a step known by `name`, with the title and number of its paper."""

    def wrap(cls: type["Step"]) -> type["Step"]:
        if STEPS.get(name, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"step {name!r} is already registered by {STEPS[name].__module__}; choose another name")
        cls.name, cls.paper = name, paper
        STEPS[name] = cls
        return cls

    return wrap


def get_step(name: str) -> type["Step"]:
    """The step class registered as `name`; an unknown name raises a `ValueError` that lists what exists."""
    if name in STEPS:
        return STEPS[name]
    near = difflib.get_close_matches(name, STEPS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown step {name!r}.{hint} Registered steps: {', '.join(sorted(STEPS))}.")


def step_from_dict(data: dict[str, Any] | str) -> "Step":
    """A step from `{"step": name, **fields}` or from its name alone."""
    data = {"step": data} if isinstance(data, str) else dict(data)
    if "step" not in data:
        raise ValueError(f"a step needs its name under 'step', as in {{'step': 'pt2llm'}}; found the keys {[*data]}")
    cls = get_step(data.pop("step"))
    known = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"step {cls.name!r} has no field {key!r}.{hint} Its fields: {', '.join(known)}.")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


@dataclass
class StepReport:
    """What one step did: its recorded form (data-dependent choices written out), the seconds it took, a row for each
    layer it changed or removed, remarks for the reader, and tables of figures worth a picture."""

    step: dict[str, Any]
    seconds: float
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One method with its hyper-parameters. Subclasses are frozen dataclasses decorated with `register`.

    What a step needs may depend on its fields, so these may be properties: `needs_data` (calibration tokens),
    `needs_teacher` (the model as it was before the recipe). `before_packing` is set by steps that need ordinary
    weights, `takes_adapters` by packing steps whose layers can be trained with adapters and merged all the same,
    `trains` by steps that train what they find, `learns_from_itself` by those that have something to learn from the
    model even where no step has changed it before.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_data: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    takes_adapters: ClassVar[bool] = False
    before_packing: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    learns_from_itself: ClassVar[bool] = False

    @abstractmethod
    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        """Edit `model` in place.

        Args:
            tokens: int64 (samples, length), or `None` if the step needs no data.
            teacher: what `make_teacher` gave, if the step needs it, or the model as it was before the recipe. It may
                share its parameter tensors with `model`, so that a step must put new tensors in place of those it
                changes.
            journal: a folder for what a killed run goes on from, if the step keeps one.
        """

    @property
    def keeps_journal(self) -> bool:
        """Whether it runs so long that it should go on where it was after a kill."""
        return self.trains

    def make_teacher(self, model: nn.Module, tokens: Tensor | None, journal: Path | None) -> Any:
        """What `apply` gets as its teacher, made before the first step of a recipe from the model as it is then.

        By default a copy around the same tensors. Nothing else keeps what the steps before this one remove.
        """
        return shared_copy(model)

    def calibration(self, recipe: Calibration) -> Calibration:
        """The data of this step, by default that of the whole recipe."""
        return recipe

    def resolve(self, model: nn.Module) -> "Step":
        """The step with every choice that depends on the model written out, as a saved model records it."""
        return self

    def skeleton(self, model: nn.Module) -> None:  # noqa: B027
        """Give a meta `model` the modules that a checkpoint slimmed by this (resolved) step needs."""

    def sketch(self, model: nn.Module) -> None:
        """Give a meta `model`, with the config of the unslimmed one, the size and shape this step would leave."""
        self.skeleton(model)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe `{"step": name, **fields}`, tuples as lists."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"step": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def matches(name: str, patterns) -> bool:
    """Whether a module name is meant by one of `patterns`: consecutive dotted parts of it, or a shell pattern."""
    return any(f".{p}." in f".{name}." or fnmatch(name, p) for p in patterns)


@dataclass(frozen=True, kw_only=True)
class LinearStep(Step):
    """A method that packs linear layers one by one.

    Args:
        modules_to_not_convert (`tuple[str]`, *optional*): modules left dense, by (part of) their dotted name or by
            shell pattern, besides the output head and tied weights, which always stay dense.
    """

    modules_to_not_convert: tuple[str, ...] | None = None

    packed: ClassVar[bool] = True
    asymmetric: ClassVar[float] = 0.0
    sequential: ClassVar[bool] = True
    accepts_unseen: ClassVar[bool] = False

    @abstractmethod
    def empty(self, linear: nn.Module) -> PackedLinear:
        """The packed layer for `linear`, on the meta device."""

    @abstractmethod
    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """The packed state of one layer, a pure function of tensors.

        Args:
            weight (`Tensor`): fp32 (out_features, in_features).
            gram (`Tensor`, *optional*): fp32 (in_features, in_features), mean of x xᵀ over the calibration tokens; or
                what `share` made of it.
        """

    def share(self, group: Group) -> Any:
        """What `compress` gets in place of the Gram matrix: work that is done once for all layers with one input."""
        return group.gram

    def for_layer(self, name: str) -> "LinearStep":
        """The step with the settings of this layer, where they differ between layers."""
        return self

    def notes(self) -> list[str]:
        """Remarks on the whole step for the report."""
        return []

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The dense linear layers this step packs, by qualified name; call it on a resolved step."""
        return {
            name: module
            for name, module in model.named_modules()
            if type(module) in (nn.Linear, Conv1D) and not matches(name, self.modules_to_not_convert or ())
        }

    def resolve(self, model: nn.Module) -> "LinearStep":
        """The step with the names of all linear layers left dense. Raises a `ValueError` if none is left to pack."""
        if self.needs_data:
            decoder_layers(model)
        patterns = set(self.modules_to_not_convert or ()) | _always_dense(model)
        _refuse_fused_experts(self, model, patterns)
        dense, packed = set(), 0
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, Conv1D):
                keep = matches(name, patterns)
                packed += not keep
                dense |= {name} if keep else set()
        if not packed:
            raise ValueError(
                f"{self.name} found no linear layer to pack in {type(model).__name__}: "
                f"{f'modules_to_not_convert leaves all {len(dense)} dense' if dense else 'it holds none'}. "
                "A model that is quantized already must be loaded dense first."
            )
        # Patterns that name no linear layer (fused experts left dense on purpose) are kept as they were given.
        extra = {p for p in self.modules_to_not_convert or () if not any(matches(name, [p]) for name in dense)}
        return dataclasses.replace(self, modules_to_not_convert=tuple(sorted(dense | extra)))

    def skeleton(self, model: nn.Module) -> None:
        for name, linear in self.targets(model).items():
            model.set_submodule(name, self.for_layer(name).empty(linear))

    def pack(self, name: str, weight: Tensor, shared: Any = None) -> dict[str, Tensor]:
        """`compress` with the checks that concern every method; errors name the layer."""
        check_weight(name, weight)
        try:
            return self.for_layer(name).compress(weight.detach().float(), shared)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def replace(
        self, model: nn.Module, name: str, group: Group | None = None, shared: Any = None, target: Tensor | None = None
    ) -> dict[str, Any]:
        """Pack one layer of `model` in place.

        Args:
            group: what was measured of the layer's inputs, `shared` what `share` made of it.
            target: (in, in), turns the weight into that of asymmetric calibration.

        Returns:
            The layer's row for the report.
        """
        linear = model.get_submodule(name)
        dense = linear_weight(linear).detach()
        packed = self.for_layer(name).empty(linear)
        packed.load_packed(self.pack(name, dense if target is None else dense.float() @ target, shared))
        packed.bias = linear.bias
        packed.train(linear.training)
        model.set_submodule(name, packed)
        return layer_row(name, packed, dense, group.gram if group is not None and group.tokens else None)

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start, step = time.perf_counter(), self
        names = list(self.targets(model))
        for name in names:  # before the first layer is changed
            check_weight(name, model.get_submodule(name).weight)
        if self.needs_data:
            step = self.allocate(model, tokens)
        if step.needs_data:
            rows = [row for rows in step.visit(model, tokens, names) for row in rows]
        else:
            rows = [step.replace(model, n) for n in tqdm(names, desc=self.name, unit="layer", disable=None)]
        return StepReport(step.to_dict(), time.perf_counter() - start, rows, step.notes())

    def allocate(self, model: nn.Module, tokens: Tensor, visiting=nullcontext) -> "LinearStep":
        """The step with what it decides on the data before any layer is packed written out, by default nothing."""
        return self

    def visit(self, model: nn.Module, tokens: Tensor, names: list[str], visiting=nullcontext) -> Iterator[list[dict]]:
        """Pack the layers `names` with calibration data, one decoder layer after the other; yields each one's rows.

        Args:
            visiting: as for `walk`.
        """
        prefix, layers = decoder_layers(model)
        outside = [name for name in names if not name.startswith(f"{prefix}.")]
        if outside:
            raise ValueError(
                f"{self.name} calibrates inside decoder layers, but these linear layers lie outside {prefix}: "
                f"{outside}. Add them to modules_to_not_convert."
            )
        missed = set(names)
        blocks = walk(model, tokens, reference=self.asymmetric > 0, visiting=visiting)
        for block in tqdm(blocks, total=len(layers), desc=self.name, unit="block", disable=None):
            inside = {name: model.get_submodule(name) for name in names if name.startswith(f"{block.name}.")}
            rows = []
            groups = block.gram_groups(inside, sequential=self.sequential, accept_unseen=self.accepts_unseen)
            for group in groups:
                shared = self.share(group)
                target = None if group.cross is None else asymmetric_map(group.gram, group.cross, self.asymmetric)
                rows += [self.replace(model, name, group, shared, target) for name in group.names]
            missed -= {row["name"] for row in rows}
            yield rows
        if missed:
            raise ValueError(f"{self.name} saw no calibration token in {sorted(missed)}; pass more or longer samples")


def check_weight(name: str, weight: Tensor) -> None:
    """Raise unless the weight of layer `name` is floating-point and finite."""
    if not weight.is_floating_point():
        raise TypeError(f"{name}.weight has dtype {weight.dtype}; only floating-point weights can be packed")
    if not all(torch.isfinite(extreme) for extreme in weight.detach().aminmax()):
        raise ValueError(f"{name}.weight holds NaN or infinite values; the checkpoint is damaged, load a sound one")


def layer_row(name: str, packed: PackedLinear, dense: Tensor, gram: Tensor | None = None) -> dict[str, Any]:
    """The report's row for one packed layer: name, logical shape, stored bits per weight, error against `dense`."""
    weights = packed.in_features * packed.out_features
    return {
        "name": name,
        "shape": [packed.out_features, packed.in_features],
        "bits_per_weight": packed.stored_bits() / weights,
        "relative_error": relative_error(packed, dense, gram),
    }


def relative_error(packed: PackedLinear, weight: Tensor, gram: Tensor | None = None) -> float:
    """||D X||² / ||W X||² with D = packed - W, on the calibration tokens, or ||D||² / ||W||² without a Gram matrix."""
    delta = packed.dense().sub_(weight)
    if gram is None:
        lost, norm = (torch.linalg.vector_norm(w, dtype=torch.float32) ** 2 for w in (delta, weight))
    else:
        gram = gram.to(delta)
        lost, norm = (torch.sum((w @ gram).mul_(w)) for w in (delta, weight.float()))
    return float(lost / norm.clamp(min=1e-30))


def _always_dense(model: nn.Module) -> set[str]:
    """Names of the output head and of modules with tied weights: packing one end of a tie would break it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return names | {name for name, module in model.named_modules() if head is not None and module is head}


def _refuse_fused_experts(step: LinearStep, model: nn.Module, patterns: set[str]) -> None:
    fused = {
        f"{name}.{key}": tuple(parameter.shape)
        for name, module in model.named_modules()
        if "conv" not in type(module).__name__.lower() and not matches(name, patterns)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }
    if fused:
        name, shape = next(iter(fused.items()))
        raise ValueError(
            f"{type(model).__name__} holds its experts in {len(fused)} fused 3-D parameters (first: {name} {shape}), "
            f"which {step.name} cannot pack and would leave dense. To pack only the other layers knowingly, pass "
            f"modules_to_not_convert=({name.rsplit('.', 2)[-2]!r},)."
        )
