"""Packed linear layers, ternary, binary and sparse, and their gradients: C, Triton and plain PyTorch answer."""

from .binary_cpu import binary_dense
from .binary_ops import binary_linear, binary_linear_dx
from .binary_reference import binary_linear_dx_reference, binary_linear_reference
from .cpu import backend_report, dequantize
from .ops import ternary_linear, ternary_linear_dx
from .reference import (
    pack_ternary,
    ternary_linear_dx_reference,
    ternary_linear_reference,
    unpack_ternary,
)
from .sign_cpu import sign_dense
from .sign_ops import sign_linear, sign_linear_dx
from .sign_reference import (
    pack_signs,
    sign_linear_dx_reference,
    sign_linear_reference,
    unpack_signs,
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
    "binary_dense",
    "binary_linear",
    "binary_linear_dx",
    "binary_linear_dx_reference",
    "binary_linear_reference",
    "dequantize",
    "index_bytes",
    "pack_codes",
    "pack_mask",
    "pack_signs",
    "pack_ternary",
    "pack_values",
    "sign_dense",
    "sign_linear",
    "sign_linear_dx",
    "sign_linear_dx_reference",
    "sign_linear_reference",
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
    "unpack_signs",
    "unpack_ternary",
]
