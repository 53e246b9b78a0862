"""FSDP2 inside `fit`: parameters, gradients and the optimizer's state cut into shards, one for each process.

What is cut is a stand-in, the model's modules copied around the same tensors. Each decoder layer of it is gathered
when it computes and cut again; what is outside of the layers (embeddings, head) is one more unit. The caller's model
stays an ordinary one on its own device, best the CPU, and keeps the best parameters meanwhile.

Under mixed precision, ordinary layers are gathered in 16 bits. Autocast alone would keep a 16-bit copy of each
gathered weight for the backward pass, so of the whole model in every process. Layers that do more with their weights
than multiply (round them, unpack them) are gathered as they are, and so round the same numbers as in one process.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .hidden_states import PROJECTION
from .losses import TEACHER, unwrapped
from .memory import shared_copy
from .walk import decoder_layers


Shard = Callable[[nn.Module], nn.Module]


def fsdp_settings() -> FullyShardedDataParallelPlugin | None:
    """What the launcher, or an `Accelerator` of this process, says about FSDP; `None` if it is not asked for.

    Raises:
        ValueError: FSDP1, which cannot cut packed weights, or offloading.
    """
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1") if plugin is None else getattr(plugin, "fsdp_version", 1)
    if str(version) != "2":
        raise ValueError(
            "fit shards with FSDP2, and FSDP1 is asked for; set fsdp_version: 2 in the configuration of accelerate "
            "(accelerate launch --fsdp_version 2, or FSDP_VERSION=2)"
        )
    plugin = plugin or FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fit keeps shards on the devices; set fsdp_offload_params: false")
    return plugin


def sharded(model: nn.Module, device: torch.device, dtype: torch.dtype | None, reshard: bool) -> nn.Module:
    """A copy of the modules of `model` with tensors of its own on `device`, cut into shards over all processes.

    The values are those of the main process. Parameters of other classes (4-bit ones of bitsandbytes) are not cut.

    Args:
        dtype: in which ordinary layers are gathered; `None` leaves them as they are.
        reshard: cut the parameters of a layer again after its forward pass, not only after its backward pass.

    Raises:
        ValueError: the model has no stack of decoder layers, or parameters of different dtypes are trained in one.
    """
    copied = shared_copy(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units = _units(copied)
    for unit in [*units, copied]:
        _check_one_dtype(unit)
        uncut = _own_tensors(unit, device)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if unit is not copied and _ordinary(unit) else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast does
        )
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=uncut)
    return copied


@contextlib.contextmanager
def sharded_teacher(loss: Any, shard: Shard) -> Iterator[None]:
    """Inside, `loss.teacher` is sharded, if there is one; the teacher itself stays as it is."""
    teacher = getattr(loss, "teacher", None)
    if teacher is None:
        yield
        return
    object.__setattr__(loss, "teacher", shard(teacher))  # a loss may be a frozen dataclass
    try:
        yield
    finally:
        object.__setattr__(loss, "teacher", teacher)


@torch.no_grad()
def whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """A copy of the whole tensor on the CPU, `None` where it is not to be kept; all must ask for that of shards."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
        return tensor.cpu() if keep else None
    return tensor.detach().to("cpu", copy=True) if keep else None


@torch.no_grad()
def put(value: Tensor, into: Tensor) -> None:
    """Write a whole tensor into one of the same shape, or this process's part of it into its shard."""
    if isinstance(into, DTensor):
        parts, rank = value.chunk(into.device_mesh.size()), into.device_mesh.get_local_rank()
        value, into = parts[rank] if rank < len(parts) else value[:0], into.to_local()
    into.copy_(value)


def _units(model: nn.Module) -> list[nn.Module]:
    """Decoder layers that share no parameter with another module, and other modules to be gathered by themselves."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    units = []
    for layer in dict.fromkeys(decoder_layers(unwrapped(model))[1]):
        inside = Counter(id(p) for module in layer.modules() for p in module.parameters(recurse=False))
        if all(uses[key] == count for key, count in inside.items()):
            units.append(layer)
    for name in (PROJECTION, TEACHER):  # called by themselves, outside of the model's forward pass
        if (extra := getattr(unwrapped(model), name, None)) is not None:
            units += [*(_units(extra) if name == TEACHER else ()), extra]
    return units


def _check_one_dtype(unit: nn.Module) -> None:
    kinds = {p.dtype for p in unit.parameters() if p.requires_grad and not isinstance(p, DTensor)}
    if len(kinds) > 1:
        raise ValueError(
            f"FSDP2 trains parameters of one dtype in each decoder layer and outside of them, found {len(kinds)}: "
            f"{', '.join(sorted(map(str, kinds)))}; convert those to train to fp32"
        )


def _ordinary(layer: nn.Module) -> bool:
    """Whether the modules of a decoder layer only multiply with their parameters, or scale by them."""
    return all(
        type(module) in (nn.Linear, Conv1D)
        or all(p.dim() == 1 and p.is_floating_point() for p in module.parameters(recurse=False))
        for module in layer.modules()
    )


@torch.no_grad()
def _own_tensors(unit: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Give the modules of `unit` tensors on `device` in parameters of their own, equal in all processes.

    Returns:
        Parameters that cannot be cut.
    """
    own: dict[int, nn.Parameter] = {}
    for module in unit.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in own:
                own[id(parameter)] = parameter.to(device)
                if type(parameter) is nn.Parameter:
                    moved = parameter.detach().to(device, copy=True, memory_format=torch.contiguous_format)
                    dist.broadcast(moved, 0)
                    own[id(parameter)] = nn.Parameter(moved, parameter.requires_grad)
            module._parameters[key] = own[id(parameter)]
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    return {parameter for parameter in own.values() if type(parameter) is not nn.Parameter}
