"""What all methods that drop single weights have in common.

They differ in how they choose the weights, and in how the others make up for those that go.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._kernels import sparse_speed
from .affine import AffineGrid
from .packed import PackedLinear, linear_shape, linear_weight
from .sparse import SparseLinear
from .sparsity import Pattern, outlier_ratio, owl_shares
from .step import LinearStep
from .walk import decoder_layers, walk


ALLOCATIONS = ("uniform", "owl")
OWL_SAMPLES = 16  # calibration samples by which outliers are counted
NOT_SMALLER = (
    "packed=False leaves the dropped weights in place as zeros: neither the size nor the speed of the model changed"
)


@dataclass(frozen=True, kw_only=True)
class SparseStep(LinearStep):
    """A method that drops weights of linear layers one by one.

    Args:
        sparsity (`float` or `str`): share of the weights to drop, or `"n:m"` to keep n of every m columns of a row.
        bits (`int`, *optional*): 2 to 8, also quantizes the kept weights to so many bits.
        group_size (`int`, *optional*): columns of a row that share a scale, with `bits`; by default the whole row.
        allocation (`str`): `"uniform"`, the default, or `"owl"` to drop fewer weights in decoder layers with many
            outliers.
        owl_threshold, owl_band: OWL's M, an outlier being M times the mean score, and λ: the shares of the layers are
            spread over a width of 2 λ, their mean being `sparsity`.
        layers (`tuple[int, int]`, *optional*): first decoder layer to prune, and the first one after it not to.
        packed (`bool`): store and multiply without the dropped weights; or leave zeros in ordinary layers, for loaders
            that know nothing of this package.
        shares (`tuple[float]`, *optional*): of each decoder layer; what an allocation found is recorded here.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.
    """

    sparsity: float | str = 0.5
    bits: int | None = None
    group_size: int | None = None
    allocation: str | None = None
    owl_threshold: float = 5.0
    owl_band: float = 0.08
    layers: tuple[int, int] | None = None
    packed: bool = True
    shares: tuple[float, ...] | None = None

    takes_adapters = True
    fewest_tokens = 1  # with fewer, a layer (a rarely used expert) is pruned by magnitude

    def __post_init__(self):
        pattern = Pattern.parse(self.sparsity)
        if self.allocation is None:
            object.__setattr__(self, "allocation", self.usual_allocation(pattern))
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {ALLOCATIONS}, found {self.allocation!r}")
        if (self.allocation == "owl" or self.shares is not None) and pattern.of:
            raise ValueError(
                f"every layer keeps {pattern.keep} of {pattern.of} columns with sparsity={self.sparsity!r}, so there "
                f"is nothing to allocate; pass allocation='uniform', or a share such as sparsity={pattern.share:g}"
            )
        if self.bits is not None and (type(self.bits) is not int or not 2 <= self.bits <= 8):
            raise ValueError(f"bits must be an integer from 2 to 8, or None for 16-bit values; found {self.bits!r}")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"group_size must be a positive integer or None, found {self.group_size!r}")
        if not 0 < self.owl_band < 0.5 or not self.owl_threshold > 0:
            raise ValueError(
                f"owl_band must lie between 0 and 0.5 and owl_threshold be positive; found {self.owl_band!r} and "
                f"{self.owl_threshold!r}"
            )
        if self.shares is not None and not all(0 <= share < 1 for share in self.shares):
            raise ValueError(f"shares must lie in [0, 1), 0 for layers left dense; found {self.shares!r}")
        if self.layers is not None and (
            not isinstance(self.layers, tuple | list)
            or len(self.layers) != 2
            or not all(type(n) is int for n in self.layers)
            or not 0 <= self.layers[0] < self.layers[1]
        ):
            raise ValueError(f"layers is (first, stop) with 0 <= first < stop, found {self.layers!r}")

    def usual_allocation(self, pattern: Pattern) -> str:
        """What `allocation` is if it is not given."""
        return "uniform"

    @property
    def needs_data(self) -> bool:
        return self.allocation == "owl" and self.shares is None

    @abstractmethod
    def prune(self, weight: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
        """Choose the weights to drop in one layer, and what the others become.

        Args:
            weight: fp32 (out, in).
            shared: what `share` made of the Gram matrix.

        Returns:
            The pruned weight, fp32 (out, in) with zeros, and the mask, bool (out, in), true where a weight is dropped.
        """

    def prune_to_codes(self, weight: Tensor, shared: Any) -> tuple[Tensor, Tensor, AffineGrid]:
        """`prune`, and the kept weights rounded to the nearest of `bits` bits: codes, mask, and the grid."""
        grid = AffineGrid.fit(weight, self.bits, self.group_size)
        pruned, mask = self.prune(weight, shared)
        return grid.codes(pruned), mask, grid

    def compress(self, weight: Tensor, gram: Any = None) -> dict[str, Tensor]:
        layer = self._layer(*weight.shape)
        if self.bits is None:
            return layer.packed_state(*self.prune(weight, gram))
        codes, mask, grid = self.prune_to_codes(weight, gram)
        return layer.packed_state(codes, mask, (grid.scale, grid.zero))

    def empty(self, linear: nn.Module) -> SparseLinear:
        dtype = linear.weight.dtype
        extra = {"bias": linear.bias is not None, "transposed": type(linear) is not nn.Linear, "dtype": dtype}
        return self._layer(*linear_shape(linear), value_dtype=dtype, **extra)

    def _layer(self, out_features: int, in_features: int, **settings) -> SparseLinear:
        layout, kept = self.layout(out_features, in_features)
        settings = {"bias": False, "value_dtype": torch.float32} | settings
        return SparseLinear(
            in_features,
            out_features,
            layout=layout,
            kept=kept,
            bits=self.bits,
            group_size=self.group_size,
            device="meta",
            **settings,
        )

    def layout(self, out_features: int, in_features: int) -> tuple[str, int]:
        """The layout of `SparseLinear` and its count for a layer of this shape."""
        pattern = Pattern.parse(self.sparsity)
        if pattern.has_positions:
            return "positions", pattern.keep
        if pattern.of:
            return "rows", pattern.kept_in_row(in_features)
        return "flat", out_features * in_features - pattern.dropped(out_features, in_features)

    def for_layer(self, name: str) -> "SparseStep":
        if self.shares is None:
            return self
        return dataclasses.replace(self, sparsity=self._share(name), shares=None, allocation="uniform")

    def resolve(self, model: nn.Module) -> "SparseStep":
        count = len(decoder_layers(model)[1]) if self.layers or self.shares else 0
        if self.shares is not None and len(self.shares) != count:
            raise ValueError(f"shares has {len(self.shares)} entries for the {count} decoder layers of this model")
        step = self
        if self.layers is not None:
            if self.layers[1] > count:
                raise ValueError(f"layers={self.layers} goes past the {count} decoder layers of this model")
            prefix = decoder_layers(model)[0]
            outside = [f"{prefix}.{index}.*" for index in range(count) if not self.layers[0] <= index < self.layers[1]]
            dense = (*(self.modules_to_not_convert or ()), *outside)
            step = dataclasses.replace(self, modules_to_not_convert=dense)
        resolved = super(SparseStep, step).resolve(model)
        if self.allocation == "owl" or self.shares is not None:
            self._check_shares(model, resolved.targets(model))
        return resolved

    def _check_shares(self, model: nn.Module, names) -> None:
        prefix = decoder_layers(model)[0]
        outside = [name for name in names if not name.startswith(f"{prefix}.")]
        if outside:
            raise ValueError(
                f"shares are those of decoder layers, and these linear layers lie outside {prefix}: {outside}. Add "
                "them to modules_to_not_convert."
            )
        dense = [name for name in names if self.shares is not None and self._share(name) == 0]
        if dense:
            raise ValueError(
                f"shares drops nothing of {dense[0]}; leave its decoder layer out with layers=(first, stop)"
            )

    def _share(self, name: str) -> float:
        return self.shares[next(int(part) for part in name.split(".") if part.isdecimal())]

    def skeleton(self, model: nn.Module) -> None:
        if self.packed:
            super().skeleton(model)

    def replace(self, model, name, group=None, shared=None, target=None) -> dict[str, Any]:
        dtype = linear_weight(model.get_submodule(name)).dtype
        row = super().replace(model, name, group, shared, target)
        if group is not None and group.tokens < self.fewest_tokens:
            row["note"] = f"pruned by magnitude: only {group.tokens} calibration tokens reached this layer"
        row["sparsity"] = Pattern.parse(self.for_layer(name).sparsity).share
        if not self.packed:
            packed: PackedLinear = model.get_submodule(name)
            model.set_submodule(name, packed.to_linear(dtype).train(packed.training))
            row["bits_per_weight"] = 8.0 * dtype.itemsize
        return row

    def notes(self) -> list[str]:
        return [sparse_speed() if self.packed else NOT_SMALLER]

    def allocate(self, model: nn.Module, tokens: Tensor, visiting=nullcontext) -> "SparseStep":
        if self.allocation != "owl" or self.shares is not None:
            return self
        ratios, sizes = [], []
        names = set(self.targets(model))
        for block in walk(model, tokens[:OWL_SAMPLES], visiting=visiting):
            inside = {name: model.get_submodule(name) for name in names if name.startswith(f"{block.name}.")}
            scores = list(_wanda_scores(block, inside)) if inside else []
            ratios.append(outlier_ratio(scores, self.owl_threshold) if scores else 0.0)
            sizes.append(sum(score.numel() for score in scores))
        pruned = [index for index, size in enumerate(sizes) if size]
        found = owl_shares(
            [ratios[i] for i in pruned], [sizes[i] for i in pruned], float(self.sparsity), self.owl_band
        )
        shares = dict(zip(pruned, found, strict=True))
        return dataclasses.replace(self, shares=tuple(shares.get(i, 0.0) for i in range(len(sizes))))


def _wanda_scores(block, modules: dict[str, nn.Module]) -> Iterator[Tensor]:
    for name, squares in block.square_means(modules).items():
        yield linear_weight(modules[name]).detach().float().abs() * squares.sqrt()
