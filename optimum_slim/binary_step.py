"""What the methods that binarize linear layers have in common: going from group to group, and what follows it.

A group of columns is fitted as its method does, and the columns still to come make up for its error. With H = V Vᵀ,
V upper triangular, W the dense weight and Q what is done already, the next group b is best fitted to

    W_b + (W - Q)_{<b} V_{<b, b} V_bb⁻¹

which is the update W_rest -= (W - Q)_b U_bb⁻¹ U_{b, rest} of the papers (U = V⁻¹, GPTQ's factor, H⁻¹ = Uᵀ U) for all
groups before it at once. BiLLM's authors divide by the diagonal of U_bb only.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .binary import BinaryLinear
from .hessian import MAX_DAMPENING, Hessian
from .levels import ColumnLevels, Levels, groups_of, solve_columns, solve_scales, sweep_bits
from .packed import SCALE_DTYPES, linear_shape
from .step import LinearStep


DECIDED = ("group_size", "offset", "compensation", "iterations", "rounds", "asymmetric", "sequential")
COMPENSATIONS = ("triangular", "diagonal", "none")
NOMINAL = (
    "nominal_bits are the papers' figure, signs alone: 1 for each weight and 2 in salient columns; bits_per_weight "
    "counts all that is stored"
)


@dataclass(frozen=True, kw_only=True)
class BinaryStep(LinearStep):
    """A method that binarizes linear layers one by one.

    Args:
        variant (`str`): `"improved"`, `"paper"`, or another that the method knows. It decides the fields below that
            are not given.
        group_size (`int`): input columns that share scales within a row, a multiple of 8; also those that are fitted
            together before the others make up for their error.
        offset (`bool`): store an offset with each scale.
        compensation (`str`): what columns to come make up for: `"triangular"` for all they can, `"diagonal"` as
            BiLLM's authors compute it, or `"none"`.
        iterations (`int`): how often the numbers and the bits of a group take turns.
        rounds (`int`): how often all scales are solved for jointly and each weight moved to its best level afterwards.
        dampening (`float`): share of the mean diagonal added to that of the Gram matrix; raised tenfold, up to 1, for
            as long as the matrix cannot be factorized.
        asymmetric (`float`): how far each layer's target moves from its own weights to those that do on the inputs
            behind the binarized layers what the layer did in the unslimmed model; 0 for the paper, 1 for all the way.
        sequential (`bool`): measure the inputs of each layer behind what was binarized before it in the same decoder
            layer; or all of a decoder layer at once, as the papers do.
        scale_dtype (`str`): `"float16"`, `"bfloat16"` or `"float32"`: how scales and offsets are stored.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.

    A layer that saw fewer than 128 tokens is binarized without them, and its row of the report says so.
    """

    variant: str = "improved"
    group_size: int | None = None
    offset: bool | None = None
    compensation: str | None = None
    iterations: int | None = None
    rounds: int | None = None
    dampening: float = 0.01
    asymmetric: float | None = None
    sequential: bool | None = None
    scale_dtype: str = "float16"

    variants: ClassVar[dict[str, tuple]]
    has_columns: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    accepts_unseen: ClassVar[bool] = True
    fewest_tokens: ClassVar[int] = 128

    def __post_init__(self):
        if self.variant not in self.variants:
            raise ValueError(f"variant must be one of {', '.join(self.variants)}, found {self.variant!r}")
        for name, value in zip(DECIDED, self.variants[self.variant], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if type(self.group_size) is not int or self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size must be a positive multiple of 8, found {self.group_size!r}")
        for name in ("iterations", "rounds"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer of at least 0, found {getattr(self, name)!r}")
        for name, known in {"compensation": COMPENSATIONS, "scale_dtype": SCALE_DTYPES}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}")
        if not 0 < self.dampening <= MAX_DAMPENING:
            raise ValueError(f"dampening must be above 0 and at most {MAX_DAMPENING}, found {self.dampening!r}")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric must lie in [0, 1], found {self.asymmetric!r}")

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor, pivots: Tensor) -> Levels:
        """Binarize one group by itself.

        Args:
            weight: (rows, columns).
            importance: (columns,), the diagonal of H: what an error costs that is not made up for.
            pivots: (columns,), the diagonal of V: its square is what an error costs that later columns make up for.
        """

    def binarize(self, weight: Tensor, hessian: Hessian) -> Levels:
        """The levels of a whole layer, (out, in)."""
        dtype, size = SCALE_DTYPES[self.scale_dtype], min(self.group_size, weight.shape[1])
        weight = weight.masked_fill(hessian.dead, 0)
        importance, pivots = hessian.matrix.diagonal(), hessian.factor.diagonal()

        def fit(target: Tensor, group: slice) -> Levels:
            return self.fit(target, importance[group], pivots[group])

        improved = self.variant == "improved"
        levels = go_through(weight, hessian, size, dtype, fit, compensation=self.compensation, by_column=improved)
        return improve(weight, hessian, levels, dtype, self.rounds)

    def share(self, group) -> Hessian | None:
        return Hessian(group.gram, self.dampening) if group.tokens >= self.fewest_tokens else None

    def compress(self, weight: Tensor, gram: Any = None) -> dict[str, Tensor]:
        hessian = gram if isinstance(gram, Hessian) else self._hessian(weight, gram)
        out_features, in_features = weight.shape
        return self._layer(in_features, out_features).packed_state(self.binarize(weight, hessian))

    def _hessian(self, weight: Tensor, gram: Tensor | None) -> Hessian:
        if gram is None:
            gram = torch.eye(weight.shape[1], device=weight.device)
        if gram.shape != (weight.shape[1], weight.shape[1]):
            raise ValueError(f"the Gram matrix has shape {tuple(gram.shape)}, expected {(weight.shape[1],) * 2}")
        return Hessian(gram, self.dampening)

    def empty(self, linear: nn.Module) -> BinaryLinear:
        out_features, in_features = linear_shape(linear)
        settings = {"transposed": type(linear) is not nn.Linear, "dtype": linear.weight.dtype}
        return self._layer(in_features, out_features, linear.bias is not None, **settings)

    def _layer(self, in_features: int, out_features: int, bias: bool = False, **settings) -> BinaryLinear:
        return BinaryLinear(
            in_features,
            out_features,
            bias,
            group_size=self.group_size,
            offset=self.offset,
            columns=self.has_columns,
            scale_dtype=SCALE_DTYPES[self.scale_dtype],
            device="meta",
            **settings,
        )

    def replace(self, model, name, group=None, shared=None, target=None) -> dict[str, Any]:
        row = super().replace(model, name, group, shared, target)
        row["nominal_bits"] = model.get_submodule(name).nominal_bits()
        if shared is None:
            tokens = 0 if group is None else group.tokens
            row["note"] = f"binarized without data: only {tokens} calibration tokens reached this layer"
        elif shared.dampening > self.dampening:
            row["note"] = f"dampening raised to {shared.dampening:g}"
        return row

    def notes(self) -> list[str]:
        return [NOMINAL]


def go_through(
    weight: Tensor, hessian: Hessian, size: int, dtype: torch.dtype, fit, *, compensation: str, by_column: bool
) -> Levels:
    """Fit one group after the other.

    Args:
        weight: (rows, columns).
        size: columns of a group.
        dtype: what scales are stored in; the columns to come make up for their rounding too.
        fit: gives the `Levels` of a group from its target (rows, size) and its columns, a slice.
        compensation: what the columns to come make up for: `"triangular"` for all they can, `"diagonal"` as BiLLM's
            authors compute it, or `"none"`.
        by_column: round the columns of a group one by one, each making up for those before it, and fit its scales
            again to the error that the columns to come leave over.
    """
    factor, parts, delta = hessian.factor, [], torch.zeros_like(weight)
    if compensation == "diagonal":
        moved = weight.clone()
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=True)
    for group in groups_of(weight.shape[1], size):
        triangle, target = factor[group, group], weight[:, group]
        if compensation == "triangular":
            owed = delta[:, : group.start] @ factor[: group.start, group]
            target = target + torch.linalg.solve_triangular(triangle, owed, upper=True, left=False)
        elif compensation == "diagonal":
            target = moved[:, group]
        levels = fit(target, group)
        if by_column:
            levels = round_columns(target, triangle, levels)
            levels = solve_scales(target, triangle @ triangle.T, levels)
        levels = levels.stored(dtype)
        delta[:, group] = weight[:, group] - levels.dense()
        if compensation == "diagonal":
            error = (target - levels.dense()) / inverse.diagonal()[group]
            moved[:, group.stop :] -= error @ inverse[group, group.stop :]
        parts.append(levels)
    return Levels.join(parts)


def round_columns(target: Tensor, triangle: Tensor, levels: Levels) -> Levels:
    """One group rounded to its levels from left to right, each column making up for those before it.

    Args:
        target: (rows, columns).
        triangle: the group's block of V.
    """
    columns, owed = target.T.contiguous(), torch.zeros_like(target.T)
    minus, second = (torch.zeros_like(columns, dtype=torch.bool) for _ in range(2))
    nearest = ColumnLevels(levels, 0, slice(0, len(columns)))
    for k in range(len(columns)):
        moved = columns[k] + owed[k] / triangle[k, k]
        minus[k], second[k], value = nearest.nearest(k, moved)
        owed[k + 1 :].addr_(triangle[k, k + 1 :], columns[k] - value)
    return levels.with_bits(minus.T.contiguous(), second.T.contiguous())


def improve(weight: Tensor, hessian: Hessian, levels: Levels, dtype: torch.dtype, rounds: int) -> Levels:
    """Lower the output error at the same layout, `rounds` times: joint scales, then every weight's best level.

    Ends with the joint solution for the last bits. No step raises the error but for the rounding to `dtype`.
    """
    for number in range(rounds + 1 if rounds else 0):
        levels = solve_scales(weight, hessian.matrix, levels).stored(dtype)
        if levels.columns is not None:
            levels = solve_columns(weight, hessian.matrix, levels).stored(dtype)
        if number < rounds:
            levels = sweep_bits(weight, hessian.matrix, levels)
    return levels
