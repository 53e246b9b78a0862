"""Linear layers whose weights are signs, one bit each, between two vectors of scales.

`SignLinear` multiplies its input by one number per column, adds and subtracts what the signs say, and multiplies the
sums by one number per row (OneBit, arXiv 2402.11295; 1-bit BitNet, arXiv 2310.11453, has one number for the matrix):

    y = ((x * scale_in) Sᵀ) * scale_out                  W[n, k] = scale_out[n] * S[n, k] * scale_in[k]

A sign is a bit, 1 for minus; the bits of a row lie eight to a byte, the lowest bit first. Byte `weight[n, j]` holds

      bit   7      6      5      4      3      2      1      0
           +------+------+------+------+------+------+------+------+
           | 8j+7 | 8j+6 | 8j+5 | 8j+4 | 8j+3 | 8j+2 | 8j+1 | 8j   |     columns of row n; bits past the last are 0
           +------+------+------+------+------+------+------+------+

Layers that OneBit has trained may end in a layer normalization without weights of its own over the outputs of each
token (`post_norm`). Such a layer is no matrix product, so there is no `nn.Linear` that does the same.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ._kernels import sign_dense, sign_linear
from .packed import PackedLinear


NORM_EPS = 1e-5  # added to the variance in the layer normalization


class SignLinear(PackedLinear):
    """One bit a weight, with a scale for each output and for each input.

    Args:
        input_scale (`bool`): one scale per input besides those of the outputs.
        per_tensor (`bool`): one scale for all outputs in the place of one for each.
        post_norm (`bool`): normalize the outputs of each token to mean 0 and variance 1, before the bias.
        activation_bits (`8` or `None`): 8 rounds the scaled inputs to int8 by the largest magnitude of each token;
            `None` multiplies them as they are.
        scale_dtype (`torch.dtype`): of the scales.
        norm_eps (`float` or `None`): see `PackedLinear`.

    State: `weight` uint8 (out_features, ceil(in_features / 8)); `weight_in` (in_features,) if `input_scale`;
    `weight_out` (out_features,) or (1,); `weight_norm` (in_features,) if `norm_eps`; `bias` (out_features,) if any.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        input_scale=True,
        per_tensor=False,
        post_norm=False,
        activation_bits=None,
        scale_dtype=torch.float16,
        transposed=False,
        norm_eps=None,
        device=None,
        dtype=None,
    ):
        settings = {"transposed": transposed, "norm_eps": norm_eps, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, **settings)
        self.input_scale, self.per_tensor, self.post_norm = input_scale, per_tensor, post_norm
        self.activation_bits = activation_bits
        self.scale_dtype = scale_dtype
        self.register_parameter("weight_in", None)
        self._allocate(device)

    def packed_tensors(self):
        tensors = {"weight": ((self.out_features, ceil(self.in_features / 8)), torch.uint8)}
        if self.input_scale:
            tensors["weight_in"] = ((self.in_features,), self.scale_dtype)
        tensors["weight_out"] = ((1 if self.per_tensor else self.out_features,), self.scale_dtype)
        return tensors | self.norm_tensors()

    def dense(self, dtype=torch.float32):
        return sign_dense(self.weight, self.weight_in, self.weight_out, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.normed(x), None if self.post_norm else self.bias
        y = sign_linear(x, self.weight, self.weight_in, self.weight_out, bias, self.activation_bits or 0)
        return normalized(y, self.bias) if self.post_norm else y

    def validate(self) -> None:
        """Raise a `ValueError` if a bit is set past the last column."""
        rest = self.in_features % 8
        if rest and bool((self.weight[:, -1] >> rest).any()):
            raise ValueError("the signs in weight have bits past the last column; the checkpoint is damaged")

    def check_plain(self) -> None:
        super().check_plain()
        if self.post_norm:
            raise ValueError(
                f"this layer ({self}) normalizes its outputs, which no nn.Linear does, so it can be neither "
                "dequantized nor merged with an adapter; use it packed, or make the model with OneBit(variant='plain')"
            )

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"input_scale={self.input_scale}, per_tensor={self.per_tensor}, post_norm={self.post_norm}, "
            f"activation_bits={self.activation_bits}{'' if self.norm_eps is None else f', norm_eps={self.norm_eps}'}"
        )


def normalized(y: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out) with mean 0 and variance 1 for each token, computed in fp32, plus the bias (out,), in y's dtype."""
    z = F.layer_norm(y.float(), y.shape[-1:], eps=NORM_EPS)
    return (z if bias is None else z + bias.float()).to(y.dtype)
