"""What each layer of a model would predict: how early the final token is there, and how often it is given up again.

LayerSkip (https://arxiv.org/abs/2404.16710, "Motivation") begins with this look at an ordinary model: the states
behind every decoder layer go through its own final norm and head. On code, the token that Llama-7B predicts in the
end is reached at layer 23.45 of 32 on average, and may be given up for another in between. So even exits that knew
the right layer for each token would save little more than a quarter of the work; the paper's training moves it ahead.

    found = lens(model, tokens)
    print(found.summary(), found.to_markdown(), sep="\\n")

The model runs once over each batch; then the states behind each layer go through its end, a few positions at a time.
Of several processes each looks at its share of the samples, and all get what was found in all of them.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .block import evaluating
from .distance import boundaries
from .evaluate import POSITIONS_AT_ONCE
from .processes import from_all, share
from .route import Route
from .walk import decoder_layers


@dataclass(frozen=True)
class Lens:
    """What the layers of a model predict, each entry a mean over positions; entry l - 1 is behind l layers.

    Args:
        positions: how many: all but the last of each sample, where the text itself has a next token.
        agreement: share of positions where the likeliest token is the one behind the last layer.
        settled: share where it is that token from this layer on.
        first: share where it is that token for the first time.
        loss: next-token loss against the text, in nats.
        top_probability: probability of the likeliest token.
    """

    positions: int
    agreement: tuple[float, ...]
    settled: tuple[float, ...]
    first: tuple[float, ...]
    loss: tuple[float, ...]
    top_probability: tuple[float, ...]

    @property
    def first_layer(self) -> float:
        """Mean over positions of the first layer, counted from 1, that predicts the final token."""
        return sum(layer * part for layer, part in enumerate(self.first, start=1))

    @property
    def settled_layer(self) -> float:
        """Mean over positions of the layer, counted from 1, from which on the final token stays."""
        return len(self.settled) + 1 - sum(self.settled)

    def summary(self) -> str:
        """Both means in a line."""
        return (
            f"the final token is first predicted by layer {self.first_layer:.1f} of {len(self.first)} on average, and "
            f"stays from layer {self.settled_layer:.1f} on"
        )

    def table(self) -> list[dict[str, int | float]]:
        """A row for each layer, with its number from 1 as `layer`."""
        columns = ("agreement", "settled", "first", "loss", "top_probability")
        rows = zip(*(getattr(self, name) for name in columns), strict=True)
        return [{"layer": layer} | dict(zip(columns, row, strict=True)) for layer, row in enumerate(rows, start=1)]

    def to_csv(self) -> str:
        """The table with all digits."""
        rows, text = self.table(), io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table with four decimals."""
        lines = ["| layers | agreement | settled | first | loss | top probability |", "|---|---|---|---|---|---|"]
        for layer, *values in (row.values() for row in self.table()):
            lines.append(f"| {layer} | {' | '.join(f'{value:.4f}' for value in values)} |")
        return "\n".join(lines) + "\n"


@torch.no_grad()
def lens(model: nn.Module, tokens: Tensor, *, batch_size: int = 8) -> Lens:
    """Let the states behind every layer predict, and compare that with the last layer's prediction.

    Memory: the states of one batch behind all layers, and fp32 logits of at most 128 positions.

    Args:
        model: a causal language model of Transformers with L decoder layers, dense, packed, or adapted by PEFT; it
            runs in evaluation mode and in its own dtype, and is not changed.
        tokens: int64 (samples, length), without padding, at least 2 long.
        batch_size: samples per forward pass.

    Raises:
        ValueError: the model has no stack of decoder layers, no head, or changes the states between layers; tokens
            that are not an int64 matrix, too short, longer than the model's positions, or outside of its vocabulary;
            a batch size below 1.
    """
    count = len(decoder_layers(model)[1])
    _check(model, tokens, batch_size)
    device, totals = model.get_input_embeddings().weight.device, torch.zeros(5, count, dtype=torch.float64)
    rounds = tqdm(share(tokens).split(batch_size), desc="predictions of layers", unit="batch", disable=None)
    with evaluating(model), Route(model) as route:
        for ids in rounds:
            if not len(ids):
                continue
            route.run(range(count))
            for sample, *states in zip(ids.to(device), *boundaries(model, ids)[1:], strict=True):
                totals += _sums(route, sample, states)
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    means = sum(from_all(totals)) / positions
    return Lens(positions, *map(tuple, means.tolist()))


def _check(model: nn.Module, tokens: Tensor, batch_size: int) -> None:
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no head that predicts tokens; pass a model loaded with AutoModelForCausalLM"
        )
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens must be a non-empty matrix (samples, length), found shape {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be token ids in int64, found {tokens.dtype}; pass what the tokenizer gives")
    length = tokens.shape[1]
    if length < 2:
        raise ValueError("samples of 1 token have no next token to predict; pass at least 2 tokens in each")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"samples of {length} tokens are longer than the {limit} positions of the model; pass tokens[:, :{limit}]"
        )
    least, most, known = int(tokens.min()), int(tokens.max()), model.get_input_embeddings().weight.shape[0]
    if least < 0 or most >= known:
        raise ValueError(
            f"tokens go from {least} to {most}, but the model knows the ids 0 to {known - 1}; tokenize with the "
            "model's own tokenizer, without padding"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")


def _sums(route: Route, sample: Tensor, states: list[Tensor]) -> Tensor:
    """Of one sample, the sums over its positions: fp64 (fields of a `Lens`, layers), on the CPU.

    Args:
        sample: int64 (length,).
        states: (length, hidden) behind each layer.
    """
    total = torch.zeros(5, len(states), dtype=torch.float64)
    for start in range(0, len(sample) - 1, POSITIONS_AT_ONCE):
        piece = slice(start, min(start + POSITIONS_AT_ONCE, len(sample) - 1))
        labels = sample[piece.start + 1 : piece.stop + 1]
        exits = [_exit(route, sample[piece], behind[piece], labels) for behind in states]
        predicted, loss, top = (torch.stack(values) for values in zip(*exits, strict=True))
        same = predicted == predicted[-1]
        stays = same.flip(0).cumprod(0).flip(0)
        first = same & (same.cumsum(0) == 1)
        total += torch.stack([values.double().sum(1) for values in (same, stays, first, loss, top)])
    return total


def _exit(route: Route, ids: Tensor, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Likeliest tokens, losses and probabilities of these tokens of states (positions, hidden), on the CPU."""
    route.run(range(0), states=states[None])
    logits = route.model(input_ids=ids[None], use_cache=False).logits[0].float()
    most, predicted = logits.max(-1)
    whole = logits.logsumexp(-1)
    loss = whole - logits.gather(-1, labels.to(logits.device)[:, None])[:, 0]
    return predicted.cpu(), loss.cpu(), (most - whole).exp().cpu()
