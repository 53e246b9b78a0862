"""Which samples are held out, which are trained on at which step, and how a step's batch is cut.

All of it follows from the seed and the sizes alone, so that a resumed run sees the data that the killed one would have
seen, and the same batch whatever the size of a micro-batch or the number of processes.
"""

import math

import torch
from torch import Tensor


def cut_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """The size of a micro-batch and how many of them make up one process's share of a batch.

    Args:
        batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples that go through the model at once in one process; `None`: all of its share.

    Raises:
        ValueError: the sizes do not divide; the message has sizes that do.
    """
    micro = micro_batch_size or max(1, batch_size // processes)
    at_once = micro * processes
    if batch_size % at_once == 0:
        return micro, batch_size // at_once
    where = f" in {processes} processes" if processes > 1 else ""
    near = max(1, batch_size // at_once) * at_once
    sizes = [size for size in range(1, batch_size + 1) if batch_size % (size * processes) == 0]
    change = f", or micro_batch_size={' or '.join(map(str, sizes))}" if sizes else ""
    raise ValueError(
        f"batch_size={batch_size} does not divide into micro-batches of {micro}{where}; "
        f"use batch_size={near} or {near + at_once}{change}"
    )


def draw(samples: int, held_out: float, steps: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose the held-out samples and the samples of every step.

    Returns:
        The indices of the held-out samples, int64 (held,), and those of each step, int64 (steps, batch_size): random
        permutations of the other samples, epoch after epoch.

    Raises:
        ValueError: no sample is left to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(samples, generator=generator)
    count = max(1, round(held_out * samples)) if held_out else 0
    if count >= samples:
        raise ValueError(
            f"held_out={held_out} of {samples} samples leaves none to train on; pass more samples or held_out=0"
        )
    held, rest = shuffled[:count], shuffled[count:]
    epochs = math.ceil(steps * batch_size / len(rest))
    order = torch.cat([rest[torch.randperm(len(rest), generator=generator)] for _ in range(epochs)])
    return held, order[: steps * batch_size].view(steps, batch_size)
