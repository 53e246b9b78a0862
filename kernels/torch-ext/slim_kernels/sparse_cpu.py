"""Sparse linear layers on the CPU."""

from .sparse_reference import sparse_linear_dx_reference, sparse_linear_reference


sparse_linear_cpu = sparse_linear_reference
sparse_linear_dx_cpu = sparse_linear_dx_reference
