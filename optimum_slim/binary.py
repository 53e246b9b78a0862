"""Linear layers of two bits a weight: signs, and a second bit that picks a magnitude or refines the sign.

What BiLLM and ARB-LLM make of a layer. In a *salient* column, one that matters most, every weight is binarized twice:
a sign, and the sign of what the first left over. In all others the second bit says to which of two magnitudes a weight
belongs (BiLLM's bitmap of concentrated and sparse weights). Every row has scales of its own for each group of columns,
and whole columns may have scales too (ARB-RC). Stored, with P = ceil(in / 8) and G = ceil(in / group_size):

    weight          uint8 (out, 2, P)   the sign bits, then the second bits; bit k % 8 of byte k // 8 is column k
    weight_salient  uint8 (P,)          1 where the column is salient
    weight_scale    (out, G, 4)         magnitudes of second bit 0 and 1, and of the two signs of salient columns
    weight_offset   (out, G, 3)         what is added: second bit 0, 1, and salient columns; if the layer has offsets
    weight_columns  (2, in)             scales of columns, by second bit or order; if the layer has them

The equations are in kernels/torch-ext/slim_kernels/binary_reference.py and docs/formats.md. Besides its two bits a
weight costs 64 / group_size bits of scales, 48 / group_size of offsets and 32 / out of column scales.
"""

from math import ceil

import torch
from torch import Tensor

from ._kernels import binary_dense, binary_linear, pack_signs, unpack_signs
from .levels import Levels
from .packed import PackedLinear


class BinaryLinear(PackedLinear):
    """A linear layer that multiplies from two planes of bits.

    Args:
        in_features, out_features, bias, transposed, dtype, device: see `PackedLinear`.
        group_size (`int` or `None`): input columns that share scales within a row, a multiple of 8; `None` for one
            group per row.
        offset (`bool`): also an offset for each scale.
        columns (`bool`): also scales of whole columns.
        scale_dtype (`torch.dtype`): of all of them.

    State: `weight`, `weight_salient`, `weight_scale`, `weight_offset` if `offset`, `weight_columns` if `columns`, as
    drawn above; `bias` (out_features,) if any.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        group_size=128,
        offset=False,
        columns=False,
        scale_dtype=torch.float16,
        transposed=False,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, transposed=transposed, device=device, dtype=dtype)
        self.group_size = in_features if group_size is None else min(group_size, in_features)
        if self.group_size < 1 or (self.group_size % 8 and self.group_size != in_features):
            raise ValueError(
                f"group_size must be a multiple of 8 (or at least the {in_features} inputs), found {group_size}"
            )
        self.has_offset, self.has_columns, self.scale_dtype = offset, columns, scale_dtype
        for name in ("weight_offset", "weight_columns"):
            self.register_parameter(name, None)
        self._allocate(device)

    def packed_tensors(self):
        size, groups = ceil(self.in_features / 8), ceil(self.in_features / self.group_size)
        tensors = {
            "weight": ((self.out_features, 2, size), torch.uint8),
            "weight_salient": ((size,), torch.uint8),
            "weight_scale": ((self.out_features, groups, 4), self.scale_dtype),
        }
        if self.has_offset:
            tensors["weight_offset"] = ((self.out_features, groups, 3), self.scale_dtype)
        if self.has_columns:
            tensors["weight_columns"] = ((2, self.in_features), self.scale_dtype)
        return tensors

    def packed_state(self, levels: Levels) -> dict[str, Tensor]:
        """The packed tensors of a layer with these bits and numbers."""
        state = {
            "weight": pack_signs(torch.stack([levels.minus, levels.second], dim=1)),
            "weight_salient": pack_signs(levels.salient),
        }
        numbers = {"weight_scale": levels.scale, "weight_offset": levels.offset, "weight_columns": levels.columns}
        return state | {name: n.to(self.scale_dtype) for name, n in numbers.items() if n is not None}

    def levels(self) -> Levels:
        """The bits and numbers of the layer."""
        planes = unpack_signs(self.weight, self.in_features)
        numbers = (self.weight_scale, self.weight_offset, self.weight_columns)
        numbers = [None if n is None else n.detach().float() for n in numbers]
        return Levels(planes[:, 0], planes[:, 1], self.salient(), *numbers, self.group_size)

    def salient(self) -> Tensor:
        """Bool (in,), true for the salient columns."""
        return unpack_signs(self.weight_salient, self.in_features)

    def nominal_bits(self) -> float:
        """Bits per weight as the papers count them: signs alone, two in salient columns and one elsewhere."""
        return 1 + self.salient().float().mean().item()

    def dense(self, dtype=torch.float32):
        tensors = self.weight, self.weight_salient, self.weight_scale, self.weight_offset, self.weight_columns
        return binary_dense(*tensors, self.in_features, self.group_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        tensors = self.weight, self.weight_salient, self.weight_scale, self.weight_offset, self.weight_columns
        return binary_linear(x, *tensors, self.bias, self.group_size)

    def validate(self) -> None:
        """Raise a `ValueError` unless the bits past the last column are 0."""
        rest = self.in_features % 8
        if rest and any(bool((bits[..., -1] >> rest).any()) for bits in (self.weight, self.weight_salient)):
            raise ValueError("there are bits past the last column in weight or weight_salient; the file is damaged")

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, offset={self.has_offset}, columns={self.has_columns}"
        )
