"""Losses for `fit`: predict the next token, or match a teacher.

`fit` takes any callable `loss(model, input_ids)` that returns a scalar. Two are here:

- `next_token_loss`: cross-entropy of each token but the first, given those before it.
- `Distillation`: the student imitates a teacher, usually the model it was cut from. With p and q the teacher's and
  the student's distributions over the vocabulary, both from logits divided by the temperature T,

      loss = kl_weight * T² * KL(p || q) + (1 - kl_weight) * next-token + hidden_weight * hidden

  as in Hinton et al. (https://arxiv.org/abs/1503.02531); `divergence="reverse"` is KL(q || p) instead, which Minitron
  (https://arxiv.org/abs/2407.14679) finds a little worse. The hidden term is the idea in a footnote of Gromov et al.
  (https://arxiv.org/abs/2403.17887): where layers were removed, the student's residual stream should equal the
  teacher's behind those layers. Here it is relative and counted per token, mean over tokens of
  ||teacher - student||² / ||teacher||², so that it has no unit, weighs the same in every model, and is not ruled by
  the few tokens (the first above all) whose activations are a thousand times larger than the others'. Other states,
  another distance and other widths: `hidden_states.py`.

Logits are the largest tensors of a training step: 2048 tokens times a vocabulary of 256k in fp32 is 2 GB, and plain
PyTorch holds several such tensors for log-softmax, its gradient and the copies in fp32. `token_loss` holds one: it
computes loss and gradient together for a few rows at a time in fp32 and keeps the gradient in the logits' own dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .block import evaluating
from .hidden_states import DISTANCES, hidden_distance, outputs


DIVERGENCES = ("forward", "reverse")
TEACHER = "distillation_teacher"  # a submodule of the student, while both are trained (`teacher_correction.py`)
EQUAL = 1e-6  # a hidden term that small is rounding
ROWS = 128  # rows of logits turned into fp32 together


def next_token_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token given the tokens before it.

    Args:
        model: a causal language model; it may be wrapped by PEFT or DDP.
        input_ids: int64 (batch, length), without padding, on the model's device.

    Returns:
        fp32 scalar, in nats, a mean over batch * (length - 1) predictions.
    """
    return token_loss(model(input_ids=input_ids, use_cache=False).logits, input_ids)


@dataclass(frozen=True, eq=False)
class Distillation:
    """A loss that makes a student imitate `teacher`; call it as `loss(student, input_ids)` or hand it to `fit`.

    The teacher runs in evaluation mode without gradients, and its modes and flags are afterwards as they were. It may
    share parameters with the student as long as they are not trained.

    Args:
        teacher (`PreTrainedModel`): a causal language model with the student's vocabulary.
        temperature (`float`): divides both models' logits in the Kullback-Leibler term. Default: 1.
        kl_weight (`float`): share of that term in [0, 1]; the rest goes to the next-token loss. Default: 1.
        divergence (`str`): `"forward"`, KL(teacher || student), or `"reverse"`.
        hidden_weight (`float` or `"dynamic"`): weight of the hidden term. Default: 0, which leaves it out. "dynamic"
            is Minitron's: in every micro-batch the weight that makes the hidden term as large as the rest.
        seams: pairs `(student_layer, teacher_layer)`, 0-based: the outputs of these decoder layers are compared. If
            teacher layers a to b were removed, the seam is `(a - 1, b)`; -1 stands for the embeddings.
        hidden_distance (`str`): `"relative"` or `"cosine"`, see `hidden_states.py`; a student of another width is to
            be trained inside `hidden_states.projected`.

    Raises:
        ValueError: a weight or temperature out of range, or a hidden term without seams. When called: different
            vocabularies or hidden sizes, or a seam at a layer that does not exist.
    """

    teacher: nn.Module
    temperature: float = 1.0
    kl_weight: float = 1.0
    divergence: str = "forward"
    hidden_weight: float | str = 0.0
    seams: Sequence[tuple[int, int]] = ()
    hidden_distance: str = "relative"

    def __post_init__(self):
        object.__setattr__(self, "seams", tuple((int(ours), int(theirs)) for ours, theirs in self.seams))
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, found {self.temperature}; 1 leaves the logits as they are"
            )
        check_divergence(self.divergence)
        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"kl_weight must be between 0 and 1, found {self.kl_weight}")
        check_hidden(self.hidden_weight, self.hidden_distance)
        if self.hidden_weight and not self.seams:
            raise ValueError("hidden_weight needs seams=[(student_layer, teacher_layer), ...] to compare; found none")
        if not self.kl_weight and not self.hidden_weight:
            raise ValueError("kl_weight=0 and hidden_weight=0 leave the teacher no part; use next_token_loss")

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss on `input_ids`, int64 (batch, length) on the student's device, as an fp32 scalar."""
        seams = self.seams if self.hidden_weight else ()
        device = next(self.teacher.parameters()).device
        with (
            torch.no_grad(),
            evaluating(self.teacher),
            outputs(unwrapped(self.teacher), [theirs for _, theirs in seams], "teacher") as taught,
        ):
            target = self.teacher(input_ids=input_ids.to(device), use_cache=False).logits
        student = unwrapped(model)
        with outputs(student, [ours for ours, _ in seams], "student") as learned:
            logits = model(input_ids=input_ids, use_cache=False).logits
        target = target.to(logits.device) if self.kl_weight else None
        settings = {"temperature": self.temperature, "kl_weight": self.kl_weight, "divergence": self.divergence}
        loss = token_loss(logits, input_ids, target, **settings)
        if not seams:
            return loss
        distances = [
            hidden_distance(student, learned[ours], taught[theirs], self.hidden_distance).to(loss.device)
            for ours, theirs in seams
        ]
        hidden = torch.stack(distances).mean()
        if self.hidden_weight == "dynamic":
            weight = torch.where(hidden > EQUAL, loss / hidden, 0).detach()
            return loss + weight * hidden
        return loss + self.hidden_weight * hidden


