"""Distillation from the k likeliest tokens of a teacher that was run before (`teacher_cache.py`).

Let K be the teacher's k likeliest tokens at a position and p_r the probability it gives to all others together; q_r is
what the student gives to those others. The loss is the divergence with the others as one token,

    KL_k = sum over K of p_i log(p_i / q_i) + p_r log(p_r / q_r)
         = KL(p || q) - p_r sum over the others of (p_j / p_r) log((p_j / p_r) / (q_j / q_r))

so it is never larger than the whole KL(p || q), equal to it at k = vocabulary, and grows with k. What it leaves out is
how the student divides q_r among the others. With z the student's logits over the temperature,

    d KL_k / d z_j = q_j - p_j  for j in K,      q_j - p_r q_j / q_r  for the others:

the gradient of the whole divergence from a teacher that has p on K and the student's own proportions elsewhere. The
others get the right sum, where renormalizing p on K would push it to zero and teach the student to be too sure.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .losses import mean_over_tokens, next_token_rows
from .teacher_cache import TeacherCache


@dataclass(frozen=True, eq=False)
class CachedDistillation:
    """A loss that makes a student imitate a cached teacher; call it as `loss(student, input_ids)` or hand it to `fit`.

    It is kl_weight * T² * KL_k + (1 - kl_weight) * next-token, with the temperature T of the cache. The samples must
    be whole rows of the tokens that the cache was built for, in any order and batch.

    Args:
        cache (`TeacherCache`): what the teacher said.
        kl_weight (`float`): share of the divergence in (0, 1]; the rest goes to the next-token loss. Default: 1.

    Raises:
        ValueError: `kl_weight` out of range. When called: a sample that is not in the cache, or a student with another
            vocabulary.
    """

    cache: TeacherCache
    kl_weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.kl_weight <= 1:
            raise ValueError(
                f"kl_weight must be above 0 and at most 1, found {self.kl_weight}; next_token_loss needs no teacher"
            )

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss on `input_ids`, int64 (batch, length) on the student's device, as an fp32 scalar."""
        targets = self.cache.read(input_ids)
        logits = model(input_ids=input_ids, use_cache=False).logits
        if logits.shape[-1] != self.cache.vocabulary:
            raise ValueError(
                f"the cached teacher has a vocabulary of {self.cache.vocabulary}, the student one of "
                f"{logits.shape[-1]}; distillation needs two models with the same vocabulary"
            )
        targets = tuple(tensor.to(logits.device) for tensor in targets)
        rows = partial(_rows, temperature=self.cache.temperature, kl_weight=self.kl_weight)
        return mean_over_tokens(logits, input_ids, targets, rows)


def _rows(
    logits: Tensor, labels: Tensor, ids: Tensor, log_p: Tensor, *, temperature: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Summed loss of fp32 rows (n, vocabulary) and its gradient with respect to them."""
    value, slope = top_divergence(logits / temperature, ids.long(), log_p.float())
    value, slope = kl_weight * temperature**2 * value, slope.mul_(kl_weight * temperature)
    if kl_weight < 1:
        other, part = next_token_rows(logits, labels, 1 - kl_weight)
        value, slope = value + other, slope.add_(part)
    return value, slope


def top_divergence(logits: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """KL_k summed over rows, and its gradient with respect to `logits`.

    Args:
        logits: fp32 (n, vocabulary), of the student.
        ids: int64 (n, k), the teacher's likeliest tokens.
        log_p: fp32 (n, k + 1), their log-probabilities and that of all others; scaled here to sum to one, which 16
            bits do not quite.

    Returns:
        fp32 scalar in nats, and fp32 (n, vocabulary).
    """
    lowest = torch.finfo(logits.dtype).min  # in place of -inf, so that nothing times it is 0 and not NaN
    p = log_p.softmax(-1)
    top, rest = p[:, :-1], p[:, -1:]
    log_q = logits.log_softmax(-1)
    others = log_q.scatter(-1, ids, -torch.inf)
    log_rest = others.logsumexp(-1, keepdim=True).clamp_(min=lowest)
    cross = (top * log_q.gather(-1, ids).clamp_(min=lowest)).sum() + (rest * log_rest).sum()
    value = torch.special.xlogy(p, p).sum() - cross
    target = others.sub_(log_rest).exp_().mul_(rest).scatter_(-1, ids, top)
    return value, log_q.exp_().sub_(target)
