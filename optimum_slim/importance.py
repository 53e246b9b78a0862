"""How much each neuron, head, channel and layer matters, from forward passes alone (Minitron, arXiv 2407.14679).

What is looked at, for each unit:

    neurons    what enters the down projection, after activation and gate
    heads      what enters the output projection, its norm over the positions of the head
    channels   what leaves the norms of the decoder layers; the scores of all norms are added
    layers     block influence, 1 - E[cos(what enters, what leaves)]
    experts    see `expert_scores.py`

Activations are first aggregated over the tokens of a sample, then over the samples, each by the mean of magnitudes,
the L2 norm or the variance. The paper finds L2 over samples of means over tokens best, the default, and its authors'
code computes just that. Sums are kept in fp32; neither the order of the samples nor how they are cut into batches
changes a score beyond rounding. Of several processes each looks at its share of the samples, and all have the scores
of all samples, the same to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .axes import Sizes, find_axes
from .block import evaluating
from .distance import boundaries, cosine_sums
from .expert_scores import ExpertScores, has_known_parts
from .processes import check_same, from_all, share
from .walk import decoder_layers


AGGREGATES = ("mean", "l2", "variance")
BY_LAYER = ("neurons", "heads", "experts", "expert_neurons", "shared_neurons")
SCORES = (*BY_LAYER, "channels", "layers", "energy", "loss_increase")


@dataclass(frozen=True)
class Importance:
    """Scores, fp32, larger for what matters more; an entry is `None` where the model has no such width.

    Layers without such units, in a stack of dense and sparse ones, have zeros.

    Args:
        neurons: (layers, intermediate_size), or (layers, experts, intermediate_size) if they are those of experts.
        heads: (layers, num_attention_heads).
        channels: (hidden_size,).
        layers: (layers,).
        energy: (hidden_size,), mean square of each channel of what enters the norms of the decoder layers.
        aggregate: over samples and over tokens.
        tokens: how many were looked at.
        experts: (layers, experts).
        expert_neurons: (layers, experts, moe_intermediate_size).
        shared_neurons: (layers, n_shared_experts * moe_intermediate_size), of shared experts that are as wide as so
            many others.
        loss_increase: (layers, layers), by how much the loss grows without blocks of layers (see `layer_loss.py`).
    """

    neurons: Tensor | None
    heads: Tensor | None
    channels: Tensor | None
    layers: Tensor
    energy: Tensor | None
    aggregate: tuple[str, str]
    tokens: int
    experts: Tensor | None = None
    expert_neurons: Tensor | None = None
    shared_neurons: Tensor | None = None
    loss_increase: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write the scores as a safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in SCORES if getattr(self, name) is not None}
        save_file(tensors, path, {"aggregate": json.dumps(self.aggregate), "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read what `save` wrote. Raises a `ValueError` if the file holds something else."""
        with safe_open(path, "pt") as file:
            found, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if "aggregate" not in about or "layers" not in found:
            raise ValueError(f"{path} holds no importance scores; make them with importance(model, tokens).save(path)")
        tensors = {name: found.get(name) for name in SCORES}
        return cls(**tensors, aggregate=tuple(json.loads(about["aggregate"])), tokens=int(about["tokens"]))


class Aggregate:
    """Activations (samples, tokens, units) seen in any number of batches, as one score for each unit.

    Args:
        samples, tokens: how samples and the tokens of one are aggregated: "mean" of magnitudes, "l2" or "variance".
    """

    def __init__(self, samples: str, tokens: str):
        for name in (samples, tokens):
            if name not in AGGREGATES:
                raise ValueError(f"aggregate must be two of {', '.join(AGGREGATES)}, found {name!r}")
        self.samples, self.tokens = samples, tokens
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        x = x.float()
        if self.tokens == "mean":
            each = x.abs().mean(1)
        else:
            each = torch.linalg.vector_norm(x, dim=1) if self.tokens == "l2" else x.var(1, unbiased=False)
        self.count += len(each)
        self.sum = self.sum.to(x.device) + each.abs().sum(0)
        self.squares = self.squares.to(x.device) + each.square().sum(0)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in vars(self).items()}

    def __add__(self, other: Aggregate) -> Aggregate:
        """What both have seen, on the CPU."""
        total = Aggregate(self.samples, self.tokens)
        total.count = self.count + other.count
        total.sum, total.squares = self.sum.cpu() + other.sum.cpu(), self.squares.cpu() + other.squares.cpu()
        return total

    def score(self) -> Tensor:
        """(units,)."""
        if self.samples == "l2":
            return self.squares.sqrt()
        mean = self.sum / self.count
        return mean if self.samples == "mean" else (self.squares / self.count - mean.square()).clamp(min=0)


