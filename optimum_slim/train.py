"""`fit`, the one training loop: healing, distillation and every other training here are a loss and a call of it.

    report = fit(model, tokens, next_token_loss, steps=500, learning_rate=3e-4)

It minimizes `loss(model, input_ids)` over the parameters that require gradients, with AdamW, a linear warm-up and a
cosine to zero. What sets it apart from a bare loop:

- It never ends worse than it began: some samples are held out, and the model ends with the parameters that did best
  on them, those it came with included.
- All samples of all steps are drawn from the seed beforehand, and with `journal` a killed run goes on where it was
  and ends with the same bits on the same machine as one left alone.
- The batch size is that of an optimizer step, over all processes and micro-batches; how it is cut changes memory and
  speed, not the gradient.
- The model comes back as it went in, apart from the values trained: modes, flags, activation checkpointing, and the
  random states of Python and PyTorch.

It runs on accelerate, in one process where the model is, or under `accelerate launch` (or torchrun) with one process
per device: data-parallel, with a model in each, or sharded by FSDP2 if the launcher asks for it (`sharding.py`).
"""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .batches import cut_batch
from .fit_report import FitReport
from .journal import Journal, digest
from .loop import PRECISIONS, Loop, Loss
from .losses import Distillation, next_token_loss
from .schedules import SCHEDULES
from .sharding import fsdp_settings, sharded, sharded_teacher
from .undisturbed import as_it_was, own_accelerator, own_random_states


__all__ = ["Distillation", "FitReport", "fit", "next_token_loss"]

logger = logging.getLogger(__name__)

# What may differ when a run goes on:
FREE = ("journal", "journal_every", "description", "activation_checkpointing", "before_step")


