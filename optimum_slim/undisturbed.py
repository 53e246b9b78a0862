"""What a training run borrows from the model and the process, and gives back as it was."""

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from .losses import unwrapped
from .processes import join, place


@contextlib.contextmanager
def own_accelerator(mixed_precision: str | None) -> Iterator[Accelerator]:
    """An `Accelerator` with settings of its own; those of the process, which accelerate shares, are back afterwards.

    It knows nothing of FSDP, which accelerate has on GPUs only: `fit` shards by itself (`sharding.py`).

    Raises:
        ValueError: another kind of parallelism than data parallelism and FSDP, a precision that the device lacks, or
            processes that accelerate does not know of.
    """
    join()
    states = (PartialState, AcceleratorState, GradientState)
    former = [dict(state._shared_state) for state in states]
    for state in states[1:]:
        state._reset_state()
    if former[0].get("distributed_type") is DistributedType.FSDP:  # what it was before it was called so
        kind = "GPU" if PartialState().device.type == "cuda" else PartialState().device.type.upper()
        PartialState._shared_state["distributed_type"] = DistributedType(f"MULTI_{kind}")
    try:
        with _without_environment("ACCELERATE_USE_FSDP"):
            accelerator = Accelerator(mixed_precision=mixed_precision)
        kind = str(accelerator.distributed_type.value)
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ValueError(f"fit trains with data parallelism, sharded by FSDP2 or not, found {kind}")
        if accelerator.num_processes != (count := place()[1]):
            raise ValueError(
                f"torch.distributed has {count} processes and accelerate knows of {accelerator.num_processes}; start "
                "them with accelerate launch or torchrun, or set RANK, LOCAL_RANK and WORLD_SIZE as those do"
            )
        yield accelerator
    finally:
        for state, values in zip(states, former, strict=True):
            if values or state is not PartialState:
                state._shared_state.clear()
                state._shared_state.update(values)


@contextlib.contextmanager
def _without_environment(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


@contextlib.contextmanager
def as_it_was(model: nn.Module, parameters: Iterable[nn.Parameter], checkpointing: bool) -> Iterator[None]:
    """Inside, activations are checkpointed if asked for; afterwards modes are restored and gradients are gone."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with activation_checkpointing(unwrapped(model)) if checkpointing else contextlib.nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in parameters:
            parameter.grad = None


@contextlib.contextmanager
def own_flags(model: nn.Module) -> Iterator[None]:
    """Parameters ask for gradients afterwards as they did before, whatever was done to copies that share them."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, gradient in asked.items():
            parameter.requires_grad_(gradient)


@contextlib.contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[None]:
    """Non-reentrant checkpointing through the model's own method, which Transformers 5.23 renames.

    Raises:
        ValueError: the model has no such method or does not support it.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    name = next((n for n in ("activation", "gradient") if hasattr(model, f"{n}_checkpointing_enable")), None)
    if name is None:
        raise ValueError(
            f"{type(model).__name__} offers no activation checkpointing; pass activation_checkpointing=False"
        )
    hooked = hasattr(model, "_require_grads_hook")
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    if not hooked:  # it makes the embeddings' output require gradients, which only reentrant checkpointing needs
        model.disable_input_require_grads()
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


@contextlib.contextmanager
def own_random_states(device: torch.device) -> Iterator[None]:
    """The random states of Python and PyTorch are the caller's again afterwards."""
    former = get_random_states(device)
    try:
        yield
    finally:
        set_random_states(former, device)


def get_random_states(device: torch.device) -> dict[str, Any]:
    """The random states that matter for work on `device`, in types that `torch.load(weights_only=True)` takes."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state_all(states["cuda"])
