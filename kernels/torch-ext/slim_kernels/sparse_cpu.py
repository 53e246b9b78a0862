"""The C kernel of sparse layers (`sparse.c`): which way is faster for how many tokens, and the calls.

    few tokens     the kernel multiplies straight from the packed form: it reads fewer bytes than a dense layer, and
                   memory is what a dense layer waits for
    many tokens    a few rows at a time are made dense, in a piece that stays in the cache, and multiplied by PyTorch

`OPTIMUM_SLIM_CPU` and the library are those of `cpu.py`. What it calls avx512vnni is here avx512bf16, avx512vbmi2
or, on a processor without VBMI2, avx2.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import _TYPE_CODES, PATHS, _multiplies_bfloat16, load_library
from .sparse_reference import check_sparse_arguments, sparse_linear_dx_reference, sparse_linear_reference
from .sparse_reference import sparse_dense as sparse_dense_reference


SPARSE_PATHS = ("portable", "avx2", "avx512vbmi2", "avx512bf16")
# From this many tokens on, making chunks of rows dense for PyTorch is faster than multiplying packed rows.
_DENSE_TOKENS = 25
_SCRATCH_BYTES = 4 << 20


def sparse_path() -> str:
    """The one of `SPARSE_PATHS` that answers for sparse layers on the CPU, or "reference"."""
    library, path, _ = load_library()
    return "reference" if library is None else SPARSE_PATHS[sparse_isa(path)]


def sparse_speed() -> str:
    """Where the CPU operator is faster than bf16 `F.linear` and where not, as benchmarks/sparse_linear.py found."""
    path = sparse_path()
    if path == "reference":
        return "plain PyTorch answers for sparse layers on this CPU, slower than dense at every shape"
    if path in ("portable", "avx2"):
        return (
            f"sparse layers on this CPU ({path}): slower than dense for single tokens, about even for 4 to 16 at "
            "once, slower for long prompts"
        )
    return (
        f"sparse layers on this CPU ({path}): 2.5 times or more the speed of dense for single tokens, about even at "
        "16 at once, 0.65 to 0.95 times for long prompts, for which the weights are unpacked first"
    )


@functools.cache
def sparse_isa(path: str) -> int:
    """Index in `SPARSE_PATHS` of what the path `path` of `cpu.PATHS` means for sparse layers on this processor."""
    return load_library()[0].slim_sparse_best_isa() if path == PATHS[-1] else PATHS.index(path)


@functools.lru_cache(maxsize=4096)
def _plan(columns: int, dtype: torch.dtype, keep: int, bits: int, group_size: int, *described) -> ctypes.Array:
    """Check the arguments once per combination of shapes and dtypes; return the numbers for C (see read_layout)."""
    weight, values, rows, scale, _, bias = described
    check_sparse_arguments(columns, dtype, *described, keep, bits, group_size)
    kept = (0, values[0][0]) if rows else (values[0][1], values[0][0] * values[0][1])
    types = [_TYPE_CODES.get(tensor and tensor[1], 0) for tensor in ((None, dtype), values, scale, bias)]
    numbers = (weight[0][0], columns, scale[0][1] if scale else 1, group_size, *kept, keep, bits, *types)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _describe(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _contiguous(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _pointers(tensors: list[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def sparse_linear_cpu(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    keep: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`sparse_linear_reference` for CPU tensors; for few tokens, one call into C does the whole layer."""
    shape = x.shape
    columns = shape[-1] if shape else 0
    packed = (weight, values, rows, scale, zero)
    numbers = _plan(columns, x.dtype, keep, bits, group_size, *map(_describe, packed), _describe(bias))
    library, path, _ = load_library()
    tokens = x.numel() // columns if columns else 0
    outs = weight.shape[0]
    if library is None or tokens == 0 or outs == 0:
        return sparse_linear_reference(x, *packed, bias, keep, bits, group_size)
    packed = _contiguous(packed)
    if tokens >= _DENSE_TOKENS:
        return _linear_in_chunks(x, packed, bias, keep, bits, group_size)
    (x, bias), y = _contiguous((x, bias)), x.new_empty((*shape[:-1], outs))
    failed = library.slim_sparse_linear(
        x.data_ptr(),
        *_pointers([*packed, bias]),
        y.data_ptr(),
        numbers,
        tokens,
        sparse_isa(path),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"sparse_linear found no memory for the scratch of {tokens} tokens of {columns} columns.")
    return y


