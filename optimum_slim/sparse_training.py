"""Training on top of dropped weights, so that they stay dropped.

An ordinary low-rank adapter fills every zero of the weight it is merged into. Here the product of its factors is
masked, in training as in the merge, M being 1 where a weight is kept:

    y = x (W + s M ∘ (B A))ᵀ + bias          W' = W + s M ∘ (B A)          index of W' = index of W, byte for byte

The matrix in brackets exists for the moment of each product only. Backward makes it again, so that what training keeps
for a layer is its input:

    dx = dy W'        G = M ∘ dyᵀ x        dA = s Bᵀ G        dB = s G Aᵀ

Next to plain LoRA that costs the product dyᵀ x: three large ones for a step instead of two (five with dropout, for
which W and the delta see different inputs). Training the kept values themselves takes the same steps, with G in the
place of dA and dB.

Layers of codes have a grid that does not move, and what is smaller than half a step of it is lost when an adapter is
merged. `rounded` therefore rounds W + s M ∘ (B A) to the grid in every forward pass and lets the gradient through as
if it had not (a straight-through estimator): what is trained is what is kept.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ._kernels import pack_codes, pack_values, sparse_dense
from .affine import AffineGrid
from .packed import linear_weight
from .sparse import SparseLinear


SPARSE = 0.1  # share of zeros above that of weights rounded to 4 bits (nf4: 0.08), below that of any useful pruning


@dataclass(frozen=True)
class MaskedDelta:
    """The weight of a sparse layer under adapters, as a function of their factors A (r, in) and B (out, r).

    Args:
        layer: the layer under them.
        scales: of each pair A, B.
        base (`bool`): whether the layer's own weight is added.
        rounded (`bool`): round the sum to the grid of a layer of codes.
    """

    layer: SparseLinear
    scales: tuple[float, ...]
    base: bool = True
    rounded: bool = False

    def weight(self, *factors: Tensor) -> Tensor:
        """(out, in), in fp32 or more, of the factors A, B, A, B, ..."""
        wide = torch.promote_types(factors[0].dtype, torch.float32)
        delta = 0
        for a, b, scale in zip(factors[::2], factors[1::2], self.scales, strict=True):
            delta = delta + (b.to(wide) @ a.to(wide)).mul_(scale)
        delta = delta.mul_(_mask(self.layer))
        grid = self.rounded and self.layer.bits is not None
        if not self.base and not grid:
            return delta
        dense = self.layer.dense(wide)
        total = delta.add_(dense)
        if grid:
            total = on_grid(self.layer, total)
        return total if self.base else total.sub_(dense)

    def gradients(self, gradient: Tensor, *factors: Tensor) -> list[Tensor]:
        """Those of the factors, from that of the weight."""
        gradient = gradient.mul_(_mask(self.layer))
        found = []
        for a, b, scale in zip(factors[::2], factors[1::2], self.scales, strict=True):
            found += [(b.to(gradient).T @ gradient) * scale, (gradient @ a.to(gradient).T) * scale]
        return found


@dataclass(frozen=True)
class KeptValues:
    """The weight of a sparse layer as a function of its values, in any floating dtype."""

    layer: SparseLinear

    def weight(self, values: Tensor) -> Tensor:
        (index, _, *others), numbers = self.layer.packed_arguments()
        return sparse_dense(index, values, *others, self.layer.in_features, *numbers, values.dtype)

    def gradients(self, gradient: Tensor, values: Tensor) -> list[Tensor]:
        layer = self.layer
        return [pack_values(gradient, layer.mask(), layer.keep, ragged=layer.layout == "flat")[0]]


class MadeAgain(torch.autograd.Function):
    """x @ make.weight(*trained).T, the weight being made again for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, make: MaskedDelta | KeptValues, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x, *trained)
        ctx.make = make
        return F.linear(x, make.weight(*trained).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, *trained = ctx.saved_tensors
        dx, found = None, [None] * len(trained)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ ctx.make.weight(*trained).to(dy.dtype)
            if any(ctx.needs_input_grad[2:]):
                gradient = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                found = ctx.make.gradients(gradient, *trained)
        return dx, None, *(None if g is None else g.to(t.dtype) for g, t in zip(found, trained, strict=True))


def product(x: Tensor, make: MaskedDelta | KeptValues, *trained: Tensor) -> Tensor:
    """x (..., in) times the weight that `make` makes of the trained tensors: (..., out).

    Computed in the dtype of `x`, or that of autocast where it is on, into which the weight is rounded once.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x = x.to(dtype)
    with torch.autocast(kind, enabled=False):
        return MadeAgain.apply(x, make, *trained)


def _mask(layer: SparseLinear) -> Tensor:
    """1 where a weight is kept and 0 elsewhere, (out, in), to multiply by."""
    if layer.bits is not None:
        return layer.mask()
    ones = torch.ones_like(layer.weight_values, dtype=torch.float32)  # ten times faster than unpacking the index
    return sparse_dense(layer.weight, ones, layer.weight_rows, None, None, layer.in_features, layer.keep, 0, 1)


def on_grid(layer: SparseLinear, weight: Tensor) -> Tensor:
    """The kept weights of (out, in) rounded to the grid of a layer of codes, zeros elsewhere."""
    grid = _grid(layer)
    return grid.values(grid.codes(weight)).masked_fill_(~layer.mask(), 0).to(weight.dtype)


def _grid(layer: SparseLinear) -> AffineGrid:
    return AffineGrid(layer.weight_scale.float(), layer.weight_zero.float(), layer.bits, layer.group_size)


@torch.no_grad()
def set_weight(layer: SparseLinear, weight: Tensor) -> None:
    """Let `layer` keep, at the places it keeps already, the values of `weight`, in a new tensor.

    Args:
        weight: (out, in). Rounded once to the dtype of the values, or to the grid that the layer has.

    Raises:
        `ValueError`: a weight that would be kept is NaN or infinite.
    """
    mask, ragged, old = layer.mask(), layer.layout == "flat", layer.weight_values
    if not bool(weight.isfinite()[mask].all()):
        raise ValueError("NaNs detected in the merged weights; the adapter seems to be broken")
    if layer.bits is None:
        values, _ = pack_values(weight.to(old.dtype), mask, layer.keep, ragged=ragged)
    else:
        values, _ = pack_codes(_grid(layer).codes(weight), mask, layer.bits, layer.keep, ragged=ragged)
        if ragged:
            values = F.pad(values, (0, len(old) - len(values)))
    layer.weight_values = nn.Parameter(values, old.requires_grad)


class TrainedSparseLinear(SparseLinear):
    """A `SparseLinear` whose values take a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, KeptValues(self), self.weight_values)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextlib.contextmanager
