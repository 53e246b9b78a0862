"""The pictures of an inspection. Matplotlib is imported when one is drawn, and no global state of it is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor

    from .importance import Importance
    from .inspection import Inspection
    from .lens import Lens

Rows = Sequence[Sequence[float]]

COLOURS = ("#0072B2", "#D55E00", "#595959")  # blue and vermilion of the Okabe-Ito set, grey
INSTALL = 'drawing needs matplotlib, which is missing. Install it with: pip install "optimum-slim[plot]"'


def check_matplotlib() -> None:
    """Raise an `ImportError` with the line that installs matplotlib, if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(INSTALL) from error


def draw_distances(distances: Rows, best: Sequence[int], title: str, file: str | Path) -> None:
    """The heat map of the paper's Figure 4: block size against first layer, each row rescaled to span [0, 1].

    A bar chart beside it tells the distances that the rescaling hides: the least of each row.

    Args:
        distances, best: as in an `Inspection`.
        title: over the picture.
    """
    import numpy as np

    layers = len(distances)
    picture = np.full((layers - 1, layers), np.nan)
    for n, row in enumerate(distances[:-1], start=1):
        low, span = min(row), max(row) - min(row)
        picture[n - 1, : len(row)] = [(value - low) / span if span else 0.0 for value in row]
    size = min(max(4.0, 2.0 + 0.17 * layers), 9.0)
    figure = _figure(size + 2.6, size)
    map_axes, bar_axes = figure.subplots(1, 2, sharey=True, width_ratios=[size - 1, 1.7])
    image = map_axes.imshow(
        picture,
        cmap="viridis_r",
        vmin=0,
        vmax=1,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, layers - 0.5, 0.5, layers - 0.5),
    )
    numbers = range(1, layers)
    marker = min(max(240 / layers, 4), 7)
    (mark,) = map_axes.plot(
        best,
        numbers,
        "o",
        color=COLOURS[1],
        markersize=marker,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linestyle="none",
    )
    map_axes.set_xlabel("first layer of the block, l")
    map_axes.set_ylabel("block size n (layers)")
    map_axes.legend(
        [mark],
        ["least distance that keeps the last layer, l*(n)"],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        fontsize=8,
    )
    _integers(map_axes.xaxis, map_axes.yaxis)
    bar = figure.colorbar(image, ax=map_axes, location="bottom", fraction=0.05, aspect=40)
    bar.set_label("angular distance, each row rescaled: 0 = its least, 1 = its greatest", fontsize=9)
    least = [distances[n - 1][start] for n, start in zip(numbers, best, strict=True)]
    bar_axes.barh(numbers, least, height=0.8, color=COLOURS[0])
    bar_axes.set_xlabel("distance\nat l*(n)")
    bar_axes.set_xlim(left=0)
    bar_axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)