@torch.no_grad()
def importance(
    model: nn.Module, tokens: Tensor, *, aggregate: tuple[str, str] = ("l2", "mean"), batch_size: int = 8
) -> Importance:
    """Score all widths and layers of `model` in one pass; of several processes all must call it.

    Args:
        model: A Transformers decoder model, dense; it is not changed.
        tokens: int64 (samples, length), the same in all processes.
        aggregate: over samples and over tokens: `"mean"`, `"l2"` or `"variance"` each.
        batch_size: samples per forward pass.

    Raises:
        ValueError: an unknown aggregate, no tokens, a config that cannot express a width (see `find_axes`), or other
            weights in another process.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens must be a non-empty matrix (samples, length), found shape {tuple(tokens.shape)}")
    check_same(model)
    watched = watch_points(model)
    sizes, (prefix, stack) = Sizes.of(model.config), decoder_layers(model)
    inside, length = "expert_neurons" if sizes.expert_neurons else "neurons", tokens.shape[1]
    seen: dict[str, Any] = {name: Aggregate(*aggregate) for name in watched}
    for name in (name for name, axis in watched.items() if axis == "experts"):
        neurons = [Aggregate(*aggregate) for _ in range(sizes.experts)]
        seen[name] = ExpertScores(model.get_submodule(name), neurons, length, inside)
    energy, cosines = torch.zeros(()), torch.zeros(len(stack), dtype=torch.float64)

    def look(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        nonlocal energy
        if watched[name] == "channels":
            energy = energy + args[0].float().square().flatten(0, -2).sum(0).cpu()
        if watched[name] == "experts":
            seen[name].add(*args, *kwargs.values(), output)
        else:
            x = output if watched[name] == "channels" else args[0]
            seen[name].add(x.reshape(-1, length, x.shape[-1]))  # some sparse layers see tokens without samples

    modules = {name: model.get_submodule(name) for name in watched}
    hooks = [m.register_forward_hook(partial(look, name), with_kwargs=True) for name, m in modules.items()]
    try:
        with evaluating(model):
            batches = [batch for batch in share(tokens).split(batch_size) if len(batch)]
            for batch in tqdm(batches, desc="importance", unit="batch", disable=None):
                cosines += cosine_sums(boundaries(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    parts, energies, all_cosines = zip(*from_all((seen, energy, cosines)), strict=True)
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for name, axis in watched.items():
        layer = int(name.removeprefix(f"{prefix}.").partition(".")[0])
        total = reduce(add, [part[name] for part in parts])
        found = total.scores() if axis == "experts" else {axis: total.score()}
        for key, score in found.items():
            score = score.view(sizes.heads, -1).norm(dim=1) if key == "heads" else score
            rows.setdefault(key, []).append((layer, score.cpu()))
    channels = [score for _, score in rows.pop("channels", ())]
    return Importance(
        **{axis: by_layer(rows.get(axis, ()), len(stack)) for axis in BY_LAYER},
        channels=torch.stack(channels).sum(0) if channels else None,
        layers=(1 - sum(all_cosines) / tokens.numel()).float(),
        energy=sum(energies) / tokens.numel() if channels else None,
        aggregate=tuple(aggregate),
        tokens=tokens.numel(),
    )


def by_layer(rows: Sequence[tuple[int, Tensor]], layers: int) -> Tensor | None:
    """Scores of layers as one tensor, zeros for those that have none; `None` if the layers are not alike."""
    found = dict(rows)
    if len(found) < len(rows) or len({row.shape for row in found.values()}) != 1:
        return None
    whole = torch.zeros(layers, *next(iter(found.values())).shape)
    for layer, row in found.items():
        whole[layer] = row
    return whole


def watch_points(model: nn.Module) -> dict[str, str]:
    """Modules of the decoder layers that tell what a width matters, by name: inputs of the down and of the output
    projection for `"neurons"` and `"heads"`, norms over the residual stream for `"channels"`, fused experts whose
    parts are known for `"experts"`, and the down projections of shared experts for `"shared_neurons"`."""
    prefix, found, unknown = decoder_layers(model)[0], {}, set()
    for name, axes in find_axes(model).items():
        module, _, key = name.rpartition(".")
        owner, by_dim = model.get_submodule(module), {axis.dim: axis.name for axis in axes}
        if by_dim.get(0) == "experts" and {"neurons", "expert_neurons"} & {*by_dim.values()}:
            if has_known_parts(owner):
                found[module] = "experts"
            else:
                unknown |= {*by_dim.values()}
        elif key != "weight" or not name.startswith(f"{prefix}."):
            continue
        elif owner.weight.dim() == 1:
            if by_dim == {0: "channels"}:
                found[module] = "channels"
        elif (entering := by_dim.get(0 if isinstance(owner, Conv1D) else 1)) in ("neurons", "expert_neurons", "heads"):
            found[module] = "shared_neurons" if entering == "expert_neurons" else entering
    return {module: axis for module, axis in found.items() if axis != "neurons" or axis not in unknown}
