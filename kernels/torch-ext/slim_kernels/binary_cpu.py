"""The C kernel of binary layers (`binary.c`): which way is faster for how many tokens, and the calls.

    few tokens     the kernel multiplies straight from the bits
    many tokens    a few rows at a time are made dense, in a piece that stays in the cache, and multiplied by PyTorch

`OPTIMUM_SLIM_CPU` and the library are those of `cpu.py`, and so are the paths. Groups that are not whole words of 32
columns are multiplied by the portable one.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .binary_reference import binary_dense as binary_dense_reference
from .binary_reference import binary_linear_dx_reference, binary_linear_reference, check_binary_arguments
from .cpu import _TYPE_CODES, PATHS, _multiplies_bfloat16, load_library
from .sparse_cpu import _contiguous, _describe, _pointers


# From this many tokens on, making chunks of rows dense is faster: where PyTorch multiplies bf16 in hardware, and
# elsewhere. The C kernel takes up to 16 tokens.
_BFLOAT16_TOKENS = 6
_DENSE_TOKENS = 16
_SCRATCH_BYTES = 4 << 20


@functools.lru_cache(maxsize=4096)
def _plan(in_features: int, dtype: torch.dtype, group_size: int, *described) -> ctypes.Array:
    """Check the arguments once per combination of shapes and dtypes; return the numbers for C (see read_layout)."""
    check_binary_arguments(in_features, dtype, *described, group_size)
    weight, _, scale, offset, columns, bias = described
    types = [_TYPE_CODES.get(tensor and tensor[1], 0) for tensor in ((None, dtype), scale, offset, columns, bias)]
    numbers = (weight[0][0], in_features, scale[0][1], group_size, *types)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def binary_linear_cpu(
    x: Tensor,
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """`binary_linear_reference` for CPU tensors; for few tokens, one call into C does the whole layer."""
    shape = x.shape
    in_features = shape[-1] if shape else 0
    packed = (weight, salient, scale, offset, columns)
    numbers = _plan(in_features, x.dtype, group_size, *map(_describe, packed), _describe(bias))
    library, path, _ = load_library()
    tokens = x.numel() // in_features if in_features else 0
    outs = weight.shape[0]
    if library is None or tokens == 0 or outs == 0:
        return binary_linear_reference(x, *packed, bias, group_size)
    x, *packed, bias = _contiguous((x, *packed, bias))
    if tokens >= (_BFLOAT16_TOKENS if _multiplies_bfloat16(x.dtype) else _DENSE_TOKENS):
        return _linear_in_chunks(x, packed, bias, group_size)
    y = x.new_empty((*shape[:-1], outs))
    failed = library.slim_binary_linear(
        *_pointers([x, *packed, bias, y]), numbers, tokens, PATHS.index(path), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"binary_linear found no memory for {tokens} tokens of {in_features} columns.")
    return y


def check_binary_outputs(dy: Tensor, weight: Tensor) -> None:
    """Raise ValueError if the gradient `dy` is not one of the outputs of `weight`."""
    if not dy.dim() or dy.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"binary_linear_dx got dy of shape {tuple(dy.shape)}; for weight of shape {tuple(weight.shape)} the last "
            f"number must be {weight.shape[0]}."
        )


def binary_linear_dx_cpu(
    dy: Tensor,
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    in_features: int,
    group_size: int,
) -> Tensor:
    """`binary_linear_dx_reference` for CPU tensors: the dense matrix exists a few rows at a time."""
    packed = (weight, salient, scale, offset, columns)
    _plan(in_features, dy.dtype, group_size, *map(_describe, packed), None)
    check_binary_outputs(dy, weight)
    if load_library()[0] is None or weight.numel() == 0:
        return binary_linear_dx_reference(dy, *packed, in_features, group_size)
    gradient = dy.reshape(-1, weight.shape[0]).float()
    dx = gradient.new_zeros((gradient.shape[0], in_features))
    for first, last, dense in _dense_chunks(_contiguous(packed), in_features, group_size, torch.float32):
        dx.addmm_(gradient[:, first:last], dense)
    return dx.to(dy.dtype).view(*dy.shape[:-1], in_features)


def binary_dense(
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense matrix of shape (out, in_features), bit for bit the one of `binary_reference.py`."""
    packed = (weight, salient, scale, offset, columns)
    if not weight.is_cpu or weight.numel() == 0 or dtype not in _TYPE_CODES or load_library()[0] is None:
        return binary_dense_reference(*packed, in_features, group_size, dtype)
    dense = torch.empty((weight.shape[0], in_features), dtype=dtype)
    _write_rows(_contiguous(packed), group_size, 0, dense)
    return dense


def _linear_in_chunks(x: Tensor, packed: list[Tensor | None], bias: Tensor | None, group_size: int) -> Tensor:
    in_features, outs = x.shape[-1], packed[0].shape[0]
    dtype = torch.bfloat16 if _multiplies_bfloat16(x.dtype) else torch.float32
    tokens = x.view(-1, in_features).to(dtype)
    y = x.new_empty((len(tokens), outs))
    for first, last, dense in _dense_chunks(packed, in_features, group_size, dtype):
        y[:, first:last] = F.linear(tokens, dense, None if bias is None else bias[first:last].to(dtype))
    return y.view(*x.shape[:-1], outs)


def _dense_chunks(
    packed: list[Tensor | None], in_features: int, group_size: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first, last, dense rows from first to last); the next ones overwrite them."""
    outs = packed[0].shape[0]
    step = min(outs, max(16, _SCRATCH_BYTES // (dtype.itemsize * in_features)))
    buffer = torch.empty((step, in_features), dtype=dtype)
    for first in range(0, outs, step):
        last = min(first + step, outs)
        dense = buffer[: last - first]
        _write_rows(packed, group_size, first, dense)
        yield first, last, dense


def _write_rows(packed: list[Tensor | None], group_size: int, first: int, dense: Tensor) -> None:
    """Fill `dense` with the rows from `first` on."""
    library, path, _ = load_library()
    count, in_features = dense.shape
    numbers = _plan(in_features, dense.dtype, group_size, *map(_describe, packed), None)
    failed = library.slim_binary_dense(
        *_pointers([*packed, dense]), numbers, first, first + count, PATHS.index(path), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"binary_dense found no memory for {in_features} factors.")
