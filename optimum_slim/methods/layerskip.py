"""LayerSkip (arXiv 2404.16710): a model that can end at any of its layers, and so can be its own draft.

Training skips layers at random, the deeper the likelier, and lets the states behind some layers through the final norm
and the head, so that they learn to be outputs (`layerskip_loss.py`). What comes out is an ordinary model with the same
weights' names and shapes. Decoding with its first layers as the draft is in `speculation.py`; it needs no training and
gains from this one.

    SlimConfig(LayerSkip(steps=500))
    SlimConfig(LayerSkip.preset("topv2", steps=1000))
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layerskip_loss import LayerSkipLoss
from ..processes import from_main, place
from ..step import StepReport, register
from ..train import FitReport, fit
from ..training_step import TrainingStep
from ..tuning import SpeculationTuning, keep_tuning, tune_speculation


PRESETS = {
    "llama2-7b": {"p_max": 0.1, "e_scale": 0.2, "rotation": 8, "learning_rate": 3e-5},
    "llama2-13b": {"p_max": 0.1, "e_scale": 0.1, "rotation": 39, "learning_rate": 2e-5},
    "llama3": {"p_max": 0.1, "e_scale": 0.1, "rotation": 8},
    "scratch-1.5b": {"p_max": 0.1, "e_scale": 0.2, "rotation": 23, "dropout_schedule": "exponential"},
    "scratch-7b": {"p_max": 0.2, "e_scale": 0.2, "rotation": 31, "dropout_schedule": "exponential"},
    "code": {"p_max": 0.1, "e_scale": 1.0, "rotation": 16},
    "topv2": {"p_max": 0.2, "e_scale": 1.0, "curriculum": "gradual"},
}
PRESETS["scratch-1.5b"]["learning_rate"] = PRESETS["scratch-7b"]["learning_rate"] = 8e-4
PROMPTS, PROMPT = 4, 32  # samples whose beginnings the decoder is tuned on, and so many tokens of each


@register("layerskip", paper="LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding (2404.16710)")
@dataclass(frozen=True, kw_only=True)
class LayerSkip(TrainingStep):
    """Train with layer dropout and early-exit losses.

    Args:
        p_max, e_scale, exit_scales, curriculum, rotation, always_last, dropout_schedule, exit_layers, exit_target: see
            `LayerSkipLoss`.
        tune (`bool`): afterwards measure which exit layer and draft length decode fastest, on the beginnings of
            a few samples, and keep them in the generation config (`tune_speculation`).
        others: see `TrainingStep`.
    """

    p_max: float = 0.1
    e_scale: float = 0.2
    exit_scales: str = "sum"
    curriculum: str = "rotational"
    rotation: int = 8
    always_last: bool = True
    dropout_schedule: str = "constant"
    exit_layers: tuple[int, ...] | None = None
    exit_target: str = "tokens"
    tune: bool = True
    method: str = "full"
    learning_rate: float = 1e-4

    learns_from_itself: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.exit_layers is not None:
            object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        self._loss(nn.Identity() if self.needs_teacher else None)

    @property
    def needs_teacher(self) -> bool:
        return self.exit_target == "teacher"

    @classmethod
    def preset(cls, name: str, **changes) -> LayerSkip:
        """The step with the settings of one of the paper's runs, and changes to them.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the paper's runs are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

    def _loss(self, teacher: nn.Module | None) -> LayerSkipLoss:
        settings = {f.name: getattr(self, f.name) for f in fields(LayerSkipLoss) if f.name != "teacher"}
        return LayerSkipLoss(**settings, teacher=teacher)

    def _tuned(self, model: nn.Module, prompts: Tensor) -> SpeculationTuning | str:
        """What is the best exit, or why that is not known; the training is not lost for it."""
        try:
            return tune_speculation(model, prompts)
        except ValueError as error:
            return f"exit layer and draft length were not tuned: {error}"

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        start = time.perf_counter()
        sparse = self.check_model(model)
        loss = self._loss(teacher if self.needs_teacher else None)

        def train(dtype: torch.dtype) -> FitReport:
            settings = self.fit_settings(dtype, model.device) | {"journal": journal, "before_step": loss.before_step}
            return fit(model, tokens, loss, **settings, description=f"LayerSkip ({self.method})")

        try:
            rows, report = self.train(model, train)
        finally:
            loss.release()
        notes = [f"early exits trained ({self.method}): {report.outcome()}"]
        if sparse:
            notes.append(f"{len(sparse)} sparse layers kept their mask: no dropped weight came back")
        if self.tune and model.can_generate():
            last = tokens[-PROMPTS:, : max(1, min(PROMPT, tokens.shape[1] // 2))]
            # Timings differ between processes, and all are to keep the same settings.
            found = from_main(self._tuned(model, last) if place()[0] == 0 else None)
            notes.append(found if isinstance(found, str) else keep_tuning(model, found).outcome())
        return StepReport(self.to_dict(), time.perf_counter() - start, rows, notes, {"training": report.history})