def fit(
    model: nn.Module,
    tokens: Tensor,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    warmup_steps: int = 100,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    schedule: str = "cosine",
    rates: Mapping[str, float] | None = None,
    before_step: Callable[[int], None] | None = None,
    held_out: float = 0.05,
    evaluate_every: int = 50,
    patience: int | None = None,
    activation_checkpointing: bool = False,
    mixed_precision: str | None = None,
    seed: int = 0,
    journal: str | Path | None = None,
    journal_every: int = 50,
    description: str = "fit",
) -> FitReport:
    """Train the parameters of `model` that require gradients, in place.

    Args:
        model: a causal language model of Transformers, or a PEFT model around one. Parameters to train should be
            fp32: 16-bit ones are trained as they are and lose small updates (a warning says so).
        tokens: int64 (samples, length), on the CPU.
        loss: `loss(model, input_ids)` with int64 input_ids (micro-batch, length) on the model's device; returns an
            fp32 scalar, the mean over predicted tokens. A teacher it holds is looked for in its attribute `teacher`,
            a `TeacherCache` in `cache`.
        steps: optimizer steps, at most.
        learning_rate: its peak; it rises from zero over `warmup_steps` (at most a fifth of `steps`), then falls to
            zero as `schedule` has it.
        batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples that go through the model at once in one process; default: all of the process's
            share. The gradients of the micro-batches are averaged.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are scaled down to this norm; `None` leaves them.
        schedule: `"cosine"`, or `"two_stage"` as BitNet b1.58 was trained: a straight line, in the second half two
            thirds of it, and no weight decay there.
        rates: for submodules of the model by name, by what their learning rate is multiplied.
        before_step: called with the number of each optimizer step, from 0, before it. It is not recorded in a journal,
            so what it does should depend on that number alone. Under FSDP2 a copy of the modules is trained.
        held_out: share of the samples (rounded, at least one) never trained on; 0 keeps none, and the model ends with
            the last parameters.
        evaluate_every: optimizer steps between two evaluations; the first comes before training, the last after it.
        patience: stop after so many evaluations without a new best; `None` goes on.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        mixed_precision: "no", "bf16", "fp16" (not on a CPU), or `None` for what `accelerate launch` was told.
        seed: draws the held-out samples, the order of the others and dropout.
        journal: folder that keeps the state of the run, so that the same call goes on after a kill; the caller removes
            it when its own work is done. It notices other settings, tokens or weights, but not the inner settings of
            adapters or of a loss that is a plain function.
        journal_every: optimizer steps between two writes.
        description: for the progress bar.

    Returns:
        A `FitReport`. In every process the model holds the same parameters.

    Raises:
        ValueError: settings that cannot work, no trainable parameter, a teacher that would be trained along, the
            journal of another run, or FSDP1, all before anything is changed.
        FloatingPointError: a loss or gradient is NaN or infinite. The model gets back the best parameters (without
            held-out samples, those before the failing step), and the journal is removed.
    """
    settings = {name: value for name, value in locals().items() if name not in ("model", "tokens", "loss")}
    _check_settings(**settings)
    check_tokens(tokens)
    fsdp = fsdp_settings()
    if (cache := getattr(loss, "cache", None)) is not None:
        cache.find(tokens)
    parameters = _trained_parameters(model, loss, mixed_precision)
    with own_accelerator(mixed_precision) as accelerator, torch.enable_grad():
        micro, accumulation = cut_batch(batch_size, micro_batch_size, accelerator.num_processes)
        accelerator.gradient_accumulation_steps = accumulation
        settings |= {"micro_batch_size": micro, "mixed_precision": accelerator.mixed_precision}
        fsdp = fsdp if accelerator.num_processes > 1 else None
        device = _place(model, loss, accelerator, keep=fsdp is not None)
        _check_precision(accelerator.mixed_precision, device)
        kept = None
        if journal is not None:
            where = {"processes": accelerator.num_processes, "device": device.type}
            where |= {"sharded": True} if fsdp is not None else {}
            kept = Journal(journal, _fingerprint(model, parameters, tokens, loss, settings | where))
        with contextlib.ExitStack() as stack:
            stack.enter_context(own_random_states(device))
            checkpointing = activation_checkpointing or (fsdp is not None and fsdp.activation_checkpointing)
            stack.enter_context(as_it_was(model, parameters.values(), checkpointing))
            shard = None
            if fsdp is not None:
                dtype = PRECISIONS[accelerator.mixed_precision]
                shard = partial(sharded, device=device, dtype=dtype, reshard=fsdp.reshard_after_forward)
                stack.enter_context(sharded_teacher(loss, shard))
            return Loop(model, parameters, tokens, loss, settings, accelerator, device, kept, shard).run()


def _place(model: nn.Module, loss: Loss, accelerator: Accelerator, keep: bool) -> torch.device:
    """The device to train on; in several processes, model and teacher are moved there, unless they are to stay."""
    if accelerator.num_processes == 1:
        return next(model.parameters()).device
    if keep:
        return accelerator.device
    for module in (model, getattr(loss, "teacher", None)):
        if module is not None:
            module.to(accelerator.device)
    return accelerator.device


