"""Linear layers in training for few bits: full-precision latent weights, quantized anew in each forward pass.

A layer keeps a latent weight w in fp32 and multiplies with what it will be stored as, Q(w); rounding has no useful
gradient, so the gradient passes straight through it, as if Q(w) were w (the straight-through estimator). With lambda
below 1 only a part of the way is gone, for weights and activations alike, so that a model can be led there:

    w_eff = w + lambda * stopgrad(Q(w) - w)        x_eff = x + lambda * stopgrad(Q8(x) - x)

Lambda counts in training mode only: an evaluation is always that of the model as it will be stored. Three ways to
quantize are here, each the training form of a packed layer:

- `AbsmeanLinear`, BitNet b1.58 (arXiv 2402.17764): Q(w) = γ clamp(round(w / γ), -1, 1) with γ = mean |w|.
- `SignsLinear`, BitNet b1 (arXiv 2310.11453): Q(w) = β sign(w - α) with α = mean w, β = mean |w| and sign(0) = -1.
- `GridLinear`, ternary with a scale and an offset for each group of columns in a row, as `PT2LLM` leaves it:
  Q(w) = s clamp(round((w - o) / s), -1, 1) + o, in which s and o are trained as well.

γ, α and β are computed from w in each pass, and no gradient goes through them. A layer may have an RMSNorm over its
inputs (SubLN), which is trained and becomes the packed layer's.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._kernels import pack_signs, pack_ternary, unpack_ternary
from ._kernels.reference import quantize_activations
from .packed import PackedLinear, TernaryLinear, rms_norm


SMALLEST = 1e-5  # of the scale of a matrix
INSIDE = 0.25  # of a step of the grid: how far from the border between two codes a weight starts


@dataclass
class Share:
    """Lambda, one for all layers of a model in training and of its copies (`fit` trains one under FSDP2)."""

    value: float = 1.0

    def __deepcopy__(self, memo: dict) -> "Share":
        return self


class LatentLinear(nn.Linear, ABC):
    """A linear layer in training that becomes `layout`. Subclasses define `quantized` and `packed_state`.

    Args:
        layout (`PackedLinear`): the packed layer to become, on the meta device.
        weight: latent weights to start from, (out_features, in_features); a copy in fp32 is trained.
        bias: used as it is, and not trained.
        share: lambda.
        norm: weights of the RMSNorm over the inputs to start from, (in_features,), if `layout` has one.
    """

    def __init__(self, layout: PackedLinear, weight: Tensor, bias: nn.Parameter | None, share: Share, norm=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.__dict__["layout"] = layout  # no submodule: its tensors are none of this layer's
        self.share = share
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True))
        self.bias = bias
        self.norm = None if norm is None else nn.Parameter(norm.detach().to(torch.float32, copy=True))

    @abstractmethod
    def quantized(self) -> Tensor:
        """Q(w), fp32 (out_features, in_features), equal to the dense weight of what `packed` gives."""

    @abstractmethod
    def packed_state(self) -> dict[str, Tensor]:
        """The packed tensors of Q(w), without the norm."""

    def effective_weight(self) -> Tensor:
        """What the layer multiplies with, in fp32."""
        return straight_through(self.weight, self.quantized(), self._lambda())

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = rms_norm(x, self.norm, self.layout.norm_eps)
        if self.layout.activation_bits == 8:
            group = getattr(self.layout, "group_size", self.in_features)
            x = straight_through(x, quantize_activations(x.detach(), group), self._lambda())
        return F.linear(x, self.effective_weight().to(x.dtype), self.bias)

    def packed(self) -> PackedLinear:
        """The packed layer that does what this one does in evaluation mode."""
        state = self.packed_state()
        if self.norm is not None:
            state["weight_norm"] = self.norm.detach()
        self.layout.load_packed(state)
        self.layout.bias = self.bias
        return self.layout.train(self.training)

    def _lambda(self) -> float:
        return self.share.value if self.training else 1.0


class AbsmeanLinear(LatentLinear):
    """BitNet b1.58: codes in {-1, 0, 1} times the mean magnitude of the matrix."""

    def quantized(self):
        codes, gamma = absmean(self.weight.detach())
        return codes * gamma

    def packed_state(self):
        return packed_absmean(self.weight.detach(), self.layout.reciprocal_scale)


class SignsLinear(LatentLinear):
    """BitNet b1: signs of the centred matrix times its mean magnitude."""

    def quantized(self):
        minus, beta = centred_signs(self.weight.detach())
        return torch.where(minus, -beta, beta)

    def packed_state(self):
        return packed_signs(self.weight.detach())


class GridLinear(LatentLinear):
    """Ternary codes on a grid for each row and group of columns, with trained scale and offset.

    Args:
        start: packed tensors of `layout`, whose codes, scales and offsets are those it starts with. A weight starts as
            near to its value in `weight` as it can without being rounded to another code.
    """

    layout: TernaryLinear

    def __init__(self, layout, weight, bias, share, norm=None, *, start: dict[str, Tensor]):
        super().__init__(layout, weight, bias, share, norm)
        self.scale = nn.Parameter(start["weight_scale"].to(torch.float32, copy=True))
        self.offset = nn.Parameter(start["weight_offset"].to(torch.float32, copy=True))
        codes = unpack_ternary(start["weight"], layout.out_features).float()
        with torch.no_grad():
            scale, offset = self._grid()
            low = torch.where(codes < 0, -torch.inf, (codes - 0.5 + INSIDE) * scale + offset)
            high = torch.where(codes > 0, torch.inf, (codes + 0.5 - INSIDE) * scale + offset)
            self.weight.copy_(self.weight.clamp(low, high))

    def quantized(self):
        scale, offset = self._grid()
        return scale * self._codes(scale.detach(), offset.detach()) + offset

    def packed_state(self):
        with torch.no_grad():
            codes = self._codes(*self._grid())
        dtype = self.layout.scale_dtype
        return {
            "weight": pack_ternary(codes.to(torch.int8)),
            "weight_scale": self.scale.detach().clamp(min=0).to(dtype),
            "weight_offset": self.offset.detach().to(dtype),
        }

    def _codes(self, scale: Tensor, offset: Tensor) -> Tensor:
        return torch.where(scale > 0, (self.weight.detach() - offset) / scale, 0).round_().clamp_(-1, 1)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale and offset of each weight as they are stored, without a negative scale."""
        group, dtype = self.layout.group_size, self.layout.scale_dtype
        scale = straight_through(self.scale, self.scale.detach().clamp(min=0).to(dtype).float())
        offset = straight_through(self.offset, self.offset.detach().to(dtype).float())
        return tuple(v.repeat_interleave(group, dim=1)[:, : self.in_features] for v in (scale, offset))


