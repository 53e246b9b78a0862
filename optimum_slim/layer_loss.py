"""What leaving out decoder layers does to the loss of a model, measured (Minitron, arXiv 2407.14679 and 2408.11796).

The first paper scores a layer by the perplexity without it; the second leaves out blocks of neighbouring layers, since
the layers that matter least one by one are not those that can go together: Llama-3.1-8B scores 0.595 on Winogrande
without half of its layers as one block, and 0.5, which is chance, without the 16 that matter least.

What enters layer l is the same with and without l, so that leaving it out takes no more than the layers behind it:
each sample runs once through the whole model, and then for each block from the layer behind it, beginning with the
hidden states that entered the block. Leaving out each layer of a model costs half as many passes as it has layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .block import evaluating
from .distance import boundaries
from .evaluate import mean_loss
from .importance import Importance
from .walk import decoder_layers, entering


SAMPLES = 16
LAYER_METRICS = {
    "block_influence": "block influence",
    "loss": "the loss without each",
    "contiguous": "the loss without all of them",
}


def losses_without(model: nn.Module, tokens: Tensor, blocks: Sequence[tuple[int, int]]) -> list[float]:
    """The next-token loss of `model` without each of several blocks of layers.

    Args:
        model: A Transformers decoder model with L layers; it is not changed.
        tokens: int64 (samples, length); each sample is predicted by itself.
        blocks: half-open intervals of layers; (L, L) leaves out nothing.

    Returns:
        For each block, in nats per predicted token, the mean over the samples.

    Raises:
        ValueError: `tokens` is not a non-empty matrix, or longer than the model's positions.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens must be a non-empty matrix (samples, length), found shape {tuple(tokens.shape)}")
    stack, totals = decoder_layers(model)[1], [0.0] * len(blocks)
    rounds = tqdm(total=len(tokens) * len(blocks), desc="loss without layers", unit="block", disable=None)
    with evaluating(model), rounds as progress:
        for sample in tokens:
            states = boundaries(model, sample[None])
            for i, (first, behind) in enumerate(blocks):
                with entering(stack, behind, states[first]):
                    totals[i] += mean_loss(model, sample, len(sample))
                progress.update()
    return [total / len(tokens) for total in totals]


def loss_increase(model: nn.Module, tokens: Tensor, sizes: Iterable[int] = (1,), *, samples: int = SAMPLES) -> Tensor:
    """How much the loss of `model` grows without each block of so many neighbouring layers.

    Args:
        model: A Transformers decoder model with L layers; it is not changed.
        tokens: int64 (samples, length).
        sizes: numbers of layers to leave out at once, each between 1 and L - 1.
        samples: how many of the samples to measure on, at most, the first ones.

    Returns:
        fp32 (L, L), in nats: entry [n - 1, l] without layers l ... l + n - 1, NaN where it was not measured.

    Raises:
        ValueError: a size out of range, or tokens as for `losses_without`.
    """
    count, sizes = len(decoder_layers(model)[1]), sorted(set(sizes))
    if wrong := [n for n in sizes if not 1 <= n < count]:
        raise ValueError(f"cannot leave out {wrong} of the {count} layers of this model; pass 1 to {count - 1}")
    blocks = [(first, first + n) for n in sizes for first in range(count - n + 1)]
    dense, *found = losses_without(model, tokens[:samples], [(count, count), *blocks])
    increase = torch.full((count, count), torch.nan)
    for (first, behind), loss in zip(blocks, found, strict=True):
        increase[behind - first - 1, first] = loss - dense
    return increase


def with_losses(
    scores: Importance, model: nn.Module, tokens: Tensor | None, drops: Collection[int], metric: str
) -> Importance:
    """`scores` with the losses that `least_layers` goes by, measured where they are not there yet.

    Args:
        tokens: int64 (samples, length), or `None` if `scores` must have them.
        drops: numbers of layers that may go.
        metric: one of `LAYER_METRICS`.

    Raises:
        ValueError: losses are missing and there are no tokens.
    """
    sizes = {"block_influence": (), "loss": (1,) if drops else (), "contiguous": drops}[metric]
    known = scores.loss_increase
    missing = sorted(n for n in sizes if known is None or known[n - 1, 0].isnan())
    if not missing:
        return scores
    if tokens is None:
        raise ValueError(
            f"the saved scores have no losses without blocks of {missing} layers, by which layer_metric={metric!r} "
            f"goes; save them with `slim inspect --widths --layer-losses {' '.join(map(str, missing))}`, or leave out "
            "scores"
        )
    found = loss_increase(model, tokens, missing)
    return replace(scores, loss_increase=found if known is None else torch.where(found.isnan(), known, found))


def least_layers(scores: Importance, count: int, metric: str) -> list[int]:
    """The `count` layers that matter least by one of `LAYER_METRICS`, ascending; equal ones from the first on.

    A block keeps the first and the last layer, which matter most; the last alone if only one layer stays.
    """
    if metric == "contiguous" and count:
        row = scores.loss_increase[count - 1]
        first = min(range(1, len(row) - count) or range(1), key=lambda start: row[start].item())
        return list(range(first, first + count))
    values = scores.layers if metric == "block_influence" or not count else scores.loss_increase[0]
    return sorted(values.argsort(stable=True)[:count].tolist())
