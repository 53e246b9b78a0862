"""PT2-LLM (arXiv 2510.03267): ternary weights for an ordinary model, with calibration data but without training.

Every row of a weight matrix is cut into groups of 128 columns, and each group becomes codes in {-1, 0, 1} on a grid of
its own, with a scale and an offset:

    W[n, k] ~ scale[n, g] * T[n, k] + offset[n, g]        g = k // group_size

What is minimized is not the error of the weights but that of the layer's outputs on calibration tokens X, which only
needs their Gram matrix H = X X^T / tokens:

    ||(W - Q) X||^2 / tokens = tr((W - Q) H (W - Q)^T)

Three pieces, for one group after the other:

1. Iterative ternary fitting (ITF): alternate the least-squares grid for given codes with the nearest codes for a given
   grid until the codes stay as they are. The error never grows.
2. Activation-aware grid alignment (AGA): with the codes frozen, the scale and offset that minimize the output error,
   an exact 2 x 2 solution for each row.
3. Error feedback (GPTQ): what the group got wrong is compensated by the columns still to come.

`variant="paper"` is just that. The default, `"refined"`, keeps the layout and the objective and searches harder:
columns of a group are rounded one by one with feedback inside the group too, and afterwards, `rounds` times, all grids
of a row are solved for jointly and every code is moved to the best of its three values given all others (see
`optimum_slim/grid.py`). None of these later steps raises the output error. Each layer also makes up for part of what
the layers before it have changed (`asymmetric`). The paper's reordering of columns is left out: a permutation would
have to be stored and applied with every layer.

Cost: about 2.3 bits a weight (2 for the code, 32 / group_size for scale and offset). Expect large models to take it
well and small ones badly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._kernels import pack_ternary
from ..grid import Grid, solve_grids, sweep_codes
from ..hessian import MAX_DAMPENING
from ..packed import SCALE_DTYPES, TernaryLinear, linear_shape
from ..step import LinearStep, register


ASYMMETRIC = {"refined": 0.25, "paper": 0.0}


@register(
    "pt2llm", paper="PT2-LLM: Post-Training Ternarization for Large Language Models (ICLR 2026, arXiv 2510.03267)"
)
@dataclass(frozen=True, kw_only=True)
class PT2LLM(LinearStep):
    """Asymmetric ternary weights fitted to calibration data.

    Args:
        group_size (`int`): input columns that share a scale and an offset within a row.
        variant (`str`): `"refined"` (lower error) or `"paper"`.
        rounds (`int`): joint grid solutions and sweeps over the codes after the first pass; unused by `"paper"`.
        iterations (`int`): most ITF iterations.
        dampening (`float`): share of the mean diagonal added to the Gram matrix's; raised tenfold, up to 1, for as
            long as the matrix cannot be factorized.
        asymmetric (`float`): how far each layer's target moves from its own weights to those that do on the inputs
            behind the ternary layers what the layer did in the unslimmed model; 0 for the paper, 1 for all the way.
        activation_bits (`8` or `None`): int8 activations per token and group, for which the fast kernels are made, or
            activations left as they are, as in the paper.
        scale_dtype (`str`): `"float16"`, `"bfloat16"` or `"float32"`: how scales and offsets are stored.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.
    """

    needs_data: ClassVar[bool] = True

    group_size: int = 128
    variant: str = "refined"
    rounds: int = 2
    iterations: int = 10
    dampening: float = 0.01
    asymmetric: float | None = None
    activation_bits: int | None = 8
    scale_dtype: str = "float16"

    def __post_init__(self):
        for name, least in {"group_size": 1, "iterations": 1, "rounds": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")
        if not 0 < self.dampening <= MAX_DAMPENING:
            raise ValueError(f"dampening must be above 0 and at most {MAX_DAMPENING}, found {self.dampening!r}")
        for name, known in {
            "variant": ("refined", "paper"),
            "activation_bits": (8, None),
            "scale_dtype": tuple(SCALE_DTYPES),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, found {getattr(self, name)!r}")
        if self.asymmetric is None:
            object.__setattr__(self, "asymmetric", ASYMMETRIC[self.variant])
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric must lie in [0, 1], found {self.asymmetric!r}")

    def empty(self, linear: nn.Module) -> TernaryLinear:
        out_features, in_features = linear_shape(linear)
        return TernaryLinear(
            in_features,
            out_features,
            linear.bias is not None,
            group_size=self.group_size,
            offset=True,
            activation_bits=self.activation_bits,
            scale_dtype=SCALE_DTYPES[self.scale_dtype],
            transposed=type(linear) is not nn.Linear,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        check_finite(weight, gram)
        weight, hessian, factor = prepare(weight.float(), gram.float(), self.dampening)
        grid = Grid(self.group_size, SCALE_DTYPES[self.scale_dtype])
        refined = self.variant == "refined"
        scale, offset, codes, _ = feedback(
            weight, hessian, factor, grid, iterations=self.iterations, by_column=refined
        )
        for _ in range(self.rounds if refined else 0):
            scale, offset, codes = solve_grids(weight, hessian, codes, grid)
            codes = sweep_codes(weight, hessian, scale, offset, codes, grid)
        if refined:
            scale, offset, codes = solve_grids(weight, hessian, codes, grid)
        return {
            "weight": pack_ternary(codes.to(torch.int8)),
            "weight_scale": scale.to(grid.dtype),
            "weight_offset": offset.to(grid.dtype),
        }


def check_finite(weight: Tensor, gram: Tensor | None) -> None:
    """Raise a `ValueError` that names what is missing, misshapen or not finite."""
    if gram is None:
        raise ValueError("PT2LLM needs the Gram matrix of the layer's inputs; run it with calibration data")
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"the Gram matrix has shape {tuple(gram.shape)}, expected {(weight.shape[1],) * 2}")
    for name, tensor in {"the weight": weight, "the Gram matrix of the layer's inputs": gram}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values; check the checkpoint, or calibrate in float32")


def prepare(weight: Tensor, gram: Tensor, dampening: float) -> tuple[Tensor, Tensor, Tensor]:
    """Dampen the Gram matrix and factorize it.

    Inputs that were always zero get a diagonal entry of 1 and zero weights.

    Returns:
        The weight, the dampened H with a mean diagonal of about 1, and V, upper triangular with H = V V^T. Its inverse
        U is GPTQ's factor, H^-1 = U^T U, and a block of V on the diagonal is the inverse of the same block of U.

    Raises:
        ValueError: no token reached the layer, or H is not positive definite even at the largest dampening.
    """
    mean = gram.diagonal().mean()
    if mean <= 0:
        raise ValueError("the Gram matrix is zero: no calibration token reached this layer; use more samples")
    hessian = gram / mean
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight = weight.masked_fill(dead, 0)
    mean = hessian.diagonal().mean()
    while dampening <= MAX_DAMPENING * 1.001:
        dampened = hessian + torch.diag(dampening * mean.expand(len(hessian)))
        factor, failed = torch.linalg.cholesky_ex(dampened.flip(0, 1))
        if not failed:
            return weight, dampened, factor.flip(0, 1)
        dampening *= 10
    raise ValueError(
        f"the Gram matrix is not positive definite, even with a dampening of {MAX_DAMPENING}; "
        "use more calibration samples, or calibrate in float32"
    )


def nearest_codes(weight: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Codes of the grid points next to the weights; 0 where the scale is 0."""
    return torch.where(scale > 0, (weight - offset) / scale, 0).round_().clamp_(-1, 1)


