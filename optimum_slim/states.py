"""Hidden states of calibration tokens, in memory up to a limit and in a file beyond it.

A walk keeps one tensor per batch and reads and replaces them one after the other, so a file serves as well as memory:
every batch has its place in it. The file is not mapped, because mapped pages count as resident memory; it has no
name, so that nothing is left of it when the process ends, however it ends.
"""

import tempfile
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .weights import read_into, write_from


STATES_LIMIT = 512 * 2**20  # bytes of hidden states that a streamed run keeps in memory, for each stream of them


@dataclass(frozen=True)
class _Place:
    start: int
    shape: torch.Size
    dtype: torch.dtype


class HiddenStates(MutableSequence):
    """A list of tensors of which those beyond `limit` bytes lie in an unnamed file.

    Args:
        folder: where the file is made.
        limit: bytes to keep in memory.
    """

    def __init__(self, folder: str | Path, limit: int, states: Iterable[Tensor] = ()):
        self.folder, self.limit = folder, limit
        self.kept: list[Tensor | _Place] = []
        self.in_memory = self.end = 0
        self.file = None
        self.extend(states)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Tensor:
        item = self.kept[index]
        if isinstance(item, Tensor):
            return item
        tensor = torch.empty(item.shape, dtype=item.dtype)
        read_into(self.file, item.start, tensor)
        return tensor

    def __setitem__(self, index: int, states: Tensor) -> None:
        item = self.kept[index]
        if item.shape != states.shape or item.dtype != states.dtype:
            raise ValueError(f"hidden states {tuple(states.shape)} {states.dtype} cannot replace {item}")
        if isinstance(item, Tensor):
            self.kept[index] = states
        else:
            write_from(self.file, item.start, states)

    def __delitem__(self, index: int) -> None:
        del self.kept[index]

    def insert(self, index: int, states: Tensor) -> None:
        if self.in_memory + states.nbytes <= self.limit:
            self.in_memory += states.nbytes
            self.kept.insert(index, states)
            return
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        place = _Place(self.end, states.shape, states.dtype)
        write_from(self.file, place.start, states)
        self.end += states.nbytes
        self.kept.insert(index, place)
