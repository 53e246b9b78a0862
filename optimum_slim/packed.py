"""Linear layers whose weights stay packed, on disk and in memory.

A `PackedLinear` is an `nn.Linear` whose state dict *is* the checkpoint: the packed bytes are the uint8 parameter
`weight`, its companions are `weight_*`. `in_features` and `out_features` tell the logical size; the shape and dtype
of `weight` do not. Keeping the packed bytes under the dense name means that stock Transformers, without this
package, stops at a size mismatch instead of loading random weights.

Ternary bytes (the layout of Transformers' own BitNet checkpoints). With P = ceil(out_features / 4), byte
`weight[r, k]` holds column k of four output rows, one code c = T + 1 in {0, 1, 2} for each T in {-1, 0, 1}:

      bit   7 6     5 4     3 2     1 0
           +-------+-------+-------+-------+
           | r+3P  | r+2P  | r+P   | r     |
           +-------+-------+-------+-------+

Rows past `out_features` are padding with code 1, a zero weight. The dense weight is

    W[n, k] = scale[n, k // group_size] * T[n, k] + offset[n, k // group_size]

A layer may normalize its inputs first, with an RMSNorm of its own (`norm_eps`, `weight_norm`): BitNet's SubLN, which
stands before the output projection of attention and before the last projection of a feed-forward block. Transformers'
`bitnet` architecture has the same norms as `attn_sub_norm` and `ffn_sub_norm`.
"""

from abc import ABC, abstractmethod
from math import ceil

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ._kernels import dequantize, ternary_linear


SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an `nn.Linear` or of GPT-2's transposed `Conv1D`."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def linear_weight(module: nn.Module) -> Tensor:
    """The dense weight as (out_features, in_features), whichever way round the module stores it."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once; on the meta device, what they would take."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in tied)


class PackedLinear(nn.Linear, ABC):
    """A linear layer that multiplies from packed weights.

    Subclasses define `packed_tensors` (names, shapes and dtypes of the packed state), `dense` and `forward`.

    Args:
        in_features, out_features (`int`): logical size.
        bias (`bool`): whether a dense bias of shape (out_features,) follows the product.
        transposed (`bool`): the layer takes the place of a `Conv1D`; `dequantize` gives one back.
        norm_eps (`float` or `None`): an RMSNorm over the inputs comes first, with this added to the mean square. The
            subclass includes `norm_tensors` in its `packed_tensors` and multiplies `normed(x)`.
        dtype, device: of the bias and the norm.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, transposed=False, norm_eps=None, device=None, dtype=None
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        self.norm_eps, self.norm_dtype = norm_eps, dtype or torch.get_default_dtype()
        self._is_hf_initialized = True
        self.register_parameter("bias", None)
        self.register_parameter("weight_norm", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def _allocate(self, device) -> None:
        for name, (shape, dtype) in self.packed_tensors().items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False))

    @abstractmethod
    def packed_tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every packed tensor: what a checkpoint must hold for this layer."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight it stands for, (out_features, in_features)."""

    def norm_tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The weight of the norm over the inputs, as for `packed_tensors`, if the layer has one."""
        return {} if self.norm_eps is None else {"weight_norm": ((self.in_features,), self.norm_dtype)}

    def normed(self, x: Tensor) -> Tensor:
        """`x` behind the norm over the inputs, or as it is if the layer has none."""
        return x if self.weight_norm is None else rms_norm(x, self.weight_norm, self.norm_eps)

    def check_plain(self) -> None:
        """Raise a `ValueError` if no `nn.Linear` does what this layer does."""
        if self.norm_eps is not None:
            raise ValueError(
                f"this layer ({self}) normalizes its inputs with an RMSNorm of its own (SubLN), which no nn.Linear "
                "does, so it can be neither dequantized nor merged with an adapter; use it packed"
            )

    def placeholder(self, dtype: torch.dtype) -> None:
        """Let `weight` be a dense meta tensor, replaced by packed bytes when the checkpoint's weight arrives.

        Transformers below 5.23 casts what it reads to the dtype of the tensor it replaces, so a uint8 placeholder
        would turn weights into zeros.
        """
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def load_packed(self, state: dict[str, Tensor]) -> None:
        """Take the packed tensors of `state`, in the dtypes of this layer, checking that its layout asks for them."""
        expected = self.packed_tensors()
        if state.keys() != expected.keys():
            raise ValueError(f"packed tensors {sorted(state)} do not fit {self}, which holds {sorted(expected)}")
        for name, (shape, dtype) in expected.items():
            check_packed(name, state[name], shape, dtype)
            setattr(self, name, nn.Parameter(state[name].to(dtype).contiguous(), requires_grad=False))

    def validate(self) -> None:
        """Raise a `ValueError` if the packed tensors contradict one another, where shapes and dtypes cannot tell."""

    def to_linear(self, dtype: torch.dtype) -> nn.Module:
        """An ordinary `nn.Linear` (or `Conv1D`) with the same weight in `dtype`; see `check_plain`."""
        self.check_plain()
        weight = self.dense(dtype)
        if self.transposed:
            linear = Conv1D(0, 0)
            linear.nf, linear.nx = self.out_features, self.in_features
            linear.weight = nn.Parameter(weight.T.contiguous())
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(dtype))
        return linear

    def stored_bits(self) -> int:
        """Bits of all packed tensors, padding included, bias excluded."""
        return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in self.packed_tensors().values())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, rounded as in Transformers: in fp32 up to the product with `weight`.

    Args:
        x: (..., in), of any floating dtype, which is that of the result.
        weight: (in,).
        eps: added to the mean square.
    """
    states = x.float()
    states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * states.to(x.dtype)


