"""What stays makes up for the neurons and heads that go, by least squares, without training.

The output of a feed-forward or attention part is linear in its neurons and heads: y = W x, with x what enters the down
or the output projection. Where only the positions K of x stay, the weights that do best on calibration tokens are

    min_Q  E||W x - Q x_K||² + ridge ||Q - W_K||²,     Q = W_K + (W H_K - W_K H_KK) (H_KK + ridge)^-1,

with H = E[x xᵀ] measured behind what was compensated before, and H_K its columns K. (Aiming at what the layer did in
the model as it was, halfway, takes twice as long and gains 1 % of perplexity on SmolLM2-135M.)

Minitron leaves all of that to the training. It is the step of OBS-like pruning (SparseGPT, arXiv 2301.00774, and
ZipLM, arXiv 2302.04089) for columns that are given beforehand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .axes import find_axes
from .importance import watch_points
from .layout import runs
from .sparse_training import is_sparse
from .walk import walk


@torch.no_grad()
def compensate(
    model: nn.Module,
    tokens: Tensor,
    *,
    neurons: Sequence[Tensor] | None = None,
    heads: Sequence[Tensor] | None = None,
    ridge: float = 0.01,
    batch_size: int = 8,
) -> list[dict]:
    """Fit the down and output projections to the neurons and heads that will stay; the columns of the others become 0.

    The model keeps its shapes: `narrow` takes the columns away afterwards. Weights become new tensors. Projections
    that somebody made sparse are not fitted, since that would bring their dropped weights back.

    Args:
        model: a Transformers decoder model, dense.
        tokens: int64 (samples, length).
        neurons, heads: for each layer those that will stay, as for `narrow`.
        ridge: as a share of the mean diagonal of H_KK.
        batch_size: samples per forward pass.

    Returns:
        For each projection its name and the share of its output's energy that is off, without and with compensation.
    """
    kept = {axis: index for axis, index in (("neurons", neurons), ("heads", heads)) if index is not None}
    points = {name: axis for name, axis in watch_points(model).items() if axis in kept}
    if not points:  # neurons of fused experts, which no linear layer sees
        return []
    axes, rows = find_axes(model), []
    count = len(next(iter(kept.values())))
    for block in tqdm(walk(model, tokens, batch_size=batch_size), "compensation", count, unit="layer", disable=None):
        inside = {name: model.get_submodule(name) for name in points if name.startswith(f"{block.name}.")}
        for group in block.gram_groups(inside):
            for name in group.names:
                axis = next(axis for axis in axes[f"{name}.weight"] if axis.name == points[name])
                columns = runs(kept[points[name]][block.index], axis.size // axis.count)
                rows.append({"name": name} | _fit(inside[name], columns, group.gram, ridge))
    return rows


def _fit(linear: nn.Module, columns: Tensor, gram: Tensor, ridge: float) -> dict[str, float]:
    """Give the layer its new weight; the errors before and after."""
    weight = linear.weight.T.float() if isinstance(linear, Conv1D) else linear.weight.float()
    columns = columns.to(weight.device)
    kept, inner = weight[:, columns], gram[columns][:, columns]
    owed = weight @ gram[:, columns] - kept @ inner
    inner = inner.diagonal_scatter(inner.diagonal() + ridge * inner.diagonal().mean().clamp(min=1e-30))
    fitted = torch.zeros_like(weight)
    errors = []
    change = 0 if is_sparse(linear) else torch.cholesky_solve(owed.T, torch.linalg.cholesky(inner)).T
    for part in (kept, kept + change):
        fitted[:, columns] = part
        errors.append(_energy(weight - fitted, gram))
    stored = (fitted.T if isinstance(linear, Conv1D) else fitted).to(linear.weight.dtype).contiguous()
    linear.weight = nn.Parameter(stored, linear.weight.requires_grad)
    whole = _energy(weight, gram)
    return {"cut": errors[0] / whole, "compensated": errors[1] / whole}


def _energy(weight: Tensor, gram: Tensor) -> float:
    """E||W x||²."""
    return float(((weight @ gram) * weight).sum().clamp(min=1e-30))
