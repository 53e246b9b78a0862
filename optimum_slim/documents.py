"""Reading calibration text: documents of a list, a local file or a dataset of the Hub, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


COLUMN_FILES = (".jsonl", ".json", ".parquet")
TEXT_FILES = (".txt", ".raw", ".md")
PIECE = 1 << 18  # characters of a plain text file read at once


def read_documents(
    source: str | list[str], *, subset: str | None = None, split: str = "train", text_column: str = "text"
) -> Iterator[str]:
    """Yield text to be tokenized and joined; every document ends with an empty line.

    Args:
        source: A list of strings, a file (`.jsonl`, `.json`, `.parquet`, anything else as plain text), or the id of a
            dataset on the Hub, which is streamed.
        subset: Configuration name of a dataset.
        split: Split of a dataset.
        text_column: The column that holds the text.

    Raises:
        FileNotFoundError: `source` looks like a file and does not exist.
        ValueError: the file is empty or malformed, the column is missing, or the dataset cannot be loaded.
        ImportError: a package of the `data` extra is missing.
    """
    if not isinstance(source, str):
        return _documents(source, "the texts given", text_column)
    path = Path(source).expanduser()
    if not path.is_file():
        if path.suffix in COLUMN_FILES + TEXT_FILES:
            raise FileNotFoundError(
                f"Calibration file {source} does not exist. Pass an existing file or a dataset id."
            )
        return _documents(_dataset(source, subset, split), source, text_column)
    if path.stat().st_size == 0:
        raise ValueError(f"Calibration file {source} is empty. Pass a file that holds text.")
    match path.suffix:
        case ".jsonl":
            return _documents(_json_lines(path), source, text_column)
        case ".json":
            return _documents(_json_list(path), source, text_column)
        case ".parquet":
            return _documents(_parquet(path, text_column), source, text_column)
    return _plain(path)


def _documents(rows: Iterable[Any], source: str, text_column: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            if text_column not in row:
                raise ValueError(
                    f"Row {number} of {source} has no column {text_column!r}; it has {', '.join(row) or 'none'}. "
                    "Pass Calibration(text_column=...)."
                )
            row = row[text_column]
        if not isinstance(row, str):
            raise ValueError(f"Row {number} of {source} holds {type(row).__name__}, expected text.")
        if row.strip():
            yield row.rstrip("\n") + "\n\n"


def _plain(path: Path) -> Iterator[str]:
    """The file as it is, in pieces that end at a line's end."""
    with path.open(encoding="utf-8") as file, _utf8(path):
        while piece := file.read(PIECE):
            yield piece + file.readline()


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file, _utf8(path):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not JSON ({error}). Pass one object a line.") from error


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"Calibration file {path} is not UTF-8 text ({error}). Convert it to UTF-8.") from error


def _json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Pass a list of strings or of objects.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}, expected a list of strings or of objects.")
    return rows


def _parquet(path: Path, text_column: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Reading {path} needs pyarrow: pip install optimum-slim[data]") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error}).") from error
    with file:
        columns = [text_column] if text_column in file.schema_arrow.names else None
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            yield from batch.to_pylist()


def _dataset(source: str, subset: str | None, split: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Calibrating on the dataset {source!r} needs the datasets library: pip install optimum-slim[data]"
        ) from error
    try:
        return datasets.load_dataset(source, name=subset, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Calibration source {source!r} is neither a file nor a dataset that could be loaded "
            f"(subset={subset!r}, split={split!r}): {error}"
        ) from error