def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 and the scale γ of b1.58: γ = mean |W|, T = clamp(round(W / γ), -1, 1), round half to even.

    Unlike `BitNet`'s `ternarize` it makes no exception of a matrix that is ternary already: the latent weights of the
    next step are not, and the scale must not jump.
    """
    gamma = weight.abs().mean().clamp(min=SMALLEST)
    return (weight / gamma).round_().clamp_(-1, 1), gamma


def packed_absmean(weight: Tensor, reciprocal: bool) -> dict[str, Tensor]:
    """The state of a `TernaryLinear` with these codes and γ, or 1/γ."""
    codes, gamma = absmean(weight)
    scale = gamma.reciprocal() if reciprocal else gamma
    return {"weight": pack_ternary(codes.to(torch.int8)), "weight_scale": scale.reshape(1)}


def centred_signs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sign of b1 is minus, and its scale β: sign(W - mean W) with sign(0) = -1, β = mean |W|."""
    return weight <= weight.mean(), weight.abs().mean().clamp(min=SMALLEST)


def packed_signs(weight: Tensor) -> dict[str, Tensor]:
    """The state of a `SignLinear` with these signs and β."""
    minus, beta = centred_signs(weight)
    return {"weight": pack_signs(minus), "weight_out": beta.reshape(1)}


def straight_through(x: Tensor, quantized: Tensor, share: float = 1.0) -> Tensor:
    """`x` led the share lambda of the way to `quantized`, in x's dtype, with the gradient of `x`.

    If `quantized` requires a gradient itself (by its scales), it gets the share of it, zeros included: in several
    processes each parameter must take part in every step.
    """
    if share == 0 and not quantized.requires_grad:
        return x
    value = quantized if share == 1 else torch.lerp(x.detach().to(quantized.dtype), quantized, share)
    return _StraightThrough.apply(x, value.to(x.dtype))


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return tuple(gradient if needed else None for needed in ctx.needs_input_grad)
