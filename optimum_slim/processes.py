"""Several processes, as `accelerate launch` and torchrun start them: joining them, and what they tell each other.

Outside of `fit` every process does the same work on the same model, or its share of the samples. A choice (which
layer to drop) must come out alike everywhere, to the bit, so it is made from what all processes found, or by one.
"""

import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from .journal import digest


_times: Counter = Counter()  # how often each thing was done in the main process alone


def join() -> None:
    """Join the processes that the launcher started, over gloo where there is no accelerator; alone, do nothing.

    Raises:
        ValueError: accelerate was set up in this process before, as if there were no others.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if count == 1 or not dist.is_available() or dist.is_initialized():
        return
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    PartialState(cpu=on_cpu)
    if not dist.is_initialized():
        raise ValueError(
            f"{count} processes were started, and accelerate was set up for one here; on a CPU set "
            "ACCELERATE_USE_CPU=true, or make no Accelerator before"
        )


def place() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    join()
    alone = not dist.is_available() or not dist.is_initialized()
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())


def share(samples: Tensor) -> Tensor:
    """The part of (samples, ...) that this process looks at; it may be empty."""
    rank, count = place()
    return samples.tensor_split(count)[rank]


def from_all(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    _, count = place()
    if count == 1:
        return [value]
    values = [None] * count
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The value that the main process has."""
    if place()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def in_main(what: str, act: Callable[[], str]) -> str:
    """What `act` returns in the main process, where alone it is called; the others wait for that.

    The main process waits for nobody, so it may also be the only one to come here.

    Raises:
        RuntimeError: in the other processes, `act` failed in the main one.
    """
    rank, count = place()
    if count == 1:
        return act()
    _times[what] += 1
    store, key = dist.distributed_c10d._get_default_store(), f"optimum_slim {what} {_times[what]}"
    if rank:
        store.wait([key], timedelta(days=1))
        done, found = store.get(key).decode().split(" ", 1)
        if done == "failed":
            raise RuntimeError(f"{what} failed in the main process: {found}")
        return found
    try:
        found = act()
    except BaseException as error:
        store.set(key, f"failed {error}")
        raise
    store.set(key, f"done {found}")
    return found


def check_same(model: nn.Module) -> None:
    """Raise a `ValueError` if the processes hold models with different weights."""
    if place()[1] > 1 and len(set(from_all(digest(model.named_parameters())))) > 1:
        raise ValueError(
            "the processes hold different weights; load the same model in each, under FSDP with "
            "fsdp_cpu_ram_efficient_loading: false"
        )
