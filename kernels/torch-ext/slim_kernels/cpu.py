"""The C kernels behind the CPU implementations: load the library, call `ternary.c`; `*_cpu.py` call the others.

The library is loaded on first use, after torch, so that both share one OpenMP pool. It is looked for next to this
file (built with the wheel), then in the cache folder, where it is compiled once with the C compiler of the machine.
Without either, the plain PyTorch reference answers and a warning says so, once.

Environment variables, read on first use:
    OPTIMUM_SLIM_CPU    avx512vnni, avx2, portable or reference: use this path instead of the best one.
    OPTIMUM_SLIM_CACHE  cache folder; by default optimum_slim in $XDG_CACHE_HOME or ~/.cache.
"""

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import CompilerMissing, find_or_build_library
from .reference import (
    check_arguments,
    quantize_activations,
    ternary_linear_dx_reference,
    ternary_linear_reference,
)
from .reference import dequantize as dequantize_reference


PATHS = ("portable", "avx2", "avx512vnni")
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# From this many tokens on, unpacking chunks of the weight for a dense product is faster than reading codes per token.
_DENSE_TOKENS = 12
_SCRATCH_BYTES = 4 << 20


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.slim_ternary_linear.argtypes = [pointer] * 6 + [size] * 5 + [integer] * 3
    library.slim_dequantize.argtypes = [pointer] * 4 + [size] * 6 + [integer] * 2
    library.slim_dequantize.restype = None
    library.slim_sparse_linear.argtypes = [pointer] * 9 + [size] + [integer] * 2
    library.slim_sparse_dense.argtypes = [pointer] * 7 + [size] * 2 + [integer] * 2
    library.slim_sign_linear.argtypes = [pointer] * 7 + [size] + [integer] * 3
    library.slim_sign_ternary.argtypes = [pointer] * 2 + [size] * 3 + [integer] * 2
    library.slim_sign_ternary.restype = None
    library.slim_sign_dense.argtypes = [pointer] * 5 + [size] * 2 + [integer] * 2
    library.slim_binary_linear.argtypes = [pointer] * 9 + [size] + [integer] * 2
    library.slim_binary_dense.argtypes = [pointer] * 7 + [size] * 2 + [integer] * 2
    library.slim_use_isa.restype = None
    return library


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str, str]:
    """Return the library (None for the reference), the name of the path in use, and where it comes from."""
    forced = os.environ.get("OPTIMUM_SLIM_CPU") or None
    if forced not in (None, "reference", *PATHS):
        raise ValueError(
            f"OPTIMUM_SLIM_CPU={forced!r} names no CPU path; use one of {', '.join((*PATHS, 'reference'))}."
        )
    if forced == "reference":
        return None, "reference", "OPTIMUM_SLIM_CPU=reference"
    try:
        path = find_or_build_library()
        library = _bind(path)
    except (CompilerMissing, OSError) as error:
        warnings.warn(
            f"optimum-slim runs packed layers in plain PyTorch, which is slow: {error}. Install a C compiler "
            "(apt install gcc, or xcode-select --install) and start again; it is used once.",
            stacklevel=3,
        )
        return None, "reference", str(error)
    best = library.slim_best_isa()
    chosen = best if forced is None else PATHS.index(forced)
    if chosen > best:
        raise RuntimeError(f"OPTIMUM_SLIM_CPU={forced}, but this processor supports {PATHS[best]} at best; unset it.")
    library.slim_use_isa(chosen)
    return library, PATHS[chosen], str(path)


def backend_report() -> dict[str, str]:
    """Which implementation answers for each kind of device on this machine, and why."""
    library, path, origin = load_library()
    if library is None:
        cpu = f"reference ({origin})"
    else:
        threads = (
            f"OpenMP, {torch.get_num_threads()} threads" if library.slim_has_openmp() else "one thread, no OpenMP"
        )
        cpu = f"C kernel, {path}, {threads} ({origin})"
    gpu = f"triton ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "none (torch sees no GPU)"
    return {"cpu": cpu, "cuda": gpu, "other": "reference"}


@functools.lru_cache(maxsize=4096)
def _plan(columns, dtype, weight, weight_dtype, scale, scale_dtype, offset, offset_dtype, bias, bias_dtype, *numbers):
    """Check the arguments once per combination of shapes and dtypes; return the type codes and groups for C."""
    check_arguments(
        columns, dtype, weight, weight_dtype, scale, scale_dtype, offset, offset_dtype, bias, bias_dtype, *numbers
    )
    codes = [_TYPE_CODES.get(found, 0) for found in (dtype, scale_dtype, offset_dtype, bias_dtype)]
    types = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    return types, 0 if len(scale) == 1 else scale[1]


