"""Healing: a short training after pruning, from the unpruned model or from text, by LoRA, QLoRA or in full.

Gromov et al. (arXiv 2403.17887) heal a depth-pruned model with QLoRA: adapters on the feed-forward layers only, rank
64, alpha = rank, dropout 0.05, learning rate 3e-4 with a cosine and 100 warm-up steps, 5000 steps of 16 sequences,
next-token loss. Here the default loss is distillation, forward KL from the model as it was before pruning, and the
default data are samples of that model, so that nothing but the model is needed. `hidden_weight` adds the paper's
footnote: where layers were removed, the residual stream should be what it was behind them.

The teacher costs no second copy of the weights: it shares every tensor that is not trained with the student, and what
is trained or merged gets a new tensor. Where little is shared, it can be in 4 bits or on disk (`teacher.py`). Adapters
are merged into the 16-bit weights at the end (for QLoRA as well: its 4-bit base exists during training only), or stay
(`merge=False`).

Weights that a sparse step dropped stay dropped. Adapters on sparse layers are masked, in training as in the merge
(`sparse_training.py`), `"full"` trains the kept values, and the layers end as they came: packed ones with the same
index byte for byte, ordinary ones (`packed=False`) with zeros in the same places. Layers of codes (`bits`) train on
weights rounded to their grid, so that the loss that chooses the best state is that of what is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from ..cached_distillation import CachedDistillation
from ..calibration import Calibration
from ..fourbit import as_4bit, finish, nf4, remove_adapters
from ..hidden_states import projected
from ..losses import TEACHER, Distillation, check_divergence, check_hidden, next_token_loss
from ..packed import linear_shape
from ..sparse import SparseLinear
from ..sparse_training import is_sparse, sparse_stand_ins, trained_values
from ..step import Step, StepReport, register
from ..student import (
    add_adapters,
    differentiable,
    ends,
    feed_forward_layers,
    merge_delta,
    own_tensors,
    put_back_unused,
    require_peft,
    seams,
)
from ..teacher import TeacherForm
from ..teacher_cache import TeacherCache
from ..teacher_correction import RATE, CorrectedDistillation, corrected, trained_along
from ..train import FitReport, fit, usual_precision


METHODS = ("lora", "qlora", "full", "norms")
LOSSES = ("distill", "next_token")
CORRECTION = "correction"  # folder inside a journal
OF_THE_TEACHER = ("kl_weight", "divergence", "hidden_weight", "hidden_distance", "hidden_layers", "teacher_correction")
OF_THE_TEACHER += ("teacher_bits", "teacher_top_k", "teacher_cache")


@register("heal", paper="The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887), Section 3 and A.2")
@dataclass(frozen=True, kw_only=True)
class Heal(Step):
    """Train the pruned model for a short time, with LoRA, QLoRA, in full, or its norms only.

    Args:
        method (`str`): `"lora"`, `"qlora"` (LoRA on a 4-bit base, not for sparse layers), `"full"` (of sparse layers
            the kept values, not with `bits`) or `"norms"`.
        loss (`str`): `"distill"`, forward KL from the model as it was before the recipe, or `"next_token"`.
        rank, alpha, dropout: of the adapters; `alpha` is `rank` by default. On sparse layers dropout makes a step
            about 1.5 times as long.
        target_modules (`str` or `tuple[str]`): what gets adapters: `"ffn"` for the feed-forward layers,
            `"all-linear"`, or names as PEFT takes them.
        steps (`int`): optimizer steps.
        batch_size (`int`): sequences per optimizer step; `micro_batch_size` of them go through the model at once.
        learning_rate, warmup_steps, weight_decay, max_grad_norm: AdamW under a cosine with linear warm-up, of at most
            a fifth of the steps.
        temperature, kl_weight, divergence: of the distillation, see `Distillation`.
        hidden_weight (`float` or `"dynamic"`), hidden_distance: of its term on hidden states.
        hidden_layers (`str` or pairs of `int`): which states those are: `"seams"` where layers were removed, `"ends"`
            (Minitron's: the embeddings and the layer two before the last), or pairs (student's layer, teacher's), from
            0, -1 for the embeddings.
        teacher_correction (`int` or `"alongside"`): for data that the teacher was not trained on, see
            `teacher_correction.py`: so many steps of next-token training of a copy of the teacher before the
            distillation, or as many as the student's, together with them. Training the copy takes 16 bytes for each of
            its parameters.
        teacher_bits (`int`, *optional*): 4 makes the teacher a 4-bit copy of the unpruned model (nf4 of bitsandbytes).
        teacher_top_k (`int`, *optional*): run the teacher once, and keep this many of its likeliest tokens on disk,
            256 for example; see `TeacherCache`.
        teacher_cache (`str`, *optional*): folder in which that stays for other runs with this teacher and these data;
            by default it is gone with the run.
        samples, length (`int`, *optional*): of the training data; by default those of the recipe's calibration.
        held_out (`float`): share of the samples that is kept apart; the best state on it is what is kept.
        evaluate_every, patience: steps between evaluations, and how many without progress end the training.
        activation_checkpointing (`bool`): less memory for more time.
        merge (`bool`): merge the adapters into the weights, or leave them in the model as a PEFT adapter.
        quantization (`dict`, *optional*): arguments of the `BitsAndBytesConfig` of `"qlora"`; by default nf4 with
            double quantization.
        seed (`int`): of adapters, data order and dropout.

    Raises:
        `ImportError`: PEFT (or bitsandbytes) is missing.
        `ValueError`: fields out of range, no layer to adapt, a loss that is not finite.
    """

    method: str = "lora"
    loss: str = "distill"
    rank: int = 64
    alpha: int | None = None
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "ffn"
    steps: int = 100
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    kl_weight: float = 1.0
    divergence: str = "forward"
    hidden_weight: float | str = 0.0
    hidden_distance: str = "relative"
    hidden_layers: str | tuple[tuple[int, int], ...] = "seams"
    teacher_correction: int | str = 0
    teacher_bits: int | None = None
    teacher_top_k: int | None = None
    teacher_cache: str | None = None
    samples: int | None = None
    length: int | None = None
    held_out: float = 0.05
    evaluate_every: int = 50
    patience: int | None = None
    activation_checkpointing: bool = False
    merge: bool = True
    quantization: dict[str, Any] | None = None
    seed: int = 0

    needs_data: ClassVar[bool] = True
    before_packing: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __post_init__(self):
        for name, values in (("method", METHODS), ("loss", LOSSES)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, found {getattr(self, name)!r}")
        for name in ("rank", "steps", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, found {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate!r}")
        if not self.merge and self.method not in ("lora", "qlora"):
            raise ValueError(f"method={self.method!r} trains the weights themselves, so there is no adapter to keep")
        check_divergence(self.divergence)
        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"kl_weight must be in [0, 1], found {self.kl_weight!r}")
        check_hidden(self.hidden_weight, self.hidden_distance)
        if self.loss == "distill" and not self.kl_weight and not self.hidden_weight:
            raise ValueError("kl_weight=0 leaves the unpruned model no part; use loss='next_token', or hidden_weight")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, found {self.temperature!r}; 1 leaves the logits as they are"
            )
        if not self.hidden_weight and (self.hidden_layers, self.hidden_distance) != ("seams", "relative"):
            raise ValueError(
                "hidden_layers and hidden_distance say what hidden_weight weighs; pass hidden_weight as well"
            )
        if isinstance(self.hidden_layers, str):
            if self.hidden_layers not in ("seams", "ends"):
                raise ValueError(
                    f"hidden_layers must be 'seams', 'ends' or pairs of layers, found {self.hidden_layers!r}"
                )
        else:
            object.__setattr__(self, "hidden_layers", tuple((int(a), int(b)) for a, b in self.hidden_layers))
        for name in OF_THE_TEACHER:
            if getattr(self, name) != getattr(Heal, name) and self.loss != "distill":
                raise ValueError(f"{name} is about the unpruned model; it needs loss='distill'")
        if self.quantization is not None and self.method != "qlora":
            raise ValueError(f"quantization is for method='qlora', found method={self.method!r}")
        if self.teacher_cache is not None:
            object.__setattr__(self, "teacher_cache", str(self.teacher_cache))
        self._check_correction()
        self._form.check_loss(kl_weight=self.kl_weight, divergence=self.divergence, hidden_weight=self.hidden_weight)

    def _check_correction(self) -> None:
        given = self.teacher_correction
        if given != "alongside" and (type(given) is not int or given < 0):
            raise ValueError(f"teacher_correction must be a number of steps or 'alongside', found {given!r}")
        if given and self.hidden_weight and self.hidden_layers == "seams":
            raise ValueError(
                "a corrected teacher has weights of its own, so hidden_layers='seams' cannot tell which layers were "
                "removed; use hidden_layers='ends', or pairs of layers"
            )
        if given == "alongside" and (self.teacher_bits or self.teacher_top_k or self.hidden_weight):
            raise ValueError(
                "teacher_correction='alongside' trains the teacher's weights and compares logits alone; leave out "
                "teacher_bits, teacher_top_k and hidden_weight, or pass a number of steps"
            )

    @property
    def _form(self) -> TeacherForm:
        at_once = self.micro_batch_size or self.batch_size
        return TeacherForm(self.teacher_bits, self.teacher_top_k, self.teacher_cache, self.temperature, at_once)

    @property
    def needs_teacher(self) -> bool:
        return self.loss == "distill"

    def check_sparse(self, *, packed: bool, bits: int | None) -> None:
        """Raise a `ValueError` unless layers with dropped weights can be trained in this way.

        Args:
            packed: whether they are stored without the dropped weights, or are ordinary ones with zeros.
            bits: of their kept weights, or `None` for 16 or 32.
        """
        if self.method == "qlora":
            raise ValueError(
                "method='qlora' trains on a 4-bit copy, in which dropped weights of sparse layers are weights like "
                "others; use method='lora', which keeps the mask"
            )
        if self.method == "full" and bits is not None:
            raise ValueError(
                f"method='full' trains weights, and the kept weights of these layers are codes of {bits} bits; use "
                "method='lora', or prune with bits=None"
            )
        if not self.merge and not packed:
            raise ValueError(
                "merge=False would leave an adapter on ordinary layers with zeros, where PEFT knows no mask; use "
                "merge=True, or packed=True in the step that prunes"
            )

    def calibration(self, recipe: Calibration) -> Calibration:
        return recipe.resized(self.samples, self.length)

    def make_teacher(self, model: nn.Module, tokens: Tensor | None, journal: Path | None) -> nn.Module | TeacherCache:
        teacher = self._corrected(super().make_teacher(model, tokens, journal), tokens, journal)
        made = self._form.make(teacher, tokens, journal)
        made.correction = getattr(teacher, "correction", "")
        return made

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start = time.perf_counter()
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        sparse = [module for module in model.modules() if isinstance(module, SparseLinear) or is_sparse(module)]
        for module in sparse if self.method in ("qlora", "full") else ():
            self.check_sparse(packed=isinstance(module, SparseLinear), bits=getattr(module, "bits", None))
        taught, correction = contextlib.nullcontext(), ""
        if self.needs_teacher:
            teacher = self._corrected(teacher, tokens, journal)
            taught, correction = self._form.ready(teacher, tokens, journal), getattr(teacher, "correction", "")
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), taught as teacher:
            torch.manual_seed(self.seed)
            loss = self._loss(model, teacher)
            train = self._train_adapters if self.method in ("lora", "qlora") else self._train_weights
            try:
                rows, report = train(model, tokens, loss, journal)
            except FloatingPointError:
                if journal is not None:  # another learning rate is another correction
                    shutil.rmtree(Path(journal) / CORRECTION, ignore_errors=True)
                raise
            finally:
                if not getattr(model, "_hf_peft_config_loaded", False):
                    for name, parameter in model.named_parameters():
                        parameter.requires_grad_(flags[name])
        notes = [*filter(None, [correction]), self._note(report), *self._form.notes(teacher)]
        if sparse:
            notes.append(f"{len(sparse)} sparse layers kept their mask: no dropped weight came back")
        recorded = dataclasses.replace(self, teacher_cache=None).to_dict()
        return StepReport(recorded, time.perf_counter() - start, rows, notes, {"healing": report.history})

    def _corrected(self, teacher: nn.Module | TeacherCache, tokens: Tensor, journal: Path | None):
        """The teacher, corrected if that is to be done before the distillation and has not been done."""
        done = isinstance(teacher, TeacherCache) or hasattr(teacher, "correction")
        if done or not self.teacher_correction or self.teacher_correction == "alongside":
            return teacher
        settings = self._fit_settings(teacher.dtype, teacher.device) | {"steps": self.teacher_correction}
        settings["journal"] = None if journal is None else Path(journal) / CORRECTION
        return corrected(teacher, tokens, **settings, description="teacher correction")

    def _loss(self, model: nn.Module, teacher: nn.Module | TeacherCache | None):
        if self.loss == "next_token":
            return next_token_loss
        if isinstance(teacher, TeacherCache):
            return CachedDistillation(teacher, self.kl_weight)
        if self.teacher_correction == "alongside":
            return CorrectedDistillation(teacher, self.temperature, self.kl_weight, self.divergence)
        pairs = ()
        if self.hidden_weight:
            find = {"seams": seams, "ends": ends}.get(self.hidden_layers)
            pairs = self.hidden_layers if find is None else find(model, teacher)
            if not pairs:
                raise ValueError(
                    "hidden_weight compares what leaves the layers before the removed ones, and there are none; use "
                    "hidden_weight=0 or hidden_layers='ends'"
                )
        return Distillation(
            teacher,
            self.temperature,
            self.kl_weight,
            self.divergence,
            self.hidden_weight,
            pairs,
            self.hidden_distance,
        )

    def _fit(self, model: nn.Module, tokens: Tensor, loss, journal, dtype: torch.dtype) -> FitReport:
        between, rates = contextlib.nullcontext(), {}
        if self.hidden_weight:
            between = projected(model, loss.teacher)
        if self.teacher_correction == "alongside":
            between, rates = trained_along(model, loss.source), {TEACHER: RATE}
        with between:
            settings = self._fit_settings(dtype, model.device) | {"rates": rates, "journal": journal}
            return fit(model, tokens, loss, **settings, description=f"healing ({self.method}, {self.loss})")

    def _fit_settings(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What `fit` is told about a model of this dtype."""
        same = ("steps", "learning_rate", "batch_size", "micro_batch_size", "warmup_steps", "weight_decay", "seed")
        same += ("max_grad_norm", "held_out", "evaluate_every", "patience", "activation_checkpointing")
        return {name: getattr(self, name) for name in same} | {"mixed_precision": usual_precision(dtype, device)}

    def _train_weights(self, model, tokens, loss, journal) -> tuple[list[dict], FitReport]:
        """Train all weights, or the norms', in fp32 copies that then take the dtype the weights had."""
        full = self.method == "full"
        with contextlib.ExitStack() as stack:
            if full:
                stack.enter_context(sparse_stand_ins(model))
                stack.enter_context(trained_values(model))
            names = [
                f"{name}.{key}" if name else key
                for name, module in model.named_modules()
                for key, parameter in module.named_parameters(recurse=False)
                if (full and parameter.is_floating_point()) or "norm" in type(module).__name__.lower()
            ]
            dtype = model.dtype
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            model.requires_grad_(False)
            own_tensors(model, names, dict.fromkeys(names, torch.float32), trained=True)
            try:
                report = self._fit(model, tokens, loss, journal, dtype)
            finally:
                own_tensors(model, names, dtypes, trained=False)
            shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        return [{"name": name, "shape": shapes[name]} for name in names if name in shapes], report

    def _train_adapters(self, model, tokens, loss, journal) -> tuple[list[dict], FitReport]:
        require_peft()
        dtype, targets = model.dtype, self._targets(model)
        base = sparse_stand_ins(model)
        if self.method == "qlora":
            config = self._quantization(dtype)
            if self.merge:
                base = as_4bit(model, config)
            else:
                finish(model, config)
                base = differentiable(model)
        with base as originals:
            settings = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
            adapted = add_adapters(model, targets, **settings, rounded=self.merge)
            kept = False
            try:
                if self.method == "lora" and put_back_unused(model, originals, adapted):
                    self.check_sparse(packed=False, bits=None)
                rows = [{"name": name, "shape": list(linear_shape(layer.get_base_layer()))} for name, layer in adapted]
                report = self._fit(model, tokens, loss, journal, dtype)
                kept = not self.merge
                for name, layer in adapted if self.merge else ():
                    linear = originals.get(name) if self.method == "qlora" else None
                    merge_delta(linear or layer.get_base_layer(), layer.get_delta_weight("default"))
            finally:
                if not kept:
                    remove_adapters(model)
        return rows, report

    def _quantization(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        if self.quantization is not None:
            return BitsAndBytesConfig(**self.quantization)
        return nf4(dtype)

    def _targets(self, model: nn.Module) -> str | list[str]:
        if self.target_modules != "ffn":
            return self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        names = feed_forward_layers(model)
        if not names:
            raise ValueError(
                f"found no feed-forward layer of nn.Linear in {type(model).__name__} (experts fused into 3-D "
                "parameters take no LoRA); pass target_modules='all-linear' or names, or method='norms'"
            )
        return names

    def _note(self, report: FitReport) -> str:
        what = f"{self.method} rank {self.rank}" if self.method in ("lora", "qlora") else self.method
        return f"healed by {what} ({self.loss}): {report.outcome()}"