def token_loss(
    logits: Tensor,
    input_ids: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    divergence: str = "forward",
) -> Tensor:
    """Next-token loss, or its mixture with the divergence from a teacher, a few rows of logits at a time.

    Computes the gradient along with the value, so the result can be differentiated once.

    Args:
        logits: (batch, length, vocabulary), any floating dtype.
        input_ids: int64 (batch, length); token t + 1 is the label of position t, and the last position has none.
        teacher_logits: like `logits`; `None` gives the plain next-token loss.
        temperature, kl_weight, divergence: as in `Distillation`.

    Returns:
        fp32 scalar, a mean over batch * (length - 1) positions.

    Raises:
        ValueError: fewer than two tokens, or teacher logits of another shape.
    """
    if input_ids.shape[-1] < 2:
        raise ValueError(f"predicting the next token needs samples of at least 2 tokens, found {input_ids.shape[-1]}")
    if teacher_logits is None:
        kl_weight = 0.0
    elif teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher and student give logits of different shapes, {tuple(teacher_logits.shape)} and "
            f"{tuple(logits.shape)}; distillation needs two models with the same vocabulary"
        )
    check_divergence(divergence)
    rows = partial(_rows, temperature=temperature, kl_weight=kl_weight, reverse=divergence == "reverse")
    return mean_over_tokens(logits, input_ids, () if teacher_logits is None else (teacher_logits,), rows)


def mean_over_tokens(
    logits: Tensor, input_ids: Tensor, targets: tuple[Tensor, ...], rows: Callable[..., tuple[Tensor, Tensor]]
) -> Tensor:
    """A loss that is a sum over tokens, from `ROWS` rows of logits at a time; can be differentiated once.

    Args:
        logits: (batch, length, vocabulary), any floating dtype.
        input_ids: int64 (batch, length).
        targets: tensors (batch, at least length - 1, ...) on the device of `logits`.
        rows: `rows(logits, labels, *targets)` of fp32 (n, vocabulary), int64 (n,) and the targets' n rows returns the
            sum of their losses and its gradient (n, vocabulary).

    Returns:
        fp32 scalar, a mean over batch * (length - 1) positions.
    """
    return _TokenLoss.apply(logits, input_ids.to(logits.device), targets, rows)


def check_divergence(name: str) -> None:
    """Raise a `ValueError` unless it is one of `DIVERGENCES`."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, found {name!r}")


def check_hidden(weight: float | str, distance: str) -> None:
    """Raise a `ValueError` unless these are a weight and a distance of a hidden term."""
    if weight != "dynamic" and (isinstance(weight, str) or not weight >= 0):
        raise ValueError(f"hidden_weight must be 'dynamic' or a number of at least 0, found {weight!r}")
    if distance not in DISTANCES:
        raise ValueError(f"hidden_distance must be one of {', '.join(DISTANCES)}, found {distance!r}")


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, input_ids: Tensor, targets: tuple[Tensor, ...], function: Callable
    ) -> Tensor:
        batch, length, _ = logits.shape
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for sample in range(batch):
            for first in range(0, length - 1, ROWS):
                rows = slice(first, min(first + ROWS, length - 1))
                labels = input_ids[sample, rows.start + 1 : rows.stop + 1]
                each = [target[sample, rows] for target in targets]
                value, slope = function(logits[sample, rows].float(), labels, *each)
                total += value
                if gradient is not None:
                    gradient[sample, rows] = slope.to(gradient.dtype)
        if gradient is not None:
            gradient[:, -1] = 0
        # Kept without the factor 1 / count: in fp16 that would push small entries below the smallest number.
        ctx.count, ctx.done = batch * (length - 1), False
        ctx.save_for_backward(gradient)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        if ctx.done:
            raise RuntimeError("token_loss can be differentiated only once; compute the loss again")
        ctx.done, (gradient,) = True, ctx.saved_tensors
        return gradient.mul_(upstream / ctx.count), None, None, None


def next_token_rows(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """`weight` times the summed next-token loss of fp32 rows (n, vocabulary), and its gradient."""
    log_q = logits.log_softmax(-1)
    value = -weight * log_q.gather(-1, labels[:, None]).sum()
    slope = log_q.exp_()
    slope.scatter_add_(-1, labels[:, None], slope.new_full((len(labels), 1), -1.0)).mul_(weight)
    return value, slope


def _rows(
    logits: Tensor,
    labels: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float,
    kl_weight: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Summed loss of fp32 rows (n, vocabulary) and its gradient with respect to them."""
    value, slope = logits.new_zeros(()), None
    if kl_weight < 1:
        value, slope = next_token_rows(logits, labels, 1 - kl_weight)
    if kl_weight > 0:
        log_p = (target.float() / temperature).log_softmax(-1)
        log_q = (logits / temperature).log_softmax(-1)
        if reverse:
            q = log_q.exp()
            ratio = log_q.sub_(log_p)
            each = torch.sum(q * ratio, -1, keepdim=True)
            part = ratio.sub_(each).mul_(q)
        else:
            p = log_p.exp()
            each = torch.sum(log_p.sub_(log_q).mul_(p), -1)
            part = log_q.exp_().sub_(p)
        value = value + kl_weight * temperature**2 * each.sum()
        part.mul_(kl_weight * temperature)
        slope = part if slope is None else slope.add_(part)
    return value, slope


def unwrapped(model: nn.Module) -> nn.Module:
    """The Transformers model inside DDP and PEFT wrappers."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