def check_packed(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise a `ValueError` unless `tensor` has the shape and kind of dtype that the layout asks for."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} where the packed layout needs {tuple(shape)}")
    if (tensor.dtype == torch.uint8) != (dtype == torch.uint8):
        raise ValueError(f"{name} has dtype {tensor.dtype} where the packed layout needs {dtype}")


class TernaryLinear(PackedLinear):
    """Two bits a weight: codes in {-1, 0, 1} with a scale, and an offset if asked, per tensor, row or group.

    Args:
        group_size (`int` or `None`): input columns that share a scale within a row; `None` is one scale for the
            whole tensor, `in_features` one per row.
        offset (`bool`): also an offset for each group (asymmetric ternary).
        activation_bits (`8` or `None`): 8 quantizes activations to int8 by their absolute maximum, per token, or per
            token and group where weights have groups; `None` multiplies activations as they are.
        scale_dtype (`torch.dtype`): of scale and offset.
        reciprocal_scale (`bool`): `weight_scale` holds 1/scale, as Transformers' `BitLinear` stores it.
        norm_eps (`float` or `None`): see `PackedLinear`.

    State: `weight` uint8 (ceil(out_features / 4), in_features); `weight_scale` (1,) or (out_features, groups);
    `weight_offset` (out_features, groups) if `offset`; `weight_norm` (in_features,) if `norm_eps`; `bias`
    (out_features,) if any.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        group_size=None,
        offset=False,
        activation_bits=8,
        scale_dtype=torch.float32,
        reciprocal_scale=False,
        transposed=False,
        norm_eps=None,
        device=None,
        dtype=None,
    ):
        settings = {"transposed": transposed, "norm_eps": norm_eps, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, **settings)
        if offset and group_size is None:
            raise ValueError("a ternary offset needs a group_size; pass group_size=in_features for one per row")
        self.group_size = in_features if group_size is None else min(group_size, in_features)
        self.per_tensor = group_size is None
        self.scale_dtype = scale_dtype
        self.activation_bits = activation_bits
        self.reciprocal_scale = reciprocal_scale
        self.register_parameter("weight_offset", None)
        self.has_offset = offset
        self._allocate(device)

    def packed_tensors(self):
        scale_shape = (1,) if self.per_tensor else (self.out_features, ceil(self.in_features / self.group_size))
        tensors = {
            "weight": ((ceil(self.out_features / 4), self.in_features), torch.uint8),
            "weight_scale": (scale_shape, self.scale_dtype),
        }
        if self.has_offset:
            tensors["weight_offset"] = (scale_shape, self.scale_dtype)
        return tensors | self.norm_tensors()

    def scale(self) -> Tensor:
        """The scale that multiplies the codes, whichever way it is stored."""
        return self.weight_scale.reciprocal() if self.reciprocal_scale else self.weight_scale

    def dense(self, dtype=torch.float32):
        return dequantize(self.weight, self.scale(), self.weight_offset, self.out_features, self.group_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ternary_linear(
            self.normed(x),
            self.weight,
            self.scale(),
            self.weight_offset,
            self.bias,
            self.out_features,
            self.group_size,
            self.activation_bits or 0,
        )

    def extra_repr(self):
        groups = "per tensor" if self.per_tensor else f"group_size={self.group_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{groups}, offset={self.has_offset}, activation_bits={self.activation_bits}"
            f"{'' if self.norm_eps is None else f', norm_eps={self.norm_eps}'}"
        )