def ternary_linear_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    """`ternary_linear_reference` for CPU tensors: one call into C does the whole layer."""
    shape = x.shape
    columns = shape[-1] if shape else 0
    types, groups = _plan(
        columns,
        x.dtype,
        weight.shape,
        weight.dtype,
        scale.shape,
        scale.dtype,
        None if offset is None else offset.shape,
        None if offset is None else offset.dtype,
        None if bias is None else bias.shape,
        None if bias is None else bias.dtype,
        out_features,
        group_size,
        act_bits,
    )
    library, path, _ = load_library()
    tokens = x.numel() // columns if columns else 0
    if library is None or tokens == 0:
        return ternary_linear_reference(x, weight, scale, offset, bias, out_features, group_size, act_bits)
    if tokens >= _DENSE_TOKENS and (act_bits == 0 or path == "portable"):
        return _linear_in_chunks(x, weight, scale, offset, bias, out_features, group_size, act_bits)
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    if offset is not None:
        offset = offset.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((*shape[:-1], out_features))
    failed = library.slim_ternary_linear(
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        None if offset is None else offset.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        tokens,
        out_features,
        columns,
        groups,
        group_size,
        types,
        act_bits,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"ternary_linear found no memory for the scratch of {tokens} tokens of {columns} columns.")
    return y


def ternary_linear_dx_cpu(dy: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """`ternary_linear_dx_reference` for CPU tensors: the dense matrix exists a few rows at a time."""
    outs, columns = dy.shape[-1] if dy.dim() else 0, weight.shape[-1]
    _plan(
        columns,
        dy.dtype,
        weight.shape,
        weight.dtype,
        scale.shape,
        scale.dtype,
        None if offset is None else offset.shape,
        None if offset is None else offset.dtype,
        None,
        None,
        outs,
        group_size,
        0,
    )
    if load_library()[0] is None:
        return ternary_linear_dx_reference(dy, weight, scale, offset, group_size)
    rows = dy.reshape(-1, outs).float()
    dx = rows.new_zeros((rows.shape[0], columns))
    for first, last in _row_chunks(outs, columns):
        dx.addmm_(
            rows[:, first:last], _dense_rows(weight, scale, offset, outs, group_size, torch.float32, first, last)
        )
    return dx.to(dy.dtype).view(*dy.shape[:-1], columns)


def dequantize(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    out_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense matrix of shape (out, in): ``scale * T + offset``, computed in fp32 and rounded once to `dtype`."""
    if not weight.is_cpu or dtype not in _TYPE_CODES or load_library()[0] is None:
        return dequantize_reference(weight, scale, offset, out_features, group_size, dtype)
    return _dense_rows(weight, scale, offset, out_features, group_size, dtype, 0, out_features)


def _linear_in_chunks(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    dtype = torch.bfloat16 if _multiplies_bfloat16(x.dtype) and not act_bits else torch.float32
    if act_bits:
        rows = quantize_activations(rows, columns if scale.dim() == 1 else min(group_size, columns))
    rows = rows.to(dtype)
    y = x.new_empty((rows.shape[0], out_features))
    for first, last in _row_chunks(out_features, columns):
        dense = _dense_rows(weight, scale, offset, out_features, group_size, dtype, first, last)
        y[:, first:last] = F.linear(rows, dense, None if bias is None else bias[first:last].to(dtype))
    return y.view(*x.shape[:-1], out_features)


def _multiplies_bfloat16(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def _row_chunks(outs: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(16, _SCRATCH_BYTES // (4 * columns))
    for first in range(0, outs, step):
        yield first, min(first + step, outs)


def _dense_rows(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    outs: int,
    group_size: int,
    dtype: torch.dtype,
    first: int,
    last: int,
) -> Tensor:
    library = load_library()[0]
    weight, scale = weight.contiguous(), scale.contiguous()
    offset = None if offset is None else offset.contiguous()
    columns = weight.shape[1]
    dense = torch.empty((last - first, columns), dtype=dtype)
    library.slim_dequantize(
        weight.data_ptr(),
        scale.data_ptr(),
        None if offset is None else offset.data_ptr(),
        dense.data_ptr(),
        first,
        last,
        outs,
        columns,
        0 if scale.dim() == 1 else scale.shape[1],
        group_size,
        _TYPE_CODES[dtype]
        | _TYPE_CODES[scale.dtype] << 2
        | _TYPE_CODES[offset.dtype if offset is not None else dtype] << 4,
        torch.get_num_threads(),
    )
    return dense
