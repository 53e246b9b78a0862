"""LayerSkip's training loss (https://arxiv.org/abs/2404.16710): layer dropout and losses of early exits.

    loss = LayerSkipLoss(p_max=0.1, e_scale=1.0, rotation=8, steps=500)
    fit(model, tokens, loss, steps=500, learning_rate=3e-4, before_step=loss.before_step)

Each sample skips each layer with a probability of its own (`exit_schedules.py`): it leaves the batch of that layer and
comes back behind it as it was. Nothing is rescaled. In the same pass the states behind some layers go through the
model's own final norm and head as well, and the losses of these exits are averaged with the weights of the schedules.

Which samples skip follows from the seed, the step, the micro-batch and the process. It is drawn before the forward
pass, so that activation checkpointing runs the same layers for the same samples again. A layer that all samples skip
runs for one whose result is not used, because data-parallel wrappers wait for every layer in every process.

What an exit learns is, in the paper, the next token of the text. For self-speculative decoding it should rather say
what the last layer says: with `exit_target="last_layer"` it learns the distribution of that at the same position. In a
short training that target moves along with the exits, and was seen to collapse with them; with "teacher" all exits,
that of the last layer included, learn the distribution of the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import evaluating, states_of
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


EXIT_TARGETS = ("tokens", "last_layer", "teacher")


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
        exit_layers (`tuple[int]`, *optional*): train only exits behind so many layers, from 1, and the last one; for
            trainings too short for all of them. Default: all.
        exit_target (`str`): what the exits below the last layer learn: the next `"tokens"` of the text, as in the
            paper, or the distribution of the `"last_layer"`, or all exits that of the `"teacher"` (forward KL).
        teacher (`PreTrainedModel`, *optional*): for that; it shares no trained parameter with the model.
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
    exit_layers: tuple[int, ...] | None = None
    exit_target: str = "tokens"
    teacher: nn.Module | None = field(default=None, repr=False)
    steps: int = 1
    seed: int = 0
    activation_checkpointing: bool = field(default=False, repr=False)  # as it changes no result

    def __post_init__(self):
        self.step = 0
        self._calls = 0  # forward passes of this step
        self._model: nn.Module | None = None
        self._handles: list = []
        self._input_ids: Tensor | None = None
        self._weights: dict[int, float] = {}  # of the exits of the last pass; empty once they have a loss
        self._keep: Tensor | None = None  # bool (layers, batch): who does not skip; drawn once the batch is known
        self._states: dict[int, Tensor] = {}  # behind the layers with an exit
        self._away: dict[int, tuple[Tensor, Tensor, bool]] = {}  # by layer: the whole batch, who runs, is it unused
        self._tuples = False
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
        if (self.teacher is not None) != (self.exit_target == "teacher"):
            raise ValueError("exit_target='teacher' needs teacher=, a model, and no other target takes one")
        if self.exit_layers is not None:
            self.exit_layers = tuple(sorted({int(layer) for layer in self.exit_layers}))
            if not self.exit_layers or self.exit_layers[0] < 1:
                raise ValueError(f"exit_layers are counted from 1, found {self.exit_layers}")
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
        """Hook the decoder layers of a Transformers model, unless they are; another loss that did so is released.

        Raises:
            ValueError: the model has no stack of decoder layers.
        """
        if model is self._model:
            return
        stack, decoder = decoder_layers(model)[1], model.get_decoder()
        for hook in list(decoder._forward_pre_hooks.values()):
            if hasattr(hook, "layerskip_loss"):
                hook.layerskip_loss.release()
        self.release()
        self._model = model
        # Closures and neither methods nor partials, which a copy of the modules would copy along with this object.
        self._handles = [decoder.register_forward_pre_hook(self._beginning(len(stack)), with_kwargs=True)]
        for index, layer in enumerate(stack):
            before, after = self._hooks(index, len(stack))
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after))

    def release(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._model, self._input_ids, self._keep = [], None, None, None
        self._weights, self._states, self._away = {}, {}, {}

    def over_exits(self, logits: Tensor, loss_of: Callable[..., Tensor]) -> Tensor:
        """The weighted mean of the losses of the exits of the last forward pass.

        Args:
            logits: (batch, length, vocabulary), what the pass returned.
            loss_of: the loss of logits, `loss_of(logits)`, or of an exit that is to match other logits,
                `loss_of(logits, target)`.

        Raises:
            RuntimeError: no forward pass of the model since it was hooked, or since the last call.
            ValueError: the pass began with embeddings.
        """
        weights, states, model, ids = self._weights, self._states, self._model, self._input_ids
        if not weights:
            raise RuntimeError(
                "there are no exits to train: attach the loss to the model, then call that model, then ask once for "
                "the loss of that pass"
            )
        if ids is None:
            raise ValueError("early exits are computed from input_ids; pass those to the model, not inputs_embeds")
        self._weights, self._states = {}, {}
        last = len(decoder_layers(model)[1]) - 1
        target = logits.detach() if self.exit_target == "last_layer" else None
        if self.teacher is not None:
            target = self._taught(ids).to(logits.device)

        def of_exit(layer_states: Tensor) -> Tensor:
            found = exit_logits(model, ids, layer_states, self._tuples)
            return loss_of(found) if target is None else loss_of(found, target)

        # Its parameters take part in every step, which data-parallel wrappers wait for.
        of_last = partial(loss_of, logits) if self.teacher is None else partial(loss_of, logits, target)
        total = weights.pop(last) * of_last() if last in weights else 0.0 * logits.sum(dtype=torch.float32)
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
        if self.exit_layers is not None:
            if self.exit_layers[-1] > layers:
                raise ValueError(f"exit_layers name layer {self.exit_layers[-1]}, and the model has {layers}")
            trained = [
                on and (layer + 1 in self.exit_layers or layer == layers - 1) for layer, on in enumerate(trained)
            ]
        return exit_weights(exit_scales(layers, self.e_scale, self.exit_scales), trained)

    @torch.no_grad()
    def _taught(self, input_ids: Tensor) -> Tensor:
        """The teacher's logits."""
        device = next(self.teacher.parameters()).device
        with evaluating(self.teacher):
            return self.teacher(input_ids=input_ids.to(device), use_cache=False).logits

    def skip_rates(self, layers: int) -> list[float]:
        """The probability of each layer to be skipped at this step."""
        share = 1.0 if self.dropout_schedule == "constant" else dropout_share(self.step / max(1, self.steps - 1))
        return dropout_rates(layers, self.p_max, share)

    def _beginning(self, layers: int) -> Callable:
        """What happens before a forward pass."""

        def begin(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._input_ids = args[0] if args else kwargs.get("input_ids")
            self._weights = self.exit_weights(layers, decoder.training)
            self._keep, self._states, self._away = None, {}, {}

        begin.layerskip_loss = self
        return begin

    def _draw(self, batch: int, layers: int) -> Tensor:
        """bool (layers, batch): which samples do not skip which layers in this pass."""
        rank, _ = place()
        seed = ((self.seed * 1_000_003 + self.step) * 10_007 + self._calls) * 10_007 + rank
        self._calls += 1
        drawn = torch.rand(layers, batch, generator=torch.Generator().manual_seed(seed % 2**63))
        return drawn >= torch.tensor(self.skip_rates(layers))[:, None]

    def _hooks(self, index: int, layers: int) -> tuple[Callable, Callable]:
        """What happens before and behind a layer: samples that skip it leave the batch, and come back."""

        def before(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            if not layer.training or not self.p_max:
                return None
            states = args[0] if args else kwargs["hidden_states"]
            if self._keep is None:
                self._keep = self._draw(len(states), layers)
            kept = self._keep[index].nonzero().flatten()
            if len(kept) == len(states):
                return None
            rows = (kept if len(kept) else torch.tensor([0])).to(states.device)
            self._away[index] = (states, rows, not len(kept))
            if len(rows) == len(states):
                return None
            return _only(args, rows, len(states)), _only(kwargs, rows, len(states))

        def after(layer: nn.Module, args: tuple, output: Any) -> Any:
            self._tuples = isinstance(output, tuple)
            states = states_of(output)
            if index in self._away:
                whole, rows, unused = self._away.pop(index)
                whole, rows = whole.to(states.device), rows.to(states.device)
                if not unused:
                    states = whole.index_copy(0, rows, states.to(whole.dtype))
                else:
                    states = whole + 0.0 * states.sum(dtype=torch.float32) if place()[1] > 1 else whole
                output = (states, *output[1:]) if self._tuples else states
            if index in self._weights:
                self._states[index] = states
            return output

        return before, after


def _only(value: Any, rows: Tensor, batch: int, name: str | None = None) -> Any:
    """The given rows of every tensor in a nested value that has one row for each sample.

    The tensors of two names are known to be others: MPT's `position_bias` is (heads, 1, keys), and BLOOM's `alibi`
    (batch * heads, 1, keys).
    """
    if isinstance(value, Tensor):
        if name == "alibi" and value.dim() == 3:
            return value.unflatten(0, (batch, -1))[rows].flatten(0, 1)
        return value[rows] if value.dim() > 1 and len(value) == batch and name != "position_bias" else value
    if isinstance(value, tuple | list):
        return type(value)(_only(item, rows, batch) for item in value)
    if isinstance(value, dict):
        return {key: _only(item, rows, batch, key) for key, item in value.items()}
    return value


def _loss_of(logits: Tensor, input_ids: Tensor, target: Tensor | None) -> Tensor:
    return token_loss(logits, input_ids, target, kl_weight=0.0 if target is None else 1.0)
