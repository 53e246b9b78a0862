"""Keeping the process as small as what it holds."""

import copy
import ctypes
import functools
import sys

from torch import nn


@functools.cache
def _malloc_trim():
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_free_memory() -> None:
    """Hand freed heap pages back to the system.

    glibc keeps freed blocks of up to 32 MB for later use. Packing frees several such blocks for every layer, which
    would add up to about the size of the dense model. A no-op where the C library has no `malloc_trim`.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules and config around the same parameter and buffer tensors.

    Modules can be removed, replaced or given new tensors on one side; the other side keeps what it had.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
