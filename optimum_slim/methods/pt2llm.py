"""PT2-LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from optimum_slim._kernels import pack_ternary
from optimum_slim.packed import TernaryLinear, linear_shape
from optimum_slim.step import LinearStep, register


@register(
    "pt2llm", paper="PT2-LLM: Post-Training Ternarization for Large Language Models (ICLR 2026, arXiv 2510.03267)"
)
@dataclass(frozen=True, kw_only=True)
class PT2LLM(LinearStep):
    needs_data: ClassVar[bool] = True
    group_size: int = 128
    dampening: float = 0.01
    iterations: int = 10
    activation_bits: int | None = None
    scale_dtype: str = "float16"

    def empty(self, linear: nn.Module) -> TernaryLinear:
        out_features, in_features = linear_shape(linear)
        return TernaryLinear(
            in_features,
            out_features,
            linear.bias is not None,
            group_size=self.group_size,
            offset=True,
            activation_bits=self.activation_bits,
            scale_dtype=getattr(torch, self.scale_dtype),
            transposed=type(linear) is not nn.Linear,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        alpha, mu, codes = fit_ternary(weight.float(), self.group_size, self.iterations)
        dtype = getattr(torch, self.scale_dtype)
        return {"weight": pack_ternary(codes), "weight_scale": alpha.to(dtype), "weight_offset": mu.to(dtype)}


def fit_ternary(weight: Tensor, group_size: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    alphas, mus, codes = [], [], []
    for block in weight.split(group_size, dim=1):
        mu = block.mean(1, keepdim=True)
        alpha = (block - mu).abs().mean(1, keepdim=True) * 1.4
        for _ in range(iterations):
            t = ((block - mu) / alpha.clamp(min=1e-12)).round().clamp(-1, 1)
            n, s1, s2 = block.shape[1], t.sum(1, keepdim=True), t.square().sum(1, keepdim=True)
            det = n * s2 - s1 * s1
            wt, w1 = (block * t).sum(1, keepdim=True), block.sum(1, keepdim=True)
            alpha = torch.where(det > 0, (n * wt - s1 * w1) / det.clamp(min=1e-12), torch.zeros_like(alpha))
            mu = (w1 - alpha * s1) / n
        alphas.append(alpha)
        mus.append(mu)
        codes.append(t)
    return torch.cat(alphas, 1), torch.cat(mus, 1), torch.cat(codes, 1).to(torch.int8)