def check_outputs(dy: Tensor, weight: Tensor) -> None:
    """Raise ValueError if the gradient `dy` is not one of the outputs of `weight`."""
    if not dy.dim() or dy.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"sparse_linear_dx got dy of shape {tuple(dy.shape)}; for weight of shape {tuple(weight.shape)} the last "
            f"number must be {weight.shape[0]}."
        )


def sparse_linear_dx_cpu(
    dy: Tensor,
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    columns: int,
    keep: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`sparse_linear_dx_reference` for CPU tensors: the dense matrix exists a few rows at a time."""
    packed = (weight, values, rows, scale, zero)
    _plan(columns, dy.dtype, keep, bits, group_size, *map(_describe, packed), None)
    check_outputs(dy, weight)
    outs = weight.shape[0]
    if load_library()[0] is None or weight.numel() == 0:
        return sparse_linear_dx_reference(dy, *packed, columns, keep, bits, group_size)
    packed, gradient = _contiguous(packed), dy.reshape(-1, outs).float()
    dx = gradient.new_zeros((gradient.shape[0], columns))
    for first, last, dense in _dense_chunks(packed, columns, keep, bits, group_size, torch.float32):
        dx.addmm_(gradient[:, first:last], dense)
    return dx.to(dy.dtype).view(*dy.shape[:-1], columns)


def sparse_dense(
    weight: Tensor,
    values: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    columns: int,
    keep: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense matrix (out, columns), computed in fp32 where there are codes, and rounded once to `dtype`."""
    packed = (weight, values, rows, scale, zero)
    if not weight.is_cpu or weight.numel() == 0 or dtype not in _TYPE_CODES or load_library()[0] is None:
        return sparse_dense_reference(*packed, columns, keep, bits, group_size, dtype)
    dense = torch.empty((weight.shape[0], columns), dtype=dtype)
    _write_rows(_contiguous(packed), keep, bits, group_size, 0, dense)
    return dense


def _linear_in_chunks(
    x: Tensor, packed: list[Tensor | None], bias: Tensor | None, keep: int, bits: int, group_size: int
) -> Tensor:
    columns, outs = x.shape[-1], packed[0].shape[0]
    dtype = torch.bfloat16 if _multiplies_bfloat16(x.dtype) else torch.float32
    tokens = x.reshape(-1, columns).to(dtype)
    y = x.new_empty((tokens.shape[0], outs))
    for first, last, dense in _dense_chunks(packed, columns, keep, bits, group_size, dtype):
        y[:, first:last] = F.linear(tokens, dense, None if bias is None else bias[first:last].to(dtype))
    return y.view(*x.shape[:-1], outs)


def _dense_chunks(
    packed: list[Tensor | None], columns: int, keep: int, bits: int, group_size: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first, last, dense rows from first to last); the next ones overwrite them."""
    outs = packed[0].shape[0]
    step = min(outs, max(16, _SCRATCH_BYTES // (dtype.itemsize * columns)))
    buffer = torch.empty((step, columns), dtype=dtype)
    for first in range(0, outs, step):
        last = min(first + step, outs)
        dense = buffer[: last - first]
        _write_rows(packed, keep, bits, group_size, first, dense)
        yield first, last, dense


def _write_rows(packed: list[Tensor | None], keep: int, bits: int, group_size: int, first: int, dense: Tensor) -> None:
    """Fill `dense` with the rows from `first` on."""
    library, path, _ = load_library()
    count, columns = dense.shape
    numbers = _plan(columns, dense.dtype, keep, bits, group_size, *map(_describe, packed), None)
    failed = library.slim_sparse_dense(
        *_pointers(packed), dense.data_ptr(), numbers, first, first + count, sparse_isa(path), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"sparse_dense found no memory for the scratch of a row of {columns} columns.")
