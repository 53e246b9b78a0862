"""Packed linear layers, ternary and sparse, and their gradients, with C, Triton and plain PyTorch behind them."""

from .cpu import backend_report, dequantize
from .ops import ternary_linear, ternary_linear_dx
from .reference import (
    pack_ternary,
    ternary_linear_dx_reference,
    ternary_linear_reference,
    unpack_ternary,
)
from .sparse_cpu import sparse_dense, sparse_speed
from .sparse_ops import sparse_linear, sparse_linear_dx
from .sparse_reference import (
    index_bytes,
    pack_codes,
    pack_mask,
    pack_values,
    sparse_linear_dx_reference,
    sparse_linear_reference,
    unpack_mask,
)


__all__ = [
    "backend_report",
    "dequantize",
    "index_bytes",
    "pack_codes",
    "pack_mask",
    "pack_ternary",
    "pack_values",
    "sparse_dense",
    "sparse_linear",
    "sparse_linear_dx",
    "sparse_linear_dx_reference",
    "sparse_linear_reference",
    "sparse_speed",
    "ternary_linear",
    "ternary_linear_dx",
    "ternary_linear_dx_reference",
    "ternary_linear_reference",
    "unpack_mask",
    "unpack_ternary",
]
