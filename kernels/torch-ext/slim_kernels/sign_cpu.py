"""The C kernel of sign layers (`sign.c`): which way is faster for how many tokens, and the calls.

    few tokens              the kernel multiplies straight from the bits
    many, int8 activations  some rows at a time become ternary codes, which `ternary.c` multiplies as integers
    many, bf16              some rows at a time are made dense, in a piece that stays in the cache, for PyTorch, where
                            it multiplies bf16 in hardware; elsewhere the bits are faster for any number of tokens

`OPTIMUM_SLIM_CPU` and the library are those of `cpu.py`, and so are the paths.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import _TYPE_CODES, PATHS, _multiplies_bfloat16, load_library, ternary_linear_cpu
from .reference import quantize_activations
from .sign_reference import check_sign_arguments, sign_linear_dx_reference, sign_linear_reference
from .sign_reference import sign_dense as sign_dense_reference
from .sparse_cpu import _contiguous, _describe, _pointers


# From this many tokens on, int8 activations are faster as products of ternary codes, where the processor has them.
_TERNARY_TOKENS = {"avx2": 6, "avx512vnni": 17}
# The same for float activations and dense chunks: where PyTorch multiplies bf16 in hardware, and for portable C.
_BFLOAT16_TOKENS = 96
_PORTABLE_TOKENS = 17
_SCRATCH_BYTES = 4 << 20


@functools.lru_cache(maxsize=4096)
def _plan(columns: int, dtype: torch.dtype, weight, scale_in, scale_out, bias, activation_bits: int) -> ctypes.Array:
    """Check the arguments once per combination of shapes and dtypes; return the numbers for C (see read_layout)."""
    check_sign_arguments(columns, dtype, weight, scale_in, scale_out, bias, activation_bits)
    types = [_TYPE_CODES.get(tensor and tensor[1], 0) for tensor in ((None, dtype), scale_in, scale_out, bias)]
    numbers = (weight[0][0], columns, scale_out[0] == (1,), *types)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def sign_linear_cpu(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None,
    scale_out: Tensor,
    bias: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """`sign_linear_reference` for CPU tensors; mostly one call into C does the whole layer."""
    shape = x.shape
    columns = shape[-1] if shape else 0
    packed = (weight, scale_in, scale_out)
    numbers = _plan(columns, x.dtype, *map(_describe, packed), _describe(bias), activation_bits)
    library, path, _ = load_library()
    tokens = x.numel() // columns if columns else 0
    outs = weight.shape[0]
    if library is None or tokens == 0 or outs == 0:
        return sign_linear_reference(x, *packed, bias, activation_bits)
    x, *packed, bias = _contiguous((x, *packed, bias))
    if activation_bits and tokens >= _TERNARY_TOKENS.get(path, tokens + 1):
        return _linear_of_codes(x, packed, bias)
    if _prefers_dense(tokens, x.dtype, path):
        return _linear_in_chunks(x, packed, bias, activation_bits)
    y = x.new_empty((*shape[:-1], outs))
    failed = library.slim_sign_linear(
        *_pointers([x, *packed, bias, y]),
        numbers,
        tokens,
        activation_bits,
        PATHS.index(path),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"sign_linear found no memory for the scratch of {tokens} tokens of {columns} columns.")
    return y


def check_sign_outputs(dy: Tensor, weight: Tensor) -> None:
    """Raise ValueError if the gradient `dy` is not one of the outputs of `weight`."""
    if not dy.dim() or dy.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"sign_linear_dx got dy of shape {tuple(dy.shape)}; for weight of shape {tuple(weight.shape)} the last "
            f"number must be {weight.shape[0]}."
        )


def sign_linear_dx_cpu(dy: Tensor, weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, columns: int) -> Tensor:
    """`sign_linear_dx_reference` for CPU tensors: the dense matrix exists a few rows at a time."""
    packed = (weight, scale_in, scale_out)
    _plan(columns, dy.dtype, *map(_describe, packed), None, 0)
    check_sign_outputs(dy, weight)
    if load_library()[0] is None or weight.numel() == 0:
        return sign_linear_dx_reference(dy, *packed, columns)
    gradient = dy.reshape(-1, weight.shape[0]).float()
    dx = gradient.new_zeros((gradient.shape[0], columns))
    for first, last, dense in _dense_chunks(_contiguous(packed), columns, torch.float32):
        dx.addmm_(gradient[:, first:last], dense)
    return dx.to(dy.dtype).view(*dy.shape[:-1], columns)


def sign_dense(
    weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dense matrix of shape (out, columns): ``scale_out * S * scale_in``, computed in fp32 and rounded to `dtype`."""
    packed = (weight, scale_in, scale_out)
    if not weight.is_cpu or weight.numel() == 0 or dtype not in _TYPE_CODES or load_library()[0] is None:
        return sign_dense_reference(*packed, columns, dtype)
    dense = torch.empty((weight.shape[0], columns), dtype=dtype)
    _write_rows(_contiguous(packed), 0, dense)
    return dense


