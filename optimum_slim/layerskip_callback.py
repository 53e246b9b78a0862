"""LayerSkip with `transformers.Trainer`, and with the trainers of TRL that are built on it.

    callback = LayerSkipCallback(LayerSkipLoss(p_max=0.1, e_scale=0.2))
    trainer = Trainer(model, ..., compute_loss_func=callback.compute_loss, callbacks=[callback])
    trainer.train()

The Trainer keeps its data, batches, accumulation and evaluation; the layers that samples skip and the losses of the
exits are those of `layerskip_loss.py`. A Trainer that is given only one of the two, the loss function or the callback,
ends with an error before its first step changes the model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .layerskip_loss import LayerSkipLoss
from .losses import unwrapped


class LayerSkipCallback(TrainerCallback):
    """Trains with layer dropout and early-exit losses in a Trainer.

    Each exit has the model's own loss (`model.loss_function`), so labels of -100 do not count and the loss of all
    micro-batches of a step is divided by the number of their tokens, as the Trainer wants it. Evaluation during the
    training is that of all exits without layer dropout.

    Args:
        loss (`LayerSkipLoss`): its `steps` become the Trainer's at the beginning of the training.
    """

    def __init__(self, loss: LayerSkipLoss):
        self.loss = loss
        self._model: nn.Module | None = None
        self._computed = False  # a loss in this step

    def attach(self, model: nn.Module) -> None:
        """Hook a model, PEFT's or wrapped for data parallelism or not; needed by hand only for an evaluation outside
        of the training."""
        self.loss.attach(unwrapped(model))
        self._model = unwrapped(model)

    def release(self) -> None:
        """Take the hooks off the model, as the end of the training does; by hand after one that failed."""
        self.loss.release()
        self._model = None

    def compute_loss(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """The loss of what the model returned last; for `Trainer(..., compute_loss_func=...)`.

        Args:
            outputs: with `logits` (batch, length, vocabulary).
            labels: int64 (batch, length), -100 where there is nothing to predict; label t + 1 is that of position t.
            num_items_in_batch: number or scalar tensor by which sums over tokens are divided; `None` takes means.

        Raises:
            RuntimeError: the callback is not attached to a model.
            ValueError: no labels.
        """
        if self._model is None:
            raise RuntimeError(
                "LayerSkipCallback.compute_loss was called with no model attached: pass callbacks=[callback] to the "
                "Trainer as well; to evaluate outside of train(), call callback.attach(trainer.model) before and "
                "callback.release() after it"
            )
        if labels is None:
            raise ValueError(
                "LayerSkip needs labels; use a collator that makes them, such as "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        self._computed = True
        loss_of = partial(_loss_of, self._model, labels=labels, count=num_items_in_batch)
        return self.loss.over_exits(outputs.logits, loss_of)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"LayerSkip trains with one process per device, and this one has {args.n_gpu}; start it with "
                "accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
            )
        self.loss.steps = state.max_steps
        self.attach(model)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.loss.before_step(state.global_step)
        self._computed = False

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._computed:
            self.release()
            raise RuntimeError(
                "the Trainer computed a loss of its own, without early exits; pass "
                "compute_loss_func=callback.compute_loss to it, together with callbacks=[callback]"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.release()


def _loss_of(model: nn.Module, logits: Tensor, target: Tensor | None = None, *, labels: Tensor, count: Any) -> Tensor:
    """The model's own loss, or the forward KL to the logits in `target` at the positions that this loss counts."""
    if target is None:
        return model.loss_function(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=count)
    counted = labels[:, 1:].to(logits.device) != -100
    log_q, log_p = (found[:, :-1][counted].float().log_softmax(-1) for found in (logits, target))
    total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total / torch.as_tensor(counted.sum() if count is None else count, device=total.device)
