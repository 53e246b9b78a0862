"""The operators `optimum_slim::ternary_linear` and `optimum_slim::ternary_linear_dx`.

PyTorch's dispatcher picks the implementation by device: the C kernel for CPU tensors (`cpu.py`), Triton for CUDA and
ROCm (`triton.py`, imported on first use), plain PyTorch (`reference.py`) for every other device. The gradient flows to
the input only, straight through the rounding of the activations: ``dx = dy @ W``. Backward keeps the packed tensors
and nothing else.
"""

import torch
from torch import Tensor

from .cpu import ternary_linear_cpu, ternary_linear_dx_cpu
from .reference import check_arguments, ternary_linear_dx_reference, ternary_linear_reference


_library = torch.library.Library("optimum_slim", "FRAGMENT")
_library.define(
    "ternary_linear(Tensor x, Tensor weight, Tensor scale, Tensor? offset, Tensor? bias, int out_features, "
    "int group_size, int act_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "ternary_linear_dx(Tensor dy, Tensor weight, Tensor scale, Tensor? offset, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
ternary_linear = torch.ops.optimum_slim.ternary_linear.default
ternary_linear_dx = torch.ops.optimum_slim.ternary_linear_dx.default


def _check(
    columns: int,
    dtype: torch.dtype,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    *numbers: int,
) -> None:
    described = []
    for tensor in (weight, scale, offset, bias):
        described += (None, None) if tensor is None else (tensor.shape, tensor.dtype)
    check_arguments(columns, dtype, *described, *numbers)


def _check_linear(x: Tensor, *arguments) -> None:
    _check(x.shape[-1] if x.dim() else 0, x.dtype, *arguments)


def _check_dx(dy: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> None:
    outs = dy.shape[-1] if dy.dim() else 0
    _check(weight.shape[-1], dy.dtype, weight, scale, offset, None, outs, group_size, 0)


def ternary_linear_fallback(x: Tensor, *arguments) -> Tensor:
    _check_linear(x, *arguments)
    return ternary_linear_reference(x, *arguments)


def ternary_linear_dx_fallback(dy: Tensor, *arguments) -> Tensor:
    _check_dx(dy, *arguments)
    return ternary_linear_dx_reference(dy, *arguments)


def ternary_linear_cuda(x: Tensor, *arguments) -> Tensor:
    from .triton import ternary_linear_triton

    _check_linear(x, *arguments)
    return ternary_linear_triton(x, *arguments)


def ternary_linear_dx_cuda(dy: Tensor, *arguments) -> Tensor:
    from .triton import ternary_linear_dx_triton

    _check_dx(dy, *arguments)
    return ternary_linear_dx_triton(dy, *arguments)


def ternary_linear_fake(x, weight, scale, offset, bias, out_features, group_size, act_bits) -> Tensor:
    _check_linear(x, weight, scale, offset, bias, out_features, group_size, act_bits)
    return x.new_empty((*x.shape[:-1], out_features))


def ternary_linear_dx_fake(dy, weight, scale, offset, group_size) -> Tensor:
    _check_dx(dy, weight, scale, offset, group_size)
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]))


class TernaryLinearFunction(torch.autograd.Function):
    """Saves only the packed tensors."""

    @staticmethod
    def forward(ctx, x, weight, scale, offset, bias, out_features, group_size, act_bits):
        ctx.save_for_backward(weight, scale, offset)
        ctx.group_size = group_size
        with torch._C._AutoDispatchBelowAutograd():
            return ternary_linear(x, weight, scale, offset, bias, out_features, group_size, act_bits)

    @staticmethod
    def backward(ctx, dy):
        weight, scale, offset = ctx.saved_tensors
        return ternary_linear_dx(dy, weight, scale, offset, ctx.group_size), *[None] * 7


def ternary_linear_autograd(x: Tensor, *arguments) -> Tensor:
    # Written by hand because torch.library.register_autograd costs 2 us more on every call without a gradient.
    if x.requires_grad and torch.is_grad_enabled():
        return TernaryLinearFunction.apply(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return ternary_linear(x, *arguments)


torch.library.register_fake("optimum_slim::ternary_linear", ternary_linear_fake, lib=_library)
torch.library.register_fake("optimum_slim::ternary_linear_dx", ternary_linear_dx_fake, lib=_library)
_library.impl("ternary_linear", ternary_linear_autograd, "Autograd")
_library.impl("ternary_linear", ternary_linear_cpu, "CPU")
_library.impl("ternary_linear", ternary_linear_cuda, "CUDA")
_library.impl("ternary_linear", ternary_linear_fallback, "CompositeExplicitAutograd")
_library.impl("ternary_linear_dx", ternary_linear_dx_cpu, "CPU")
_library.impl("ternary_linear_dx", ternary_linear_dx_cuda, "CUDA")
_library.impl("ternary_linear_dx", ternary_linear_dx_fallback, "CompositeExplicitAutograd")
