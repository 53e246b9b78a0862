"""Look before you cut: which layers of a model do little, and what dropping them costs.

Two pictures of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), for any model:

* its Figure 4: the angular distance between what enters layer l and what enters layer l + n, for every block of n
  layers. Where it is small the block hardly turns the residual stream, and may go.
* perplexity against the number of layers dropped, with and without healing.

With `widths=True` also how much neurons, heads, channels and layers matter (`importance.py`), and with `layer_losses`
what the loss becomes without blocks of layers (`layer_loss.py`), as a picture and as a file that
`Minitron(scores=...)` takes. With `shapes=Minitron(ratio=...)`, the shapes of that size and how they do
(`shape_search.py`). With `lens=True`, what each layer would predict by itself (`lens.py`).

    inspection = inspect(model, tokens, text_ids=tokenize("wiki.test.raw", tokenizer))
    inspection.save("pictures")

The model is never changed: layers are dropped from a copy of its structure that shares all its weights.
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .block import evaluating
from .distance import angular_distances, distance_rows, last_token_states
from .evaluate import perplexity
from .figures import check_matplotlib, draw_distances, draw_importance, draw_lens, draw_perplexity, draw_shapes
from .importance import Importance, importance
from .layer_loss import loss_increase
from .lens import Lens
from .lens import lens as predictions
from .memory import shared_copy
from .methods.depth import Depth, greedy_order
from .methods.minitron import Minitron
from .saving import check_target, take_place
from .step import Step
from .undisturbed import own_flags
from .walk import decoder_layers


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Args:
        model: name of the model.
        tokens: what the distances were measured on, in words.
        distances: row n - 1 holds d(l, n) for blocks of n layers starting at l = 0 ... L - n, in [0, 1].
        best: for n = 1 ... L - 1, the start of the block of least distance that keeps the last layer.
        metric: by which the layers of the curve were chosen.
        dense_perplexity: of the whole model; `None` without a text.
        curve: rows of `dropped`, `layers`, `perplexity`, `perplexity_healed` (`None` without healing).
        text: what the perplexity was measured on, in words.
        heal: the healing step as recorded, if there was one.
        importance: scores of widths and layers, if they were asked for.
        shapes: rows of `Minitron.ranking`, best first, if they were asked for.
        search: the step that ranked them, as recorded.
        lens: what each layer predicts, if it was asked for.
    """

    model: str
    tokens: str
    distances: tuple[tuple[float, ...], ...]
    best: tuple[int, ...]
    metric: str
    dense_perplexity: float | None = None
    curve: tuple[dict[str, Any], ...] = ()
    text: str = ""
    heal: dict[str, Any] | None = None
    importance: Importance | None = None
    shapes: tuple[dict[str, Any], ...] = ()
    search: dict[str, Any] | None = None
    lens: Lens | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the importance scores as JSON types."""
        data = asdict(dataclasses.replace(self, importance=None))
        del data["importance"]
        return json.loads(json.dumps(data))

    def to_markdown(self) -> str:
        """The figures as tables, beside the pictures that `save` draws."""
        lines = [f"# {self.model}", "", f"Angular distance on {self.tokens}.", "", "![](angular_distance.png)", ""]
        lines += ["| block size n | best start l | layers | distance |", "|---|---|---|---|"]
        for n, start in enumerate(self.best, start=1):
            layers = f"{start}" if n == 1 else f"{start} to {start + n - 1}"
            lines.append(f"| {n} | {start} | {layers} | {self.distances[n - 1][start]:.4f} |")
        if self.importance is not None:
            lines += ["", "![](importance.png)", "", "Scores: `importance.safetensors`, for `Minitron(scores=...)`."]
        lines += self._shape_lines() if self.shapes else []
        if self.lens is not None:
            lines += ["", f"On {self.tokens}, {self.lens.summary()}.", "", "![](lens.png)", ""]
            lines += self.lens.to_markdown().splitlines()
        if self.dense_perplexity is None:
            return "\n".join(lines) + "\n"
        lines += ["", f"Perplexity on {self.text}; layers chosen by `{self.metric}`.", "", "![](perplexity.png)", ""]
        lines += ["| layers dropped | which | perplexity | healed |", "|---|---|---|---|"]
        lines.append(f"| 0 | | {self.dense_perplexity:.4g} | |")
        for row in self.curve:
            healed = "" if row["perplexity_healed"] is None else f"{row['perplexity_healed']:.4g}"
            layers = ", ".join(map(str, row["layers"]))
            lines.append(f"| {row['dropped']} | {layers} | {row['perplexity']:.4g} | {healed} |")
        if self.heal is not None:
            lines += ["", f"Healed by `{json.dumps(self.heal)}`."]
        return "\n".join(lines) + "\n"

    def _shape_lines(self) -> list[str]:
        names = [name for name in self.shapes[0] if name not in ("perplexity", "perplexity_healed")]
        rows = [[f"{row[name]:,}" for name in names] for row in self.shapes]
        for row, texts in zip(self.shapes, rows, strict=True):
            healed = row["perplexity_healed"]
            texts += [f"{row['perplexity']:.4g}", "" if healed is None else f"{healed:.4g}"]
        header = [*names, "perplexity", "healed"]
        tables = [header, ["---"] * len(header), *rows]
        sizes = " ".join(f"{name}={self.shapes[0][name]}" for name in names if name not in ("rank", "parameters"))
        asked = {name: value for name, value in (self.search or {}).items() if value is not None}
        return [
            "",
            f"Shapes found by `{json.dumps(asked)}`, perplexity on held-out samples of {self.tokens}.",
            "",
            "![](shapes.png)",
            "",
            *(f"| {' | '.join(texts)} |" for texts in tables),
            "",
            f"To take one, name its sizes; the best: `--step minitron {sizes}`.",
        ]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the pictures, `inspection.json` and `inspection.md` to a folder, all or nothing.

        `angular_distance.png` is always drawn, `perplexity.png` if there was a text; `importance.png` and
        `importance.safetensors` if widths were asked for, `shapes.png` if shapes were, `lens.png` and `lens.csv` if
        the lens was.

        Raises:
            FileExistsError: the folder has something in it and `overwrite` is not set.
            ImportError: matplotlib is missing.
        """
        check_matplotlib()
        out = check_target(folder, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        try:
            title = f"{self.model}: angular distance of blocks of layers\n{self.tokens}"
            draw_distances(self.distances, self.best, title, partial / "angular_distance.png")
            if self.dense_perplexity is not None:
                draw_perplexity(self, partial / "perplexity.png")
            if self.importance is not None:
                draw_importance(
                    self.importance, f"{self.model}: importance\n{self.tokens}", partial / "importance.png"
                )
                self.importance.save(partial / "importance.safetensors")
            if self.shapes:
                draw_shapes(self.shapes, f"{self.model}: shapes of about the same size", partial / "shapes.png")
            if self.lens is not None:
                title = f"{self.model}: what each layer predicts\n{self.tokens}"
                draw_lens(self.lens, title, partial / "lens.png")
                (partial / "lens.csv").write_text(self.lens.to_csv(), encoding="utf-8")
            data = json.dumps(self.to_dict(), indent=2) + "\n"
            (partial / "inspection.json").write_text(data, encoding="utf-8")
            (partial / "inspection.md").write_text(self.to_markdown(), encoding="utf-8")
            take_place(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return out


def inspect(
    model,
    tokens: Tensor,
    *,
    drops: Sequence[int] = (1, 2, 3, 5, 8),
    metric: str = "angular",
    heal: Step | None = None,
    text_ids: Tensor | None = None,
    window: int = 1024,
    max_windows: int | None = None,
    heal_tokens: Tensor | None = None,
    widths: bool = False,
    layer_losses: Sequence[int] = (),
    shapes: Minitron | None = None,
    lens: bool = False,
    journal: str | Path | None = None,
    tokens_from: str = "",
    text_from: str = "",
) -> Inspection:
    """Measure the angular distances of `model`, and the perplexity it has without some of its layers.

    Args:
        model: a causal language model of Transformers; its weights, modules and mode are as before in the end.
        tokens: int64 (samples, length), what the distances are measured on.
        drops: numbers of layers to drop, for the curve; used only with `text_ids`.
        metric: by which those layers are chosen; see `Depth`.
        heal: a `Heal` step, to measure each cut again once healed, on `heal_tokens` or else on `tokens`.
        text_ids: int64 (tokens,), the text of the perplexity; `None` measures distances only.
        window, max_windows: of the perplexity; a window is at most as long as the text and the model's own limit.
        widths: also score neurons, heads, channels and layers, on `tokens`.
        layer_losses: with `widths`, numbers of neighbouring layers that are left out to see how the loss grows.
        shapes: a `Minitron` step, with `params` or `ratio`, to rank the shapes it finds, on `tokens`.
        lens: also let each layer predict by itself, on `tokens`.
        journal: folder for what a killed ranking goes on from; the caller removes it.
        tokens_from, text_from: where tokens and text come from, for titles.

    Raises:
        ValueError: more layers to drop than the model can lose, healing without a text, or tokens that are not a
            matrix.
    """
    count = len(decoder_layers(model)[1])
    wrong = [n for n in (*layer_losses, *(drops if text_ids is not None else ())) if not 1 <= n < count]
    if wrong:
        raise ValueError(f"cannot drop {wrong} of the {count} layers of this model; drop between 1 and {count - 1}")
    if text_ids is None and heal is not None:
        raise ValueError("healing is shown by the perplexity, which needs a text; pass text_ids")
    if layer_losses and not widths:
        raise ValueError("losses without layers are kept with the scores of the widths; pass widths=True")
    if shapes is not None:
        shapes.shapes(model)  # what cannot be is refused before anything is measured
    found: dict[str, Any] = {}
    with evaluating(model):
        if lens:
            found["lens"] = predictions(model, tokens)
        distances, best = distance_rows(angular_distances(last_token_states(model, tokens)).tolist())
        if text_ids is not None:
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or window
            length = min(window, limit, text_ids.numel())
            windows = min(text_ids.numel() // length, max_windows or text_ids.numel())
            found["text"] = _from(f"{windows:,} windows of {length:,} tokens", text_from)
            found["dense_perplexity"] = perplexity(model, text_ids, length, max_windows)
            heal_tokens = tokens if heal_tokens is None else heal_tokens
            found["curve"] = tuple(
                _row(
                    model, tokens, depth, heal, heal_tokens, lambda cut: perplexity(cut, text_ids, length, max_windows)
                )
                for depth in _cuts(model, tokens, drops, metric, best)
            )
        if widths:
            found["importance"] = importance(model, tokens)
        if layer_losses:
            losses = loss_increase(model, tokens, layer_losses)
            found["importance"] = dataclasses.replace(found["importance"], loss_increase=losses)
        if shapes is not None:
            with torch.no_grad():
                found["shapes"] = tuple(shapes.ranking(model, tokens, journal=journal))
            found["search"] = shapes.to_dict()
    return Inspection(
        model=_name(model),
        tokens=_from(f"{tokens.shape[0]:,} samples of {tokens.shape[1]:,} tokens", tokens_from),
        distances=distances,
        best=best,
        metric=metric,
        heal=None if heal is None else heal.to_dict(),
        **found,
    )


def _cuts(model, tokens: Tensor, drops: Sequence[int], metric: str, best: Sequence[int]) -> list[Depth]:
    """The step for each number of layers, with the layers written out where what is known already tells them."""
    if metric == "angular":
        return [Depth(layers=tuple(range(best[n - 1], best[n - 1] + n))) for n in drops]
    if metric == "perplexity":  # greedy: fewer layers are the first of more
        order, _ = greedy_order(model, tokens, max(drops), range(len(best) + 1))
        return [Depth(layers=tuple(order[:n])) for n in drops]
    return [Depth(drop=n, metric=metric) for n in drops]


def _row(
    model, tokens: Tensor, depth: Depth, heal: Step | None, heal_tokens: Tensor, measure: Callable
) -> dict[str, Any]:
    """One row of the curve: a copy of `model` without some of its layers, measured, healed, and measured again."""
    cut = shared_copy(model)
    with torch.no_grad(), own_flags(model):  # a step may freeze tensors that the copy shares with `model`
        layers = depth.resolve(cut).apply(cut, tokens).step["layers"]
        row = {"dropped": len(layers), "layers": layers, "perplexity": measure(cut), "perplexity_healed": None}
        if heal is not None:
            heal.resolve(cut).apply(cut, heal_tokens, teacher=model)
            row["perplexity_healed"] = measure(cut)
    return row


def _from(what: str, source: str) -> str:
    return f"{what} of {source}" if source else what


def _name(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name
