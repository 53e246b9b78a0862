"""What a run did, in figures: the table that every recipe ends with.

A `Report` is plain data: for each step its seconds and one row per layer, the bytes before and after, the evaluation
before and after, and remarks that keep the reader from over-reading the figures ("embeddings stay dense"). It prints
as a table, and `save` writes it as JSON (everything), CSV (one line per layer) or Markdown (the printed tables).

This module imports neither torch nor transformers, so that a report can be read anywhere.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


PLAIN_WIDTH = 160
UNBOUNDED_WIDTH = 10_000


@dataclass
class Report:
    """The outcome of a recipe on one model.

    Args:
        model: name of the model; the path of a local folder is cut down to the folder's name.
        steps: one entry per step, each with `step` (the step's own dict), `seconds` and `layers`
            (rows with `name`, `shape`, `bits_per_weight` and the error the method measures).
        sizes: `{"before": bytes, "after": bytes}` of the weights, where known.
        evaluation: `{"before": ..., "after": ...}`, what `evaluate()` returned, where it ran.
        notes: remarks to print under the tables.
    """

    model: str = ""
    steps: list = field(default_factory=list)
    sizes: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        if Path(self.model).is_absolute() or Path(self.model).is_dir():
            self.model = Path(self.model).name

    def note(self, remark: str) -> None:
        """Add a remark once."""
        if remark not in self.notes:
            self.notes.append(remark)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "model": self.model,
            "steps": [as_dict(step) for step in self.steps],
            "sizes": dict(self.sizes),
            "evaluation": {when: as_dict(result) for when, result in self.evaluation.items() if result is not None},
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=_json_type) + "\n"

    def to_csv(self) -> str:
        """One line per touched layer, with the step's number and name in front."""
        rows = [
            {"step": f"{number}:{_step_name(step)}", **row, "shape": _shape(row.get("shape"))}
            for number, step in enumerate(map(as_dict, self.steps))
            for row in step.get("layers", [])
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """The printed tables as Markdown."""
        return _plain(self._parts(box.MARKDOWN), UNBOUNDED_WIDTH)

    def save(self, path: str | Path) -> Path:
        """Write the report to `path`; the suffix chooses the form.

        Raises:
            ValueError: the suffix is not `.json`, `.csv` or `.md`.
        """
        path = Path(path)
        writers = {".json": self.to_json, ".csv": self.to_csv, ".md": self.to_markdown}
        writer = writers.get(path.suffix.lower())
        if writer is None:
            raise ValueError(f"A report cannot be written to {path.name!r}: end the name in {', '.join(writers)}.")
        path.write_text(writer(), encoding="utf-8")
        return path

    def show(self, console: Console | None = None) -> None:
        """Print the report: a drawn table on a terminal, plain Markdown elsewhere."""
        show(self._parts, console)

    def __str__(self) -> str:
        return _plain(self._parts(box.MARKDOWN), PLAIN_WIDTH)

    def _parts(self, style: box.Box) -> list:
        parts: list = [f"optimum-slim report: {self.model or 'model'}", ""]
        if self.steps:
            parts += [_steps_table([as_dict(step) for step in self.steps], style), ""]
        rows = _size_rows(self.sizes) + compare(self.evaluation.get("before"), self.evaluation.get("after"))
        if rows:
            table = Table("", "before", "after", "after / before", box=style)
            for row in rows:
                table.add_row(*row)
            parts += [table, ""]
        return parts + [f"- {remark}" for remark in self.notes]


def compare(before, after) -> list[tuple[str, str, str, str]]:
    """Rows (label, before, after, after / before) of two evaluations; either may be None.

    Example:
        >>> compare({"perplexity": 20.0}, {"perplexity": 30.0})
        [('perplexity', '20', '30', '1.50x')]
    """
    before, after = as_dict(before or {}), as_dict(after or {})
    window = (after or before).get("window")
    labels = {
        "perplexity": f"perplexity (window {window})" if window else "perplexity",
        "parameters": "parameters",
        "bytes_on_disk": "weight files",
        "stored_bits_per_weight": "stored bits per weight, all",
        "stored_bits_packed": "stored bits per weight, packed layers",
        "peak_memory": "peak memory",
        "prefill_tokens_per_second": "prefill tokens/s",
        "decode_tokens_per_second": "decode tokens/s",
    }
    rows = [
        _row(label, before.get(name), after.get(name), size=name in ("bytes_on_disk", "peak_memory"))
        for name, label in labels.items()
        if before.get(name) is not None or after.get(name) is not None
    ]
    tasks = dict.fromkeys([*before.get("tasks", {}), *after.get("tasks", {})])
    return rows + [_row(name, before.get("tasks", {}).get(name), after.get("tasks", {}).get(name)) for name in tasks]


def show(parts: Callable[[box.Box], list], console: Console | None = None) -> None:
    """Print the tables and lines that `parts` makes in a box style: drawn on a terminal, Markdown elsewhere."""
    console = console or Console()
    if console.is_terminal:
        for part in parts(box.ROUNDED):
            console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)
    else:
        console.file.write(_plain(parts(box.MARKDOWN), PLAIN_WIDTH))


def _plain(parts: list, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)
    return "\n".join(line.strip() for line in console.file.getvalue().splitlines()).strip() + "\n"


def megabytes(count: float) -> str:
    """Bytes in MB (millions), three significant digits and more."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def as_dict(value) -> dict[str, Any]:
    """A dict of a dataclass, of anything with `to_dict`, or of a mapping."""
    if isinstance(value, Mapping):
        return {key: as_dict(item) if dataclasses.is_dataclass(item) else item for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return dataclasses.asdict(value)


def _size_rows(sizes: Mapping) -> list[tuple[str, str, str, str]]:
    return [_row("weights", sizes.get("before"), sizes.get("after"), size=True)] if sizes else []


def _row(label: str, before, after, *, size: bool = False) -> tuple[str, str, str, str]:
    ratio = f"{after / before:.2f}x" if before and after else ""
    return label, _number(before, size), _number(after, size), ratio


def _number(value, size: bool) -> str:
    if value is None:
        return ""
    if size:
        return megabytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _steps_table(steps: Sequence[Mapping], style: box.Box) -> Table:
    heads = ("step", "seconds", "layers", "weights", "bits per weight", "relative error, mean", "worst layer")
    table = Table(*heads, box=style)
    for step in steps:
        layers = step.get("layers", [])
        weights = [_product(row.get("shape", ())) for row in layers]
        rated = [(row.get("bits_per_weight"), count) for row, count in zip(layers, weights, strict=True)]
        rated = [(bits, count) for bits, count in rated if bits]
        total = sum(count for _, count in rated)
        bits = f"{sum(bits * count for bits, count in rated) / total:.3f}" if total else ""
        errors = [(row["relative_error"], row.get("name", "")) for row in layers if "relative_error" in row]
        mean = f"{sum(error for error, _ in errors) / len(errors):.4g}" if errors else ""
        worst = "{1} ({0:.4g})".format(*max(errors)) if errors else ""
        seconds = f"{step.get('seconds', 0.0):.1f}"
        table.add_row(_step_name(step), seconds, str(len(layers)), f"{sum(weights):,}", bits, mean, worst)
    return table


def _step_name(step: Mapping) -> str:
    described = step.get("step", "step")
    return str(described.get("step", "step")) if isinstance(described, Mapping) else str(described)


def _shape(shape) -> str:
    return "x".join(str(size) for size in shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ""


def _product(shape) -> int:
    count = 1
    for size in shape:
        count *= int(size)
    return count if len(shape) else 0


def _json_type(value):
    """JSON form of what methods put into rows: paths, tuples of sizes, zero-dimensional tensors."""
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "__iter__"):
        return list(value)
    return str(value)