def _prefers_dense(tokens: int, dtype: torch.dtype, path: str) -> bool:
    if path == "portable":
        return tokens >= _PORTABLE_TOKENS
    return tokens >= _BFLOAT16_TOKENS and _multiplies_bfloat16(dtype)


def _linear_of_codes(x: Tensor, packed: list[Tensor | None], bias: Tensor | None) -> Tensor:
    """Signs are ternary codes without zeros: `ternary_linear_cpu` rounds x * scale_in to int8 and multiplies."""
    library, path, _ = load_library()
    (weight, scale_in, scale_out), columns, outs = packed, x.shape[-1], packed[0].shape[0]
    inputs = x.view(-1, columns)
    if scale_in is not None:
        inputs = inputs.float() * scale_in.float()
    y = x.new_empty((len(inputs), outs))
    step = min(outs, max(64, 4 * _SCRATCH_BYTES // columns))
    buffer = torch.empty((-(-step // 4), columns), dtype=torch.uint8)
    for first in range(0, outs, step):
        last = min(first + step, outs)
        codes = buffer[: -(-(last - first) // 4)]
        library.slim_sign_ternary(
            weight.data_ptr(), codes.data_ptr(), first, last, columns, PATHS.index(path), torch.get_num_threads()
        )
        scale = scale_out if scale_out.shape == (1,) else scale_out[first:last, None]
        part = None if bias is None else bias[first:last]
        y[:, first:last] = ternary_linear_cpu(inputs, codes, scale, None, part, last - first, columns, 8)
    return y.view(*x.shape[:-1], outs)


def _linear_in_chunks(x: Tensor, packed: list[Tensor | None], bias: Tensor | None, activation_bits: int) -> Tensor:
    columns, outs = x.shape[-1], packed[0].shape[0]
    tokens = x.view(-1, columns)
    if activation_bits:
        scaled = tokens.float() if packed[1] is None else tokens.float() * packed[1].float()
        tokens, packed = quantize_activations(scaled, columns), [packed[0], None, packed[2]]
    dtype = torch.bfloat16 if _multiplies_bfloat16(tokens.dtype) else torch.float32
    tokens = tokens.to(dtype)
    y = x.new_empty((len(tokens), outs))
    for first, last, dense in _dense_chunks(packed, columns, dtype):
        y[:, first:last] = F.linear(tokens, dense, None if bias is None else bias[first:last].to(dtype))
    return y.view(*x.shape[:-1], outs)


def _dense_chunks(packed: list[Tensor | None], columns: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first, last, dense rows from first to last); the next ones overwrite them."""
    outs = packed[0].shape[0]
    step = min(outs, max(16, _SCRATCH_BYTES // (dtype.itemsize * columns)))
    buffer = torch.empty((step, columns), dtype=dtype)
    for first in range(0, outs, step):
        last = min(first + step, outs)
        dense = buffer[: last - first]
        _write_rows(packed, first, dense)
        yield first, last, dense


def _write_rows(packed: list[Tensor | None], first: int, dense: Tensor) -> None:
    """Fill `dense` with the rows from `first` on."""
    library, path, _ = load_library()
    count, columns = dense.shape
    numbers = _plan(columns, dense.dtype, *map(_describe, packed), None, 0)
    failed = library.slim_sign_dense(
        *_pointers([*packed, dense]), numbers, first, first + count, PATHS.index(path), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"sign_dense found no memory for {columns} scales.")
