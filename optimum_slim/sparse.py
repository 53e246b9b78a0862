"""Linear layers of which most weights are dropped, stored without them.

`SparseLinear` keeps an index that says which columns of a row are there, and the values (or low-bit codes) of those
columns and nothing of the others. Three layouts, for the patterns that the methods make:

    layout         kept counts         `weight` (uint8)                  `weight_values`
    "positions"    1 or 2 of every 4   2 bits for each kept weight       (out, kept * ceil(in / 4))
    "rows"         of every row        1 bit for each weight             (out, kept)
    "flat"         of the layer        1 bit for each weight             (kept,), and `weight_rows` int32 (out + 1,)

With `bits`, `weight_values` holds codes as a stream of bits, padded to whole bytes in each row: (out, bytes), or flat
with room for the padding, `weight_rows` then counting bytes. `weight_scale` and `weight_zero` hold the grid of each
row and group of columns: W[n, k] = scale[n, g] * (code - zero[n, g]). How the bits lie is drawn in
kernels/torch-ext/slim_kernels/sparse_reference.py and in docs/formats.md.
"""

from math import ceil

import torch
from torch import Tensor

from ._kernels import index_bytes, pack_codes, pack_mask, pack_values, sparse_dense, sparse_linear, unpack_mask
from .packed import PackedLinear


LAYOUTS = ("positions", "rows", "flat")