def draw_perplexity(inspection: Inspection, file: str | Path) -> None:
    """Perplexity, on a logarithmic axis, against the number of layers dropped, and the dense model as a line."""
    figure = _figure(7.0, 4.6)
    axes = figure.subplots()
    rows = sorted(inspection.curve, key=lambda row: row["dropped"])
    dropped = [row["dropped"] for row in rows]
    dense = inspection.dense_perplexity
    axes.axhline(dense, color=COLOURS[2], linestyle="--", label=f"dense ({dense:.4g})")
    curves = [("perplexity", "dropped, not healed", "o-", COLOURS[1])]
    if any(row["perplexity_healed"] is not None for row in rows):
        curves.append(("perplexity_healed", "dropped and healed", "s-", COLOURS[0]))
    for key, label, style, colour in curves:
        values = [row[key] if row[key] is not None and math.isfinite(row[key]) else math.nan for row in rows]
        axes.plot(dropped, values, style, color=colour, label=label)
        for x, y in zip(dropped, values, strict=True):
            if math.isfinite(y):
                below = key == "perplexity_healed"
                axes.annotate(
                    _short(y),
                    (x, y),
                    xytext=(0, -13 if below else 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.margins(x=0.08, y=0.15)
    axes.set_xlabel("layers dropped")
    axes.set_ylabel("perplexity (log scale)")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    _integers(axes.xaxis)
    axes.set_title(
        f"{inspection.model}: layers chosen by the metric {inspection.metric}\n{inspection.text}", fontsize=11
    )
    figure.savefig(file)


def draw_importance(scores: Importance, title: str, file: str | Path) -> None:
    """Scores of layers, heads and experts as they are; of neurons and channels, the share that the best ones hold.

    A straight line there says that all matter alike; a curve that rises fast, that a few do and the others can go.
    Below them, if it was measured, how the loss grows without blocks of layers.
    """
    columns = ["layers", "heads"], ["neurons", "channels"]
    if scores.experts is not None:
        columns = ["layers", "heads", "experts"], ["neurons", "channels", "expert_neurons"]
    losses = scores.loss_increase is not None
    figure = _figure(14.4 if scores.experts is not None else 9.0, 10.0 if losses else 7.0)
    panels = figure.subplot_mosaic([*columns, *[["losses"] * len(columns[0])] * losses])
    layers, heads, neurons, channels = (panels[name] for name in ("layers", "heads", "neurons", "channels"))
    if losses:
        _draw_losses(panels["losses"], scores.loss_increase)
    layers.bar(range(len(scores.layers)), scores.layers.tolist(), color=COLOURS[0])
    layers.set_xlabel("layer")
    layers.set_ylabel("block influence (log scale)")
    layers.set_yscale("log")
    _draw_units(heads, scores.heads, "query head")
    _draw_shares(neurons, scores.neurons, "neurons of a layer")
    _draw_shares(channels, None if scores.channels is None else scores.channels[None], "hidden channels")
    drawn = [(heads, scores.heads), (neurons, scores.neurons), (channels, scores.channels)]
    if scores.experts is not None:
        _draw_units(panels["experts"], scores.experts, "expert")
        _draw_shares(panels["expert_neurons"], scores.expert_neurons, "expert neurons")
        drawn.append((panels["expert_neurons"], scores.expert_neurons))
    for axes, found in drawn:
        if found is None:
            axes.text(0.5, 0.5, "no width of its own\nin this model", ha="center", va="center")
            axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)


def _draw_losses(axes, increase: Tensor) -> None:
    """One line for each size of block; the scale is straight between -0.01 and 0.01 and logarithmic beyond."""
    measured = [n for n, row in enumerate(increase.tolist(), start=1) if not math.isnan(row[0])]
    for i, n in enumerate(measured):
        shade = i / max(1, len(measured) - 1)
        row = increase[n - 1, : len(increase) - n + 1].tolist()
        label = "1 layer" if n == 1 else f"{n} layers"
        axes.plot(range(len(row)), row, "o-", markersize=3, color=(shade, 0.35, 1 - shade), label=label)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color=COLOURS[2], linestyle="--", linewidth=0.8)
    axes.set_xlabel("first layer left out")
    axes.set_ylabel("increase of the loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(title="left out", fontsize=8)
    _integers(axes.xaxis)


def draw_lens(found: Lens, title: str, file: str | Path) -> None:
    """By layer, the share of positions that predict the final token, now or for good, and where they do it first."""
    layers = range(1, len(found.first) + 1)
    figure = _figure(10.0, 4.2)
    shares, firsts = figure.subplots(1, 2)
    shares.plot(layers, found.agreement, "o-", markersize=4, color=COLOURS[0], label="it is the final token")
    shares.plot(layers, found.settled, "s-", markersize=4, color=COLOURS[1], label="it stays the final token")
    shares.set_ylim(0, 1.03)
    shares.legend(title="prediction of the layer", fontsize=8)
    firsts.bar(layers, found.first, color=COLOURS[0], label="it is the final token for the first time")
    means = ((found.first_layer, "mean", "--"), (found.settled_layer, "mean layer from which it stays", ":"))
    for mean, label, style in means:
        firsts.axvline(mean, color=COLOURS[2], linestyle=style, label=f"{label} ({mean:.1f})")
    firsts.legend(title="prediction of the layer", fontsize=8)
    for axes in (shares, firsts):
        axes.set_xlabel("behind so many layers")
        axes.set_ylabel("share of the positions")
        axes.grid(alpha=0.3)
        _integers(axes.xaxis)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)


