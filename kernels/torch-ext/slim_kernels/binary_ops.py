"""The operators `optimum_slim::binary_linear` and `optimum_slim::binary_linear_dx`, made as those of `ops.py` are.

The gradient flows to the input only: ``dx = dy @ W``. Backward keeps the packed tensors and nothing else.
"""

import torch
from torch import Tensor

from .binary_cpu import binary_linear_cpu, binary_linear_dx_cpu, check_binary_outputs
from .binary_reference import binary_linear_dx_reference, binary_linear_reference, check_binary_arguments


_library = torch.library.Library("optimum_slim", "FRAGMENT")
_PACKED = "Tensor weight, Tensor salient, Tensor scale, Tensor? offset, Tensor? columns"
_library.define(
    f"binary_linear(Tensor x, {_PACKED}, Tensor? bias, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"binary_linear_dx(Tensor dy, {_PACKED}, int in_features, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
binary_linear = torch.ops.optimum_slim.binary_linear.default
binary_linear_dx = torch.ops.optimum_slim.binary_linear_dx.default


def _check_linear(x, *arguments) -> None:
    *tensors, group_size = arguments
    described = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    check_binary_arguments(x.shape[-1] if x.dim() else 0, x.dtype, *described, group_size)


def _check_dx(dy, *arguments) -> None:
    *tensors, in_features, group_size = arguments
    described = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    check_binary_arguments(in_features, dy.dtype, *described, None, group_size)
    check_binary_outputs(dy, tensors[0])


def binary_linear_fallback(x: Tensor, *arguments) -> Tensor:
    _check_linear(x, *arguments)
    return binary_linear_reference(x, *arguments)


def binary_linear_dx_fallback(dy: Tensor, *arguments) -> Tensor:
    _check_dx(dy, *arguments)
    return binary_linear_dx_reference(dy, *arguments)


def binary_linear_cuda(x: Tensor, *arguments) -> Tensor:
    from .binary_triton import binary_linear_triton

    _check_linear(x, *arguments)
    return binary_linear_triton(x, *arguments)


def binary_linear_dx_cuda(dy: Tensor, *arguments) -> Tensor:
    from .binary_triton import binary_linear_dx_triton

    _check_dx(dy, *arguments)
    return binary_linear_dx_triton(dy, *arguments)


def binary_linear_fake(x, weight, *arguments) -> Tensor:
    _check_linear(x, weight, *arguments)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def binary_linear_dx_fake(dy, weight, salient, scale, offset, columns, in_features, group_size) -> Tensor:
    _check_dx(dy, weight, salient, scale, offset, columns, in_features, group_size)
    return dy.new_empty((*dy.shape[:-1], in_features))


class BinaryLinearFunction(torch.autograd.Function):
    """Saves only the packed tensors."""

    @staticmethod
    def forward(ctx, x, weight, salient, scale, offset, columns, bias, group_size):
        ctx.save_for_backward(weight, salient, scale, offset, columns)
        ctx.numbers = x.shape[-1], group_size
        with torch._C._AutoDispatchBelowAutograd():
            return binary_linear(x, weight, salient, scale, offset, columns, bias, group_size)

    @staticmethod
    def backward(ctx, dy):
        return binary_linear_dx(dy, *ctx.saved_tensors, *ctx.numbers), *[None] * 7


def binary_linear_autograd(x: Tensor, *arguments) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return BinaryLinearFunction.apply(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return binary_linear(x, *arguments)


torch.library.register_fake("optimum_slim::binary_linear", binary_linear_fake, lib=_library)
torch.library.register_fake("optimum_slim::binary_linear_dx", binary_linear_dx_fake, lib=_library)
_library.impl("binary_linear", binary_linear_autograd, "Autograd")
_library.impl("binary_linear", binary_linear_cpu, "CPU")
_library.impl("binary_linear", binary_linear_cuda, "CUDA")
_library.impl("binary_linear", binary_linear_fallback, "CompositeExplicitAutograd")
_library.impl("binary_linear_dx", binary_linear_dx_cpu, "CPU")
_library.impl("binary_linear_dx", binary_linear_dx_cuda, "CUDA")
_library.impl("binary_linear_dx", binary_linear_dx_fallback, "CompositeExplicitAutograd")
