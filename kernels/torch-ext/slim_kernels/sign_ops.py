"""The operators `optimum_slim::sign_linear` and `optimum_slim::sign_linear_dx`, made as those of `ops.py` are.

The gradient flows to the input only, straight through the rounding of the activations: ``dx = dy @ W``. Backward keeps
the packed tensors and nothing else.
"""

import torch
from torch import Tensor

from .sign_cpu import check_sign_outputs, sign_linear_cpu, sign_linear_dx_cpu
from .sign_reference import check_sign_arguments, sign_linear_dx_reference, sign_linear_reference


_library = torch.library.Library("optimum_slim", "FRAGMENT")
_library.define(
    "sign_linear(Tensor x, Tensor weight, Tensor? scale_in, Tensor scale_out, Tensor? bias, int activation_bits) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sign_linear_dx(Tensor dy, Tensor weight, Tensor? scale_in, Tensor scale_out, int columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
sign_linear = torch.ops.optimum_slim.sign_linear.default
sign_linear_dx = torch.ops.optimum_slim.sign_linear_dx.default


def _check_linear(x, *arguments) -> None:
    *tensors, activation_bits = arguments
    described = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    check_sign_arguments(x.shape[-1] if x.dim() else 0, x.dtype, *described, activation_bits)


def _check_dx(dy, *arguments) -> None:
    *tensors, columns = arguments
    described = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    check_sign_arguments(columns, dy.dtype, *described, None, 0)
    check_sign_outputs(dy, tensors[0])


def sign_linear_fallback(x: Tensor, *arguments) -> Tensor:
    _check_linear(x, *arguments)
    return sign_linear_reference(x, *arguments)


def sign_linear_dx_fallback(dy: Tensor, *arguments) -> Tensor:
    _check_dx(dy, *arguments)
    return sign_linear_dx_reference(dy, *arguments)


def sign_linear_cuda(x: Tensor, *arguments) -> Tensor:
    from .sign_triton import sign_linear_triton

    _check_linear(x, *arguments)
    return sign_linear_triton(x, *arguments)


def sign_linear_dx_cuda(dy: Tensor, *arguments) -> Tensor:
    from .sign_triton import sign_linear_dx_triton

    _check_dx(dy, *arguments)
    return sign_linear_dx_triton(dy, *arguments)


def sign_linear_fake(x, weight, *arguments) -> Tensor:
    _check_linear(x, weight, *arguments)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def sign_linear_dx_fake(dy, weight, scale_in, scale_out, columns) -> Tensor:
    _check_dx(dy, weight, scale_in, scale_out, columns)
    return dy.new_empty((*dy.shape[:-1], columns))


class SignLinearFunction(torch.autograd.Function):
    """Saves only the packed tensors."""

    @staticmethod
    def forward(ctx, x, weight, scale_in, scale_out, bias, activation_bits):
        ctx.save_for_backward(weight, scale_in, scale_out)
        ctx.columns = x.shape[-1]
        with torch._C._AutoDispatchBelowAutograd():
            return sign_linear(x, weight, scale_in, scale_out, bias, activation_bits)

    @staticmethod
    def backward(ctx, dy):
        return sign_linear_dx(dy, *ctx.saved_tensors, ctx.columns), *[None] * 5


def sign_linear_autograd(x: Tensor, *arguments) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return SignLinearFunction.apply(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return sign_linear(x, *arguments)


torch.library.register_fake("optimum_slim::sign_linear", sign_linear_fake, lib=_library)
torch.library.register_fake("optimum_slim::sign_linear_dx", sign_linear_dx_fake, lib=_library)
_library.impl("sign_linear", sign_linear_autograd, "Autograd")
_library.impl("sign_linear", sign_linear_cpu, "CPU")
_library.impl("sign_linear", sign_linear_cuda, "CUDA")
_library.impl("sign_linear", sign_linear_fallback, "CompositeExplicitAutograd")
_library.impl("sign_linear_dx", sign_linear_dx_cpu, "CPU")
_library.impl("sign_linear_dx", sign_linear_dx_cuda, "CUDA")
_library.impl("sign_linear_dx", sign_linear_dx_fallback, "CompositeExplicitAutograd")
