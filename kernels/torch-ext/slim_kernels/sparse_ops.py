"""The operators `optimum_slim::sparse_linear` and `optimum_slim::sparse_linear_dx`, made as those of `ops.py` are.

The gradient flows to the input only: ``dx = dy @ W``. Backward keeps the packed tensors and nothing else.
"""

import torch
from torch import Tensor

from .sparse_cpu import check_outputs, sparse_linear_cpu, sparse_linear_dx_cpu
from .sparse_reference import check_sparse_arguments, sparse_linear_dx_reference, sparse_linear_reference


_library = torch.library.Library("optimum_slim", "FRAGMENT")
_PACKED = "Tensor weight, Tensor values, Tensor? rows, Tensor? scale, Tensor? zero"
_library.define(
    f"sparse_linear(Tensor x, {_PACKED}, Tensor? bias, int keep, int bits, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"sparse_linear_dx(Tensor dy, {_PACKED}, int columns, int keep, int bits, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
sparse_linear = torch.ops.optimum_slim.sparse_linear.default
sparse_linear_dx = torch.ops.optimum_slim.sparse_linear_dx.default


def _check_linear(x, *arguments) -> None:
    *tensors, keep, bits, group_size = arguments
    described = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    check_sparse_arguments(x.shape[-1] if x.dim() else 0, x.dtype, *described, keep, bits, group_size)


def _check_dx(dy, *arguments) -> None:
    *tensors, columns, keep, bits, group_size = arguments
    described = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    check_sparse_arguments(columns, dy.dtype, *described, None, keep, bits, group_size)
    check_outputs(dy, tensors[0])


def sparse_linear_fallback(x: Tensor, *arguments) -> Tensor:
    _check_linear(x, *arguments)
    return sparse_linear_reference(x, *arguments)


def sparse_linear_dx_fallback(dy: Tensor, *arguments) -> Tensor:
    _check_dx(dy, *arguments)
    return sparse_linear_dx_reference(dy, *arguments)


def sparse_linear_cuda(x: Tensor, *arguments) -> Tensor:
    from .sparse_triton import sparse_linear_triton

    _check_linear(x, *arguments)
    return sparse_linear_triton(x, *arguments)


def sparse_linear_dx_cuda(dy: Tensor, *arguments) -> Tensor:
    from .sparse_triton import sparse_linear_dx_triton

    _check_dx(dy, *arguments)
    return sparse_linear_dx_triton(dy, *arguments)


def sparse_linear_fake(x, weight, *arguments) -> Tensor:
    _check_linear(x, weight, *arguments)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def sparse_linear_dx_fake(dy, weight, values, rows, scale, zero, columns, keep, bits, group_size) -> Tensor:
    _check_dx(dy, weight, values, rows, scale, zero, columns, keep, bits, group_size)
    return dy.new_empty((*dy.shape[:-1], columns))


class SparseLinearFunction(torch.autograd.Function):
    """Saves only the packed tensors."""

    @staticmethod
    def forward(ctx, x, weight, values, rows, scale, zero, bias, keep, bits, group_size):
        ctx.save_for_backward(weight, values, rows, scale, zero)
        ctx.numbers = x.shape[-1], keep, bits, group_size
        with torch._C._AutoDispatchBelowAutograd():
            return sparse_linear(x, weight, values, rows, scale, zero, bias, keep, bits, group_size)

    @staticmethod
    def backward(ctx, dy):
        return sparse_linear_dx(dy, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


def sparse_linear_autograd(x: Tensor, *arguments) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return SparseLinearFunction.apply(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return sparse_linear(x, *arguments)


torch.library.register_fake("optimum_slim::sparse_linear", sparse_linear_fake, lib=_library)
torch.library.register_fake("optimum_slim::sparse_linear_dx", sparse_linear_dx_fake, lib=_library)
_library.impl("sparse_linear", sparse_linear_autograd, "Autograd")
_library.impl("sparse_linear", sparse_linear_cpu, "CPU")
_library.impl("sparse_linear", sparse_linear_cuda, "CUDA")
_library.impl("sparse_linear", sparse_linear_fallback, "CompositeExplicitAutograd")
_library.impl("sparse_linear_dx", sparse_linear_dx_cpu, "CPU")
_library.impl("sparse_linear_dx", sparse_linear_dx_cuda, "CUDA")
_library.impl("sparse_linear_dx", sparse_linear_dx_fallback, "CompositeExplicitAutograd")
