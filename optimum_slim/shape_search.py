"""Which of several shapes to take: each is cut out of the model, trained for a short while, and measured.

Minitron's light architecture search (arXiv 2407.14679): what a shape is worth shows only after some training, and the
order of the candidates is settled after about 300 steps of it. One candidate is in memory at a time, beside the model,
whose tensors it shares until it is trained. With a journal, a search that was killed goes on where it was, inside the
training of a candidate as well.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from .evaluate import perplexity
from .journal import Journal, identity_of
from .memory import shared_copy
from .methods.heal import Heal
from .processes import place
from .shapes import Shape
from .undisturbed import own_flags


def rank_shapes(
    model: nn.Module,
    tokens: Tensor,
    shapes: Sequence[Shape],
    cut: Callable[[nn.Module, Shape], Any],
    *,
    steps: int = 0,
    journal: str | Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[Shape, dict[str, Any]]:
    """Measure every shape on an eighth of the samples, on which none is trained.

    Args:
        model: A Transformers decoder model; it is not changed, and teaches what is cut out of it.
        tokens: int64 (samples, length), at least three samples if there is training.
        shapes: The candidates.
        cut: `cut(copied, shape)` gives a copy of `model` that shape.
        steps: of distillation, all weights, before the ranking; 0 ranks the shapes as they are cut.
        journal: Folder for what is finished; the caller removes it when its own work is done.
        settings: What `cut` goes by, so that a journal of another search is noticed: numbers, strings, lists of them.

    Returns:
        The shapes, best first, each with `rank` (from 1), `parameters`, `perplexity` as it is cut, and
        `perplexity_healed` after the training (`None` without).

    Raises:
        ValueError: too few samples, or the journal of another search.
    """
    if steps and len(tokens) < 3:
        raise ValueError("a search with training needs samples to train on and others to compare on; pass at least 3")
    held, rows, kept = max(1, len(tokens) // 8), [], None
    if journal is not None:
        candidates = hashlib.sha256(repr(list(shapes)).encode()).hexdigest()
        about = (settings or {}) | {"steps": steps, "shapes": candidates} | identity_of(model, tokens)
        kept = Journal(Path(journal) / "shapes", about)
        rows = (kept.read() or {"rows": []})["rows"]
    progress = tqdm(shapes[len(rows) :], "shapes", len(shapes), initial=len(rows), unit="shape", disable=None)
    for shape in progress:
        training = None if journal is None else Path(journal) / f"shape-{len(rows):02d}"
        with own_flags(model):
            rows.append(_measured(model, tokens, held, shape, cut, steps, training))
        if kept is not None and place()[0] == 0:
            kept.write({"rows": rows})
            shutil.rmtree(training, ignore_errors=True)
    figures = {
        shape: {"rank": 0, "parameters": shape.parameters} | row for shape, row in zip(shapes, rows, strict=True)
    }
    ranked = dict(sorted(figures.items(), key=lambda item: _final(item[1])))
    for rank, row in enumerate(ranked.values(), start=1):
        row["rank"] = rank
    return ranked


def _measured(model, tokens: Tensor, held: int, shape: Shape, cut, steps: int, journal) -> dict[str, float | None]:
    """The perplexity of one shape as it is cut and as it is trained."""

    def measure() -> float:
        return perplexity(copied, tokens[:held].flatten(), tokens.shape[1])

    copied = shared_copy(model)
    cut(copied, shape)
    row = {"perplexity": measure(), "perplexity_healed": None}
    if steps:
        Heal(method="full", steps=steps).apply(copied, tokens[held:], teacher=model, journal=journal)
        row["perplexity_healed"] = measure()
    return row


def _final(row: dict[str, Any]) -> float:
    """What a shape is ranked by; what is not a number comes last."""
    value = row["perplexity"] if row["perplexity_healed"] is None else row["perplexity_healed"]
    return math.inf if math.isnan(value) else value
