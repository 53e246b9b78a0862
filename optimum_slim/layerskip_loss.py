"""LayerSkip's training loss (https://arxiv.org/abs/2404.16710): layer dropout and losses of early exits.

    loss = LayerSkipLoss(p_max=0.1, e_scale=1.0, rotation=8, steps=500)
    fit(model, tokens, loss, steps=500, learning_rate=3e-4, before_step=loss.before_step)

Each sample skips each layer with a probability of its own (`exit_schedules.py`): it leaves the batch of that layer and
comes back behind it as it was. Nothing is rescaled. In the same pass the states behind some layers go through the
model's own final norm and head as well, and the losses of these exits are averaged with the weights of the schedules.

Which samples skip follows from the seed, the step, the micro-batch and the process. It is drawn before the forward
pass, so that activation checkpointing runs the same layers for the same samples again. A layer that all samples skip
runs for one whose result is not used, because data-parallel wrappers wait for every layer in every process.

With `exit_target="last_layer"` an exit learns the distribution of the last layer at the same position, which is what
self-speculative decoding asks of it, in place of the next token of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import states_of
from .exit_schedules import (
    CURRICULA,
    DROPOUT_SCHEDULES,
    SCALES,
    dropout_rates,
    dropout_share,
    exit_scales,
    exit_weights,
    exits_trained,
)
from .losses import token_loss, unwrapped
from .processes import place
from .route import exit_logits
from .walk import decoder_layers


EXIT_TARGETS = ("tokens", "last_layer")


@dataclass(eq=False)
class LayerSkipLoss:
    """The loss of a LayerSkip training; call it as `loss(model, input_ids)` or hand it to `fit`.

    It hooks the decoder layers of the model it is called with until `release`.

    Args:
        p_max (`float`): probability with which a sample skips the last layer, in [0, 1].
        e_scale (`float`): scale of the weights of the exits below the last layer, in [0, 1].
        exit_scales (`str`): how these weights depend on the layer, `"sum"` as in the paper, `"linear"` or `"uniform"`.
        curriculum (`str`): which exits are trained at a step: `"rotational"`, `"gradual"` or `"none"`, all of them.
        rotation (`int`): R of the rotational curriculum; about L / R exits are trained at each step.
        always_last (`bool`): train the exit of the last layer at every step, as the authors' recipe in torchtune does.
            In the paper's rotation it is one of all.
        dropout_schedule (`str`): S(t), `"constant"` or, from scratch, `"exponential"`.
        exit_target (`str`): what the exits below the last layer learn: the next `"tokens"` of the text, as in the
            paper, or the distribution of the `"last_layer"` (forward KL).
        steps (`int`): of the whole run.
        seed (`int`): draws who skips.
        activation_checkpointing (`bool`): keep no logits of exits; compute them again in the backward pass.

    Raises:
        ValueError: a field out of range.
    """

    p_max: float = 0.1
    e_scale: float = 0.2
    exit_scales: str = "sum"
    curriculum: str = "rotational"
    rotation: int = 8
    always_last: bool = True
    dropout_schedule: str = "constant"
    exit_target: str = "tokens"
    steps: int = 1
    seed: int = 0
    activation_checkpointing: bool = False

    step: int = field(default=0, init=False)
    _calls: int = field(default=0, init=False)  # forward passes of this step
    _model: nn.Module | None = field(default=None, init=False)
    _handles: list = field(default_factory=list, init=False)
    _input_ids: Tensor | None = field(default=None, init=False)
    _weights: dict[int, float] = field(default_factory=dict, init=False)  # of the exits of this pass
    _keep: Tensor | None = field(default=None, init=False)  # bool (layers, batch): who does not skip; drawn once known
    _states: dict[int, Tensor] = field(default_factory=dict, init=False)  # behind the layers with an exit
    _away: dict[int, tuple[Tensor, Tensor, bool]] = field(default_factory=dict, init=False)
    _tuples: bool = field(default=False, init=False)
    _at_exit: bool = field(default=False, init=False)

    def __post_init__(self):
        for name, values in (
            ("exit_scales", SCALES),
            ("curriculum", CURRICULA),
            ("dropout_schedule", DROPOUT_SCHEDULES),
            ("exit_target", EXIT_TARGETS),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, found {getattr(self, name)!r}")
        for name in ("p_max", "e_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], found {getattr(self, name)!r}")
        for name in ("rotation", "steps"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, found {getattr(self, name)!r}")

    def before_step(self, step: int) -> None:
        """Say which optimizer step is next, from 0."""
        self.step, self._calls = step, 0

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss on `input_ids`, int64 (batch, length), as an fp32 scalar; in evaluation mode that of all exits,
        without layer dropout."""
        self.attach(unwrapped(model))
        logits = model(input_ids=input_ids, use_cache=False).logits
        return self.over_exits(logits, lambda found, target=None: _loss_of(found, input_ids, target))

    def attach(self, model: nn.Module) -> None:
        """Hook the decoder layers of a Transformers model, unless they are."""
        if model is self._model:
            return
        self.release()
        self._model, stack = model, decoder_layers(model)[1]
        hook = model.get_decoder().register_forward_pre_hook(self._begin_pass, with_kwargs=True)
        self._handles = [hook]
        for index, layer in enumerate(stack):
            # Closures and no partials, which a copy of the modules would copy along with this object.
            before, after = self._hooks(index)
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after))

    def release(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._model, self._input_ids, self._keep = [], None, None, None
        self._states, self._away = {}, {}

    def over_exits(self, logits: Tensor, loss_of: Callable[..., Tensor]) -> Tensor:
        """The weighted mean of the losses of the exits of the last forward pass.

        Args:
            logits: (batch, length, vocabulary), what the pass returned.
            loss_of: the loss of logits, `loss_of(logits)`, or of an exit that is to match the last layer,
                `loss_of(logits, last_logits)`.
        """
        weights, states, model, ids = dict(self._weights), self._states, self._model, self._input_ids
        last = len(decoder_layers(model)[1]) - 1
        self._states = {}
        target = logits.detach() if self.exit_target == "last_layer" else None

        def of_exit(layer_states: Tensor) -> Tensor:
            self._at_exit = True
            try:
                found = exit_logits(model, ids, layer_states, self._tuples)
            finally:
                self._at_exit = False
            return loss_of(found) if target is None else loss_of(found, target)

        total = weights.pop(last) * loss_of(logits) if last in weights else logits.sum() * 0.0
        for layer, weight in weights.items():
            if self.activation_checkpointing and torch.is_grad_enabled():
                value = checkpoint(of_exit, states[layer], use_reentrant=False)
            else:
                value = of_exit(states[layer])
            total = total + weight * value.to(total.device)
        return total

    def exit_weights(self, layers: int, training: bool) -> dict[int, float]:
        """The weights of the exits at this step, by layer; of all of them in evaluation."""
        trained = [True] * layers
        if training:
            trained = exits_trained(self.curriculum, layers, self.step, self.steps, self.rotation)
            trained[-1] = trained[-1] or self.always_last
        return exit_weights(exit_scales(layers, self.e_scale, self.exit_scales), trained)

    def skip_rates(self, layers: int) -> list[float]:
        """The probability of each layer to be skipped at this step."""
        share = 1.0 if self.dropout_schedule == "constant" else dropout_share(self.step / max(1, self.steps - 1))
        return dropout_rates(layers, self.p_max, share)

    def _begin_pass(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._at_exit:
            return
        self._input_ids = args[0] if args else kwargs.get("input_ids")
        self._weights = self.exit_weights(len(decoder_layers(self._model)[1]), decoder.training)
        self._keep, self._states, self._away = None, {}, {}

    def _draw(self, batch: int, layers: int) -> Tensor:
        """bool (layers, batch): which samples do not skip which layers in this pass."""
        rank, _ = place()
        seed = ((self.seed * 1_000_003 + self.step) * 10_007 + self._calls) * 10_007 + rank
        self._calls += 1
        drawn = torch.rand(layers, batch, generator=torch.Generator().manual_seed(seed % 2**63))
        return drawn >= torch.tensor(self.skip_rates(layers))[:, None]

    def _hooks(self, index: int) -> tuple[Callable, Callable]:
        """What happens before and behind a layer: samples that skip it leave the batch, and come back."""

        def before(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            if self._at_exit or not layer.training or not self.p_max:
                return None
            states = args[0] if args else kwargs["hidden_states"]
            if self._keep is None:
                self._keep = self._draw(len(states), len(decoder_layers(self._model)[1]))
            kept = self._keep[index].nonzero().flatten()
            if len(kept) == len(states):
                return None
            rows = (kept if len(kept) else torch.tensor([0])).to(states.device)
            self._away[index] = (states, rows, not len(kept))
            if len(rows) == len(states):
                return None
            return _only(args, rows, len(states)), _only(kwargs, rows, len(states))

        def after(layer: nn.Module, args: tuple, output: Any) -> Any:
            if self._at_exit:
                return None
            self._tuples = isinstance(output, tuple)
            states = states_of(output)
            if index in self._away:
                whole, rows, unused = self._away.pop(index)
                if unused:
                    states = whole + 0.0 * states.sum() if place()[1] > 1 else whole
                else:
                    states = whole.index_copy(0, rows, states.to(whole.dtype))
                output = (states, *output[1:]) if self._tuples else states
            if index in self._weights:
                self._states[index] = states
            return output

        return before, after


def _only(value: Any, rows: Tensor, batch: int) -> Any:
    """The given rows of every tensor in a nested value that has one row for each sample."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_only(item, rows, batch) for item in value)
    if isinstance(value, dict):
        return {key: _only(item, rows, batch) for key, item in value.items()}
    return value


def _loss_of(logits: Tensor, input_ids: Tensor, target: Tensor | None) -> Tensor:
    return token_loss(logits, input_ids, target, kl_weight=0.0 if target is None else 1.0)