class SparseLinear(PackedLinear):
    """A linear layer that multiplies from kept weights and their index.

    Args:
        layout (`str`): `"positions"`, `"rows"` or `"flat"`.
        kept (`int`): weights kept in every 4 columns, every row, or the whole layer, as the layout says.
        bits (`int` or `None`): 2 to 8 for codes, `None` for values.
        group_size (`int` or `None`): columns of a row that share a scale; `None` for one scale per row.
        value_dtype (`torch.dtype`): of the values, unless there are codes.
        scale_dtype (`torch.dtype`): of the scales.

    State: `weight`, `weight_values`, and where the layout has them `weight_rows`, `weight_scale`, `weight_zero`, all
    drawn above; `bias` (out_features,) if any.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        layout,
        kept,
        bits=None,
        group_size=None,
        value_dtype=torch.bfloat16,
        scale_dtype=torch.float16,
        transposed=False,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, transposed=transposed, device=device, dtype=dtype)
        if layout not in LAYOUTS or (layout == "positions" and kept not in (1, 2)):
            raise ValueError(
                f"layout must be one of {LAYOUTS}, with 1 or 2 kept for positions; found {layout!r}, {kept=}"
            )
        self.layout, self.kept, self.bits = layout, kept, bits
        self.keep = kept if layout == "positions" else 0
        self.group_size = in_features if group_size is None else min(group_size, in_features)
        self.value_dtype, self.scale_dtype = value_dtype, scale_dtype
        for name in ("weight_rows", "weight_scale", "weight_zero"):
            self.register_parameter(name, None)
        self._allocate(device)

    def packed_tensors(self):
        tensors = {"weight": ((self.out_features, index_bytes(self.in_features, self.keep)), torch.uint8)}
        dtype = torch.uint8 if self.bits else self.value_dtype
        tensors["weight_values"] = (self._values_shape(), dtype)
        if self.layout == "flat":
            tensors["weight_rows"] = ((self.out_features + 1,), torch.int32)
        if self.bits:
            groups = ceil(self.in_features / self.group_size)
            tensors["weight_scale"] = ((self.out_features, groups), self.scale_dtype)
            tensors["weight_zero"] = ((self.out_features, groups), torch.uint8)
        return tensors

    def _values_shape(self) -> tuple[int, ...]:
        if self.layout == "flat":
            return (self.kept * self.bits // 8 + self.out_features if self.bits else self.kept,)
        kept = self.kept * ceil(self.in_features / 4) if self.keep else self.kept
        return self.out_features, ceil(kept * self.bits / 8) if self.bits else kept

    def packed_state(
        self, weight: Tensor, mask: Tensor, grid: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The packed tensors of a layer with these weights.

        Args:
            weight: (out, in), the values; with `bits` the codes, uint8.
            mask: bool (out, in), true where a weight is dropped. Where it drops more than the layout does, kept zeros
                fill up.
            grid: with `bits`, scale and zero (out, groups).
        """
        kept = self._filled(~mask)
        ragged = self.layout == "flat"
        if self.bits:
            values, rows = pack_codes(weight, kept, self.bits, self.keep, ragged=ragged)
            if ragged:
                values = torch.nn.functional.pad(values, (0, self._values_shape()[0] - len(values)))
        else:
            values, rows = pack_values((weight * kept).to(self.value_dtype), kept, self.keep, ragged=ragged)
        state = {"weight": pack_mask(kept, self.keep), "weight_values": values}
        if ragged:
            state["weight_rows"] = rows
        if self.bits:
            state["weight_scale"], state["weight_zero"] = grid[0].to(self.scale_dtype), grid[1].to(torch.uint8)
        return state

    def _filled(self, kept: Tensor) -> Tensor:
        """`kept` with dropped weights added until the layout's count is reached."""
        if self.layout == "flat":
            parts, wanted = kept.reshape(1, -1), self.kept
        elif self.layout == "rows":
            parts, wanted = kept, self.kept
        else:
            return kept
        missing = wanted - parts.sum(1, keepdim=True)
        if bool((missing == 0).all()):
            return kept
        dropped = ~parts
        return (parts | (dropped & (dropped.cumsum(1) <= missing))).view(kept.shape)

    def mask(self) -> Tensor:
        """Bool (out, in), true where a weight is kept."""
        return unpack_mask(self.weight, self.in_features, self.keep)

    def packed_arguments(self) -> tuple:
        """What the operators take besides the activations: the tensors, and (`keep`, `bits`, `group_size`)."""
        tensors = self.weight, self.weight_values, self.weight_rows, self.weight_scale, self.weight_zero
        return tensors, (self.keep, self.bits or 0, self.group_size)

    def dense(self, dtype=torch.float32):
        tensors, numbers = self.packed_arguments()
        return sparse_dense(*tensors, self.in_features, *numbers, dtype)

    def forward(self, x: Tensor) -> Tensor:
        tensors, numbers = self.packed_arguments()
        return sparse_linear(x, *tensors, self.bias, *numbers)

    def validate(self) -> None:
        """Raise a `ValueError` unless index and values belong together."""
        counts = self.mask().sum(1)
        if not self._is_sound():
            raise ValueError("the index in weight holds what no mask packs to; the checkpoint is damaged")
        if self.layout == "rows" and bool((counts != self.kept).any()):
            raise ValueError(f"the index does not keep {self.kept} weights in every row; the checkpoint is damaged")
        if self.layout == "flat":
            sizes = (counts * self.bits + 7) // 8 if self.bits else counts
            fits = self.weight_rows[0] == 0 and torch.equal(self.weight_rows.diff().long(), sizes)
            if not fits or counts.sum() != self.kept or self.weight_rows[-1] > len(self.weight_values):
                raise ValueError("weight_rows does not fit the index in weight; the checkpoint is damaged")

    def _is_sound(self) -> bool:
        """Whether bits past the last column are 0, or positions ascend and end where the columns do."""
        rest = self.in_features % (4 if self.keep else 8)
        if not self.keep:
            return not rest or not bool((self.weight[:, -1] >> rest).any())
        width = 2 * self.keep
        groups = torch.stack([self.weight >> shift & 2**width - 1 for shift in range(0, 8, width)], -1).flatten(1)
        groups = groups[:, : ceil(self.in_features / 4)]
        ascending = self.keep == 1 or bool((groups & 3 < groups >> 2).all())
        return ascending and (not rest or bool((groups[:, -1] >> width - 2 < max(rest, self.keep)).all()))

    def extra_repr(self):
        what = f"bits={self.bits}, group_size={self.group_size}" if self.bits else str(self.value_dtype)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={self.layout}, kept={self.kept}, {what}"
        )