def draw_shapes(rows: Sequence[dict[str, Any]], title: str, file: str | Path) -> None:
    """Perplexity, on a logarithmic axis, of the shapes that were compared, the best on top.

    Args:
        rows: as `Minitron.ranking` gives them.
        title: over the picture.
    """
    figure = _figure(9.0, 1.6 + 0.32 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    curves = [("perplexity", "as it is cut", "o", COLOURS[1], "left")]
    if any(row["perplexity_healed"] is not None for row in rows):
        curves.append(("perplexity_healed", "after a short distillation", "s", COLOURS[0], "right"))
    for key, label, marker, colour, side in curves:
        values = [row[key] if row[key] is not None and math.isfinite(row[key]) else math.nan for row in rows]
        axes.plot(values, places, marker, color=colour, label=label)
        for x, y in zip(values, places, strict=True):
            if math.isfinite(x):
                axes.annotate(
                    _short(x),
                    (x, y),
                    xytext=(6 if side == "left" else -6, 0),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    fontsize=8,
                    color=colour,
                )
    axes.set_yticks(places, [f"{row['rank']}.  {shape_text(row, rows)}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.margins(x=0.12)
    axes.set_xlabel("perplexity (log scale)")
    axes.grid(which="both", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)


def shape_text(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The sizes in which the shapes `rows` differ, and the number of parameters: "hidden 448, layers 28, 85.2M"."""
    short = {"hidden_size": "hidden", "intermediate_size": "neurons", "num_key_value_heads": "kv heads"}
    sizes = [name for name in row if name not in ("rank", "parameters", "perplexity", "perplexity_healed")]
    parts = [
        f"{short.get(name) or name.rpartition('_')[2]} {row[name]:,}"
        for name in sizes
        if len({other[name] for other in rows}) > 1
    ]
    return ", ".join([*parts, f"{_short(row['parameters'] / 1e6)}M"])


def _draw_units(axes, scores, what: str) -> None:
    """A row of squares for each layer, one for each unit."""
    if scores is None:
        return
    shares = scores / scores.sum(1, keepdim=True).clamp(min=1e-30)
    image = axes.imshow(shares.tolist(), cmap="viridis", aspect="auto", interpolation="nearest", origin="lower")
    axes.figure.colorbar(image, ax=axes).set_label("share of the layer's score")
    axes.set_xlabel(what)
    axes.set_ylabel("layer")
    _integers(axes.xaxis, axes.yaxis)


def _draw_shares(axes, scores, what: str) -> None:
    """One curve for each row of scores: of their sum, what the most important ones hold."""
    if scores is None:
        return
    sums = scores.flatten(1).sort(dim=1, descending=True).values.cumsum(1)
    for i, row in enumerate(sums / sums[:, -1:].clamp(min=1e-30)):
        if not row[-1]:  # a layer without such units
            continue
        shade = i / max(1, len(sums) - 1)
        part = [(k + 1) / len(row) for k in range(len(row))]
        axes.plot(part, row.tolist(), color=(shade, 0.35, 1 - shade), linewidth=0.8)
    if len(sums) > 1:
        axes.text(0.97, 0.05, "blue: first layer, red: last", transform=axes.transAxes, ha="right", fontsize=8)
    axes.plot([0, 1], [0, 1], color=COLOURS[2], linestyle="--", linewidth=0.8)
    axes.set_xlabel(f"share of the {what}, most important first")
    axes.set_ylabel("share of the score")
    axes.grid(alpha=0.3)


def _plain_numbers(axis) -> None:
    """132 beside a logarithmic axis, where the default is 1.32 x 10^2."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _integers(*axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))
