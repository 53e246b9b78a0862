"""Minitron's teacher correction: a teacher that learns the training data too (arXiv 2408.11796, Section 3.1).

A teacher that was trained on other data than the student is about to see teaches it less; next-token training of the
teacher on that data, at a fifth of the student's learning rate, lowers the student's loss by more than 6 % there. It
may be done before the distillation, or alongside: then student and teacher take their steps together, and the student
follows what the teacher says at that moment.

Alongside, the teacher lives in the student as its submodule `distillation_teacher` (`trained_along`), so that whatever
trains, places or records the student's parameters does so with the teacher's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import TEACHER, check_divergence, next_token_loss, token_loss, unwrapped
from .memory import shared_copy
from .student import own_tensors
from .train import fit


RATE = 1 / 5  # the teacher's learning rate, of the student's


def corrected(teacher: nn.Module, tokens: Tensor, *, learning_rate: float, **settings: Any) -> nn.Module:
    """A copy of the teacher trained on `tokens`, with a note on that in its attribute `correction`.

    Args:
        tokens: int64 (samples, length).
        learning_rate: the student's; the teacher has a fifth of it.
        settings: others of `fit`.
    """
    copied, dtypes = _trainable(teacher)
    report = fit(copied, tokens, next_token_loss, learning_rate=RATE * learning_rate, **settings)
    own_tensors(copied, list(dtypes), dtypes, trained=False)
    copied.correction = f"teacher corrected on the data: {report.outcome()}"
    return copied


def _trainable(teacher: nn.Module) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """A copy with fp32 tensors of its own, and the dtypes they had."""
    copied = shared_copy(teacher)
    dtypes = {name: p.dtype for name, p in copied.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    own_tensors(copied, list(dtypes), dict.fromkeys(dtypes, torch.float32), trained=True)
    return copied, dtypes


@contextlib.contextmanager
def trained_along(student: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Inside, the student holds a trainable fp32 copy of the teacher, `distillation_teacher`."""
    setattr(student, TEACHER, _trainable(teacher)[0])
    try:
        yield
    finally:
        delattr(student, TEACHER)


@dataclass(frozen=True, eq=False)
class CorrectedDistillation:
    """Distillation from the student's `distillation_teacher`, and its own next-token loss with it.

    No gradient of the first part reaches the teacher, none of the second the student. Without gradients, in the
    evaluations that choose the best state, it is the student's own next-token loss: the distance from a teacher that
    moves tells nothing about progress.

    Args:
        source: the teacher as it was before, of which `trained_along` makes the copy.
        temperature, kl_weight, divergence: as in `Distillation`.
    """

    source: nn.Module
    temperature: float = 1.0
    kl_weight: float = 1.0
    divergence: str = "forward"

    def __post_init__(self):
        check_divergence(self.divergence)

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss on `input_ids`, int64 (batch, length) on the student's device, as an fp32 scalar."""
        logits = model(input_ids=input_ids, use_cache=False).logits
        if not torch.is_grad_enabled():
            return token_loss(logits, input_ids)
        taught = getattr(unwrapped(model), TEACHER)(input_ids=input_ids, use_cache=False).logits
        settings = {"temperature": self.temperature, "kl_weight": self.kl_weight, "divergence": self.divergence}
        return token_loss(logits, input_ids, taught.detach(), **settings) + token_loss(taught, input_ids)
