"""Packed ternary linear layers: `ternary_linear` and its gradient, with C, Triton and plain PyTorch behind them."""

from .cpu import backend_report, dequantize
from .ops import ternary_linear, ternary_linear_dx
from .reference import (
    pack_ternary,
    ternary_linear_dx_reference,
    ternary_linear_reference,
    unpack_ternary,
)


__all__ = [
    "backend_report",
    "dequantize",
    "pack_ternary",
    "ternary_linear",
    "ternary_linear_dx",
    "ternary_linear_dx_reference",
    "ternary_linear_reference",
    "unpack_ternary",
]
