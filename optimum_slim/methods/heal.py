"""Healing: a short training after pruning, from the unpruned model or from text, by LoRA, QLoRA or in full.

Gromov et al. (arXiv 2403.17887) heal a depth-pruned model with QLoRA: adapters on the feed-forward layers only, rank
64, alpha = rank, dropout 0.05, learning rate 3e-4 with a cosine and 100 warm-up steps, 5000 steps of 16 sequences,
next-token loss. Here the default loss is distillation, forward KL from the model as it was before pruning, and the
default data are samples of that model, so that nothing but the model is needed. `hidden_weight` adds the paper's
footnote: where layers were removed, the residual stream should be what it was behind them.

The teacher costs no second copy of the weights: it shares every tensor that is not trained with the student, and what
is trained or merged gets a new tensor. Where little is shared, it can be in 4 bits or on disk (`teacher.py`). How
weights are trained, and what becomes of sparse layers, is in `training_step.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cached_distillation import CachedDistillation
from ..hidden_states import projected
from ..losses import TEACHER, Distillation, check_divergence, check_hidden, next_token_loss
from ..step import StepReport, register
from ..student import ends, seams
from ..teacher import TeacherForm
from ..teacher_cache import TeacherCache
from ..teacher_correction import RATE, CorrectedDistillation, corrected, trained_along
from ..train import FitReport, fit
from ..training_step import TrainingStep


LOSSES = ("distill", "next_token")
CORRECTION = "correction"  # folder inside a journal
OF_THE_TEACHER = ("kl_weight", "divergence", "hidden_weight", "hidden_distance", "hidden_layers", "teacher_correction")
OF_THE_TEACHER += ("teacher_bits", "teacher_top_k", "teacher_cache")


@register("heal", paper="The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887), Section 3 and A.2")
@dataclass(frozen=True, kw_only=True)
class Heal(TrainingStep):
    """Train the pruned model for a short time, with LoRA, QLoRA, in full, or its norms only.

    Args:
        loss (`str`): `"distill"`, forward KL from the model as it was before the recipe, or `"next_token"`.
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
        others: see `TrainingStep`.

    Raises:
        `ImportError`: PEFT (or bitsandbytes) is missing.
        `ValueError`: fields out of range, no layer to adapt, a loss that is not finite.
    """

    loss: str = "distill"
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

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, found {self.loss!r}")
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

    def make_teacher(self, model: nn.Module, tokens: Tensor | None, journal: Path | None) -> nn.Module | TeacherCache:
        teacher = self._corrected(super().make_teacher(model, tokens, journal), tokens, journal)
        made = self._form.make(teacher, tokens, journal)
        made.correction = getattr(teacher, "correction", "")
        return made

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start = time.perf_counter()
        sparse = self.check_model(model)
        taught, correction = contextlib.nullcontext(), ""
        if self.needs_teacher:
            teacher = self._corrected(teacher, tokens, journal)
            taught, correction = self._form.ready(teacher, tokens, journal), getattr(teacher, "correction", "")
        with taught as teacher:
            loss = self._loss(model, teacher)
            try:
                rows, report = self.train(model, partial(self._fit, model, tokens, loss, journal))
            except FloatingPointError:
                if journal is not None:  # another learning rate is another correction
                    shutil.rmtree(Path(journal) / CORRECTION, ignore_errors=True)
                raise
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
        settings = self.fit_settings(teacher.dtype, teacher.device) | {"steps": self.teacher_correction}
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
            settings = self.fit_settings(dtype, model.device) | {"rates": rates, "journal": journal}
            return fit(model, tokens, loss, **settings, description=f"healing ({self.method}, {self.loss})")

    def _note(self, report: FitReport) -> str:
        what = f"{self.method} rank {self.rank}" if self.method in ("lora", "qlora") else self.method
        return f"healed by {what} ({self.loss}): {report.outcome()}"