def trained_values(model: nn.Module) -> Iterator[None]:
    """Let the gradient reach the values of the sparse layers of `model` inside a `with` block."""
    layers = [module for module in model.modules() if type(module) is SparseLinear]
    try:
        for layer in layers:
            layer.__class__ = TrainedSparseLinear
        yield
    finally:
        for layer in layers:
            layer.__class__ = SparseLinear


def is_sparse(module: nn.Module) -> bool:
    """Whether at least a tenth of the weights of an ordinary linear layer are 0: somebody dropped them."""
    if type(module) not in (nn.Linear, Conv1D) or module.weight.is_meta:
        return False
    weight = module.weight
    return bool(weight.numel() - weight.count_nonzero() >= int(SPARSE * weight.numel()) > 0)


@torch.no_grad()
def as_sparse(linear: nn.Module) -> SparseLinear:
    """The sparse layer with the non-zero weights of an `nn.Linear` or `Conv1D`, and its bias."""
    weight = linear_weight(linear).detach()
    kept, (out_features, in_features) = weight != 0, weight.shape
    layer = SparseLinear(
        in_features,
        out_features,
        bias=False,
        layout="flat",
        kept=int(kept.sum()),
        value_dtype=weight.dtype,
        transposed=type(linear) is Conv1D,
        device="meta",
    )
    layer.load_packed(layer.packed_state(weight, ~kept))
    layer.bias = linear.bias
    return layer.train(linear.training)


@contextlib.contextmanager
def sparse_stand_ins(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Hold the ordinary layers of `model` that are sparse as `SparseLinear` inside a `with` block.

    On leaving, also through an error, they are ordinary again, with what their stand-ins hold by then. Layers with
    tied weights are left alone.

    Yields:
        The replaced modules by qualified name. One that is put back and taken out of the dict stays as it was.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    originals = {name: m for name, m in model.named_modules() if name not in tied and is_sparse(m)}
    try:
        for name, module in originals.items():
            model.set_submodule(name, as_sparse(module))
        yield originals
    finally:
        for name in originals:
            layer = model.get_submodule(name)
            if isinstance(layer, SparseLinear):
                linear = layer.to_linear(layer.weight_values.dtype)
                linear.bias = layer.bias
                model.set_submodule(name, linear.train(layer.training))