def _fingerprint(
    model: nn.Module, parameters: dict[str, nn.Parameter], tokens: Tensor, loss: Loss, settings: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for a journal to be taken up."""
    teacher, cache = getattr(loss, "teacher", getattr(loss, "source", None)), getattr(loss, "cache", None)
    frozen = [(name, p) for name, p in model.named_parameters() if name not in parameters]
    return {name: value for name, value in settings.items() if name not in FREE} | {
        "loss": _describe(loss),
        "tokens": f"{tuple(tokens.shape)} {hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()}",
        "trainable parameters": digest(parameters.items(), values=False),
        "frozen parameters": digest(frozen),
        "teacher": digest(teacher.named_parameters()) if teacher is not None else None,
        "teacher cache": cache.digest if cache is not None else None,
    }


def _describe(loss: Loss) -> str:
    """A loss by name, with its settings if it is a dataclass."""
    if not dataclasses.is_dataclass(loss):
        return getattr(loss, "__qualname__", type(loss).__qualname__)
    fields = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss) if f.repr}
    words = [f"{name}={value}" for name, value in fields.items() if not isinstance(value, nn.Module)]
    return f"{type(loss).__qualname__}({', '.join(words)})"


def _check_settings(**s: Any) -> None:
    for name in ("steps", "batch_size", "evaluate_every", "journal_every"):
        if s[name] < 1:
            raise ValueError(f"{name} must be at least 1, found {s[name]}")
    for name in ("micro_batch_size", "patience"):
        if s[name] is not None and s[name] < 1:
            raise ValueError(f"{name} must be at least 1 or None, found {s[name]}")
    if not s["learning_rate"] > 0:
        raise ValueError(f"learning_rate must be positive, found {s['learning_rate']}")
    if s["warmup_steps"] < 0 or s["weight_decay"] < 0:
        raise ValueError(
            f"warmup_steps and weight_decay must not be negative, found {s['warmup_steps']} and {s['weight_decay']}"
        )
    if s["max_grad_norm"] is not None and not s["max_grad_norm"] > 0:
        raise ValueError(f"max_grad_norm must be positive, found {s['max_grad_norm']}; None leaves gradients alone")
    if s["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, found {s['schedule']!r}")
    if not 0 <= s["held_out"] < 1:
        raise ValueError(f"held_out is a share of the samples in [0, 1), found {s['held_out']}")
    if s["patience"] is not None and not s["held_out"]:
        raise ValueError("patience watches the held-out loss, but held_out=0 keeps no samples; pass held_out=0.05")
    _check_precision(s["mixed_precision"] or "no")


def _check_precision(name: str, device: torch.device | None = None) -> None:
    if name not in PRECISIONS:
        raise ValueError(f"mixed_precision must be None, 'no', 'bf16' or 'fp16', found {name!r}")
    if name == "fp16" and device is not None and device.type == "cpu":
        raise ValueError("mixed_precision='fp16' does not work on a CPU; use 'bf16' or 'no'")


def check_tokens(tokens: Tensor) -> None:
    """Raise a `ValueError` unless they are int64 (samples, length), on the CPU."""
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"expected tokens as an int64 matrix (samples, length) of at least 1 x 2, found {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )
    if tokens.device.type != "cpu":
        raise ValueError(f"expected tokens on the CPU, found them on {tokens.device}; pass tokens.cpu()")


def _trained_parameters(model: nn.Module, loss: Loss, mixed_precision: str | None) -> dict[str, nn.Parameter]:
    """The parameters to train by name. Raises a `ValueError` if that cannot work."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires gradients; add an adapter or set requires_grad"
        )
    teacher = getattr(loss, "teacher", None)
    taught = {p.untyped_storage().data_ptr() for p in teacher.parameters()} if teacher is not None else set()
    if shared := [name for name, p in parameters.items() if p.untyped_storage().data_ptr() in taught]:
        raise ValueError(
            f"the teacher shares {len(shared)} trained parameters with the model (first: {shared[0]}), so it would "
            "change with it; give the teacher copies of them, or train adapters instead"
        )
    if short := [name for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)]:
        kind = parameters[short[0]].dtype
        if mixed_precision == "fp16" and kind is torch.float16:
            raise ValueError(f"{short[0]} is {kind}; mixed_precision='fp16' needs fp32 parameters to train")
        logger.warning(
            "%d trained parameters are %s (first: %s), in which small updates are lost. For full effect convert them "
            "to fp32 and train with mixed_precision='bf16'.",
            len(short),
            kind,
            short[0],
        )
    return parameters


def usual_precision(dtype: torch.dtype, device: torch.device) -> str | None:
    """`mixed_precision` of `fit` for a model of this dtype; processors compute in bf16 rather than fp16."""
    if dtype == torch.float16 and device.type != "cpu":
        return "fp16"
    return "bf16" if dtype in (torch.float16, torch.bfloat16) else None
