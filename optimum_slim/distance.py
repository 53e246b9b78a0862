"""How much a stack of decoder layers changes the residual stream: the measures by which layers are dropped.

Gromov et al. (arXiv 2403.17887) compare what enters layer l with what enters layer l + n, at the last token of a text,
which alone sees all of it:

    d(l, n) = 1/pi * arccos( x_l . x_{l+n} / (|x_l| |x_{l+n}|) )

averaged over texts. Boundary l is the input of layer l; boundary L is the output of the last layer, before the final
norm (`output_hidden_states` would give it after the norm). All pairs come from one pass over the texts.

ShortGPT (arXiv 2403.03853) gives each layer one number, its block influence 1 - E[cos(x_l, x_{l+1})] over all tokens.

Of several processes each looks at its share of the texts, and all get what was found in all of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .block import evaluating, input_hooks
from .processes import from_all, share
from .walk import decoder_layers


def last_token_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, batch_size: int = 8
) -> Tensor:
    """The residual stream at every layer boundary, at the last real token of each text.

    Args:
        model: a Transformers decoder model with L decoder layers.
        input_ids: int64 (samples, length).
        attention_mask: (samples, length), 1 for real tokens and 0 for padding on either side.
        batch_size: samples per forward pass.

    Returns:
        fp32 (samples, L + 1, hidden): entry l is the input of layer l, entry L the output of the last layer.

    Raises:
        ValueError: a text holds no real token.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    if not mask.any(1).all():
        raise ValueError("attention_mask hides every token of a text; leave such texts out")
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    states = []
    batches = zip(*(share(x).split(batch_size) for x in (input_ids, mask, last)), strict=True)
    for ids, real, position in batches:
        if not len(ids):
            continue
        padded = None if attention_mask is None else real
        rows = torch.arange(len(ids))
        states.append(torch.stack([x[rows, position].float().cpu() for x in boundaries(model, ids, padded)], 1))
    return torch.cat([x for part in from_all(states) for x in part])


@torch.no_grad()
def boundaries(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """The residual stream (batch, length, hidden) at the L + 1 layer boundaries, from one forward pass."""
    _, stack = decoder_layers(model)
    decoder, device = model.get_decoder(), model.get_input_embeddings().weight.device
    arguments = {"input_ids": input_ids.to(device), "use_cache": False}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask.to(device)
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0).to(device)
    found: list[Tensor] = []
    after = stack[-1].register_forward_hook(
        lambda layer, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        with evaluating(decoder), input_hooks(dict(enumerate(stack)), lambda name, x: found.append(x)):
            decoder(**arguments)
    finally:
        after.remove()
    return found


def angular_distances(states: Tensor) -> Tensor:
    """Mean angular distance between every two boundaries.

    Computed as 2/pi * atan2(|u - v|, |u + v|) of the unit vectors, which is the same as arccos of their product but
    keeps its digits where the angle is small; arccos in fp32 loses 10 % of a distance of 3e-4.

    Args:
        states: fp32 (samples, boundaries, hidden), as `last_token_states` gives them.

    Returns:
        fp32 (boundaries, boundaries), in [0, 1], symmetric; d(l, n) is entry [l, l + n].
    """
    total = states.new_zeros(states.shape[1], states.shape[1])
    for sample in states:
        unit = sample / torch.linalg.vector_norm(sample, dim=1, keepdim=True).clamp(min=1e-30)
        for start in range(len(unit)):
            apart = torch.linalg.vector_norm(unit - unit[start], dim=1)
            along = torch.linalg.vector_norm(unit + unit[start], dim=1)
            total[start] += torch.atan2(apart, along) * (2 / math.pi)
    return total / len(states)


def distance_rows(
    table: Sequence[Sequence[float]],
) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """A table of `angular_distances` by block size.

    Returns:
        Row n - 1 holds d(l, n) for l = 0 ... L - n; and for n = 1 ... L - 1 the start of the block of least distance
        that keeps the last layer, the first of equal ones.
    """
    layers = len(table) - 1
    rows = tuple(tuple(table[start][start + n] for start in range(layers + 1 - n)) for n in range(1, layers + 1))
    return rows, tuple(min(range(len(row) - 1), key=row.__getitem__) for row in rows[:-1])


def block_influence(model: nn.Module, input_ids: Tensor, *, batch_size: int = 8) -> Tensor:
    """1 - E[cos(x_l, x_{l+1})] of each layer over all tokens (ShortGPT, Eq. 1): fp32 (L,)."""
    total = torch.zeros(len(decoder_layers(model)[1]))
    for ids in tqdm(share(input_ids).split(batch_size), desc="block influence", unit="batch", disable=None):
        if len(ids):
            total += cosine_sums(boundaries(model, ids))
    return 1 - sum(from_all(total)) / input_ids.numel()


def cosine_sums(states: Sequence[Tensor]) -> Tensor:
    """Sum over tokens of the cosine between every two neighbouring boundaries: fp32 (L,), on the CPU."""
    states = [x.float() for x in states]
    return torch.stack([nn.functional.cosine_similarity(a, b, dim=-1).sum() for a, b in pairwise(states)]).cpu()