def align_grid(weight: Tensor, codes: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """AGA: the exact minimum of (w - a t - m) S (w - a t - m)^T for each row w with codes t.

    Args:
        weight, codes: One group, (rows, columns).
        metric: S, positive definite (columns, columns), or its diagonal.

    Returns:
        a and m, (rows, 1) each. Rows whose codes are all equal get a = 0.
    """
    weight, codes, metric = weight.double(), codes.double(), metric.double()
    codes_s = codes * metric if metric.dim() == 1 else codes @ metric
    ones_s = metric if metric.dim() == 1 else metric.sum(0)
    tt, to, oo = (codes_s * codes).sum(1), codes @ ones_s, ones_s.sum()
    tw, ow = (codes_s * weight).sum(1), weight @ ones_s
    determinant = tt * oo - to * to
    solvable = determinant > 1e-9 * tt * oo
    scale = torch.where(solvable, (tw * oo - to * ow) / determinant.where(solvable, 1), 0)
    offset = (ow - scale * to) / oo
    return scale.float()[:, None], offset.float()[:, None]


def fit_ternary(weight: Tensor, importance: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """ITF: scale and offset (rows, 1) and codes (rows, columns) of one group, without regard to correlations.

    It is run from two starts, the spread of the weights and their range (which finds weights that are ternary
    already), and keeps the better one in each row.

    Args:
        weight: (rows, columns).
        importance: What each column's error counts, (columns,); ones for the plain error of the weights.
        iterations: Most alternations.
    """
    mean, low, high = weight.mean(1, keepdim=True), weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    starts = [(1.4 * (weight - mean).abs().mean(1, keepdim=True), mean), ((high - low) / 2, (high + low) / 2)]
    fits = [_alternate(weight, importance, iterations, scale, offset) for scale, offset in starts]
    errors = [((weight - s * t - o).square() * importance).sum(1, keepdim=True) for s, o, t in fits]
    first = errors[0] <= errors[1]
    scale, offset, codes = (torch.where(first, a, b) for a, b in zip(*fits, strict=True))
    return scale, offset, codes


def _alternate(
    weight: Tensor, importance: Tensor, iterations: int, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    codes = nearest_codes(weight, scale, offset)
    for _ in range(iterations):
        scale, offset = align_grid(weight, codes, importance)
        previous, codes = codes, nearest_codes(weight, scale, offset)
        if torch.equal(previous, codes):
            break
    return scale, offset, codes


def feedback(
    weight: Tensor, hessian: Tensor, factor: Tensor, grid: Grid, *, iterations: int, by_column: bool
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Fit one group after the other; the columns still to come compensate for the error of those done.

    Args:
        weight: (rows, columns).
        hessian, factor: H and V of `prepare`.
        grid: Group size and storage dtype.
        iterations: Most ITF iterations.
        by_column: Round the columns of a group one by one, each making up for those before it, on a grid from an ITF
            that weighs columns by their second moments; AGA then counts the error that is left once all later columns
            have compensated. Otherwise as in the paper: codes from ITF, AGA with the group's block of H.

    Returns:
        Scale and offset (rows, groups), as stored, codes (rows, columns), all fp32, and tr((W - Q) H (W - Q)^T).
    """
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), device=factor.device), upper=True)
    weight, codes, grids, error = weight.clone(), torch.empty_like(weight), [], 0.0
    for group in grid.groups(weight.shape[1]):
        block, triangle = weight[:, group], factor[group, group]
        importance = hessian.diagonal()[group] if by_column else torch.ones_like(block[0])
        scale, offset, chosen = fit_ternary(block, importance, iterations)
        if by_column:
            chosen = round_columns(block, scale, offset, inverse[group, group])
        metric = triangle @ triangle.T if by_column else hessian[group, group]
        scale, offset, codes[:, group] = positive(*align_grid(block, chosen, metric), chosen)
        grids.append(grid.stored(scale, offset))
        residual = (block - grid.weight(*grids[-1], codes[:, group])) @ triangle
        weight[:, group.stop :] -= residual @ inverse[group, group.stop :]
        error += residual.square().sum().item()
    scale, offset = (torch.cat(values, dim=1) for values in zip(*grids, strict=True))
    return scale, offset, codes, error


def round_columns(weight: Tensor, scale: Tensor, offset: Tensor, inverse: Tensor) -> Tensor:
    """Codes of one group, (rows, columns), rounded from left to right with feedback; `inverse` is its block of U."""
    columns = weight.T.contiguous()
    scale, offset = scale[:, 0], offset[:, 0]
    codes = torch.empty_like(columns)
    for k in range(len(columns)):
        codes[k] = nearest_codes(columns[k], scale, offset)
        residual = (columns[k] - scale * codes[k] - offset) / inverse[k, k]
        columns[k + 1 :].addr_(inverse[k, k + 1 :], residual, alpha=-1)
    return codes.T


def positive(scale: Tensor, offset: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same weights with no negative scale: (rows, 1) for one group of codes."""
    return scale.abs(), offset, torch.where(scale < 0, -codes, codes)
