"""A linear map that stands in for removed decoder layers, merged into the weights (ReplaceMe, arXiv 2505.02819).

Removing the layers between boundaries a and b leaves a gap: the residual stream x_a where the next layer expects x_b.
Layer a - 1 ends by adding its MLP's output m to the stream. The map T that closes the gap best on calibration tokens,

    min_T  sum w |m T - (m + x_b - x_a)|^2 + ridge |T - I|^2,     T = I + (M'wM + ridge I)^-1 M'w (X_b - X_a),

multiplies m only, so it merges into the MLP's last linear layer: W <- T' W (and its bias). No training, no new
parameter. Least squares needs two (hidden, hidden) matrices, summed over the tokens.

A token weighs w = 1 / |x_b|. The attention sink at the start of a text can be a hundred times longer than other
states, and a removed block may be what makes it so. With equal weights the sink rules the fit, with 1 / |x_b|^2 it is
lost, and both leave a worse model than no patch: see benchmarks/results/depth_ppl.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .distance import boundaries
from .packed import linear_shape
from .walk import decoder_layers


ADDITIVE_WITHIN = {torch.float32: 1e-4, torch.float64: 1e-6}


@dataclass(frozen=True)
class Patch:
    """The map for one gap.

    Args:
        name: of the linear layer it merges into.
        matrix: T, fp32 (hidden, hidden).
        left: share of the gap's energy that is left, of w |m T - (m + x_b - x_a)|^2 in w |x_b - x_a|^2.
    """

    name: str
    matrix: Tensor
    left: float


@torch.no_grad()
def fit_patches(
    model: nn.Module, tokens: Tensor, gaps: Sequence[tuple[int, int]], *, ridge: float, batch_size: int = 8
) -> list[Patch]:
    """Fit the map of each gap on the whole model, before any layer is removed.

    Args:
        model: a Transformers decoder model.
        tokens: int64 (samples, length).
        gaps: pairs (a, b): the layers a to b - 1 will be removed and layer a - 1 stays.
        ridge: pull towards the identity, as a share of the mean of the diagonal of M'M.

    Raises:
        ValueError: a gap starts at layer 0, or the layer before it does not end in a linear layer added to the stream.
    """
    prefix, stack = decoder_layers(model)
    if any(start == 0 for start, _ in gaps):
        raise ValueError("linear_patch merges into the layer before the removed ones, and layer 0 has none before it")
    writers = [_writer(model, f"{prefix}.{start - 1}", stack[start - 1], tokens[:1]) for start, _ in gaps]
    sums = [[0.0, 0.0, 0.0] for _ in gaps]
    for batch in tqdm(tokens.split(batch_size), desc="linear patch", unit="batch", disable=None):
        written: dict[str, Tensor] = {}
        with _output_hooks({name: model.get_submodule(name) for name in writers}, written.__setitem__):
            states = boundaries(model, batch)
        for found, name, (start, end) in zip(sums, writers, gaps, strict=True):
            m = written[name].flatten(0, -2).float()
            after = states[end].flatten(0, -2).float()
            gap = after - states[start].flatten(0, -2).float()
            weight = 1 / torch.linalg.vector_norm(after, dim=1, keepdim=True).clamp(min=1e-30)
            found[0] = found[0] + m.T @ (weight * m)
            found[1] = found[1] + m.T @ (weight * gap)
            found[2] = found[2] + (weight * gap.square()).sum()
    return [_solve(name, *found, ridge) for name, found in zip(writers, sums, strict=True)]


@torch.no_grad()
def merge_patch(linear: nn.Module, patch: Patch) -> None:
    """Multiply a linear layer by the map; its parameters become new tensors, the old ones are left alone."""
    matrix, weight = patch.matrix.to(linear.weight.device), linear.weight.float()
    merged = weight @ matrix if isinstance(linear, Conv1D) else matrix.T @ weight
    linear.weight = nn.Parameter(merged.to(linear.weight.dtype).contiguous(), linear.weight.requires_grad)
    if linear.bias is not None:
        bias = (linear.bias.float() @ matrix).to(linear.bias.dtype)
        linear.bias = nn.Parameter(bias, linear.bias.requires_grad)


def _solve(name: str, gram: Tensor, moment: Tensor, energy: Tensor, ridge: float) -> Patch:
    gram, moment = gram.double(), moment.double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    delta = torch.linalg.solve(gram + ridge * gram.diagonal().mean().clamp(min=1e-30) * eye, moment)
    explained = 2 * (delta * moment).sum() - (delta * (gram @ delta)).sum()
    return Patch(name, (eye + delta).float(), float(1 - explained / energy.clamp(min=1e-30)))


def _writer(model: nn.Module, name: str, layer: nn.Module, tokens: Tensor) -> str:
    """The last linear layer of a decoder layer, if its output is added, unchanged, to the residual stream."""
    linears = {f"{name}.{key}": module for key, module in layer.named_modules() if type(module) in (nn.Linear, Conv1D)}
    outputs: dict[str, Tensor] = {}
    with _output_hooks(linears | {name: layer}, outputs.__setitem__):
        boundaries(model, tokens)
    whole = outputs.pop(name)
    writer = next((key for key in reversed(outputs) if linear_shape(linears[key])[0] == whole.shape[-1]), None)
    if writer is not None:
        without: dict[str, Tensor] = {}
        silence = linears[writer].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        try:
            with _output_hooks({name: layer}, without.__setitem__):
                boundaries(model, tokens)
        finally:
            silence.remove()
        written = outputs[writer].reshape(whole.shape).float()
        error = torch.linalg.vector_norm(whole.float() - without[name].float() - written)
        if error <= ADDITIVE_WITHIN.get(whole.dtype, 2e-2) * torch.linalg.vector_norm(whole.float()):
            return writer
    raise ValueError(
        f"{name} does not end in a dense linear layer whose output is added to the residual stream, so no "
        "linear_patch can be merged into it; use linear_patch=False"
    )


@contextmanager
def _output_hooks(modules: dict[str, nn.Module], receive: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call `receive(name, output)` whenever one of the modules has run."""
    hooks = [module.register_forward_hook(partial(_hand_over, receive, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hand_over(
    receive: Callable[[str, Tensor], Any], name: str, module: nn.Module, inputs: tuple, output: Any
) -> None:
    receive(name, output[0] if isinstance(output, tuple) else output)
