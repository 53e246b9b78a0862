"""The tokens a calibrated step looks at.

A calibrated step measures what flows through the model's layers, so it needs text like the text the model will see.
`Calibration` says where that text comes from and how much of it is used; `tokens()` turns it into token ids. Sources:

* `"model"` (default): the model's own samples, as in LLM-QAT (https://arxiv.org/abs/2305.17888). Needs no download, no
  tokenizer and no licence question. The samples are kept in the cache directory.
* a dataset id of the Hugging Face Hub, such as `"Salesforce/wikitext"` with `subset="wikitext-2-raw-v1"`.
* a local file: `.jsonl`, `.json`, `.parquet` (the column is `text_column`), anything else is read as plain text.
* a list of strings, or token ids as an integer tensor or a list of lists.

Text is taken as it is: documents are joined by an empty line, no chat template is applied, and `samples` windows of
`length` tokens are cut at random offsets. A window starts with the beginning-of-text token if the tokenizer adds one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_slim.documents import read_documents
from optimum_slim.sampling import cached_samples


CHOICE = 16  # windows are cut from up to this many times the tokens needed


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Which text a recipe is calibrated on.

    Args:
        source: `"model"`, a dataset id, a file, a list of strings, or token ids (samples, length).
        samples: Number of token sequences. Token ids are used as they are and set it themselves.
        length: Tokens in each. Token ids set it themselves.
        seed: Seed of the sampling or of the windows' offsets.
        temperature: Sampling temperature of `"model"`.
        subset: Configuration name of a dataset.
        split: Split of a dataset.
        text_column: The column of a dataset, JSON or parquet file that holds the text.
    """

    source: Any = "model"
    samples: int = 64
    length: int = 512
    seed: int = 0
    temperature: float = 1.0
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            object.__setattr__(self, "source", str(self.source))
        if _kind(self.source) == "ids":
            ids = _matrix(self.source)
            for name, value in {"source": ids, "samples": ids.shape[0], "length": ids.shape[1]}.items():
                object.__setattr__(self, name, value)
        for name in ("samples", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe settings. Texts and token ids are recorded by count and checksum only."""
        source = self.source
        match _kind(source):
            case "texts":
                digest = hashlib.sha256(json.dumps(list(source)).encode()).hexdigest()
                source = {"kind": "texts", "count": len(source), "sha256": digest}
            case "ids":
                digest = hashlib.sha256(source.numpy().tobytes()).hexdigest()
                source = {"kind": "ids", "count": source.numel(), "sha256": digest}
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"source": source}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        if unknown := settings.keys() - cls.__dataclass_fields__.keys():
            raise ValueError(
                f"Unknown calibration settings: {', '.join(sorted(unknown))}. "
                f"Expected some of {', '.join(cls.__dataclass_fields__)}."
            )
        return cls(**settings)

    def resized(self, samples: int | None = None, length: int | None = None) -> Calibration:
        """The same source with another number of samples or another length; `None` leaves either as it is.

        Raises:
            ValueError: more or longer samples than the token ids given.
        """
        samples, length = samples or self.samples, length or self.length
        if _kind(self.source) != "ids":
            return dataclasses.replace(self, samples=samples, length=length)
        if samples > self.samples or length > self.length:
            raise ValueError(
                f"A step asks for {samples} samples of {length} tokens, and the token ids given are {self.samples} of "
                f"{self.length}. Pass more ids, or leave out samples and length."
            )
        return dataclasses.replace(self, source=self.source[:samples, :length])

    def tokens(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """Get the token ids, int64 (samples, length) on the CPU.

        Args:
            model: The model to calibrate: it is sampled from, or its tokenizer is looked up by its name.
            tokenizer: Needed for text when the model's name does not lead to one.

        Raises:
            ValueError: not enough text, an id outside the vocabulary, an unreadable source.
            FileNotFoundError: the file does not exist.
            ImportError: reading the source needs the `data` extra.
        """
        config = model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and self.length > limit:
            raise ValueError(
                f"Calibration samples of {self.length} tokens are longer than the {limit} positions of this model. "
                f"Pass Calibration(length={limit}) or less."
            )
        match _kind(self.source):
            case "model":
                shape = {"samples": self.samples, "length": self.length}
                return cached_samples(model, tokenizer, **shape, seed=self.seed, temperature=self.temperature)
            case "ids":
                return _in_vocabulary(self.source, model)
            case "record":
                raise ValueError(
                    f"This calibration was run on {self.source['kind']} passed in memory, of which only the checksum "
                    "was kept. Pass the data again: Calibration(source=...)."
                )
        documents = self._documents()
        if tokenizer is None:
            tokenizer = _find_tokenizer(model)
        return _in_vocabulary(self._windows(documents, tokenizer), model)

    def check(self) -> None:
        """Raise what `tokens` would raise about a missing file or dataset, before a model is loaded for it."""
        if _kind(self.source) in ("text", "texts"):
            self._documents()

    def _documents(self) -> Iterator[str]:
        return read_documents(self.source, subset=self.subset, split=self.split, text_column=self.text_column)

    def _windows(self, documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Cut windows out of the source's text at seeded random offsets."""
        start = _start(tokenizer)
        length = self.length - len(start)
        if length < 1:
            raise ValueError("length=1 leaves no room after the beginning-of-text token. Pass a larger length.")
        needed = self.samples * length
        ids = _tokenize(tokenizer, documents, CHOICE * needed)
        if len(ids) < needed:
            where = self.source if isinstance(self.source, str) else f"the {len(self.source)} texts given"
            raise ValueError(
                f"Not enough calibration text in {where}: found {len(ids)} tokens, needed {needed} "
                f"for {self.samples} samples of {self.length}. Pass more text, or fewer samples or a smaller length."
            )
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.randint(len(ids) - length + 1, (self.samples, 1), generator=generator)
        windows = ids[offsets + torch.arange(length)]
        return torch.cat([torch.tensor(start, dtype=torch.int64).expand(self.samples, -1), windows], dim=1)


def _kind(source: Any) -> str:
    """One of model, text (a dataset id or a file), texts, ids, record."""
    if isinstance(source, str):
        return "model" if source == "model" else "text"
    if isinstance(source, Tensor):
        return "ids"
    if isinstance(source, dict) and source.keys() == {"kind", "count", "sha256"}:
        return "record"
    if isinstance(source, list | tuple) and source:
        if all(isinstance(item, str) for item in source):
            return "texts"
        if all(isinstance(item, list | tuple | Tensor) for item in source):
            return "ids"
    raise TypeError(
        f"Cannot calibrate on {type(source).__name__} {str(source)[:60]!r}. Expected 'model', a dataset id, a file, a "
        "non-empty list of strings, an integer tensor (samples, length), or a list of lists of token ids."
    )


def _matrix(source: Tensor | list | tuple) -> Tensor:
    """Token ids as an int64 matrix."""
    if not isinstance(source, Tensor):
        rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in source]
        if len({len(row) for row in rows}) != 1:
            lengths = sorted({len(row) for row in rows})
            raise ValueError(
                f"Token id lists differ in length ({lengths[0]} to {lengths[-1]}). Cut them to one length."
            )
        source = torch.tensor(rows)
    if source.dtype.is_floating_point or source.dtype.is_complex or source.dtype == torch.bool:
        raise TypeError(f"Token ids must be integers, got a tensor of {source.dtype}. Pass ids.to(torch.int64).")
    if source.dim() != 2 or source.numel() == 0:
        raise ValueError(f"Token ids must be a non-empty matrix (samples, length), got shape {tuple(source.shape)}.")
    return source.detach().to("cpu", torch.int64).contiguous()


def _in_vocabulary(ids: Tensor, model: PreTrainedModel) -> Tensor:
    size = model.get_input_embeddings().weight.shape[0]
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= size:
        raise ValueError(
            f"Calibration token ids range from {low} to {high}, but the model's vocabulary has ids 0 to {size - 1}. "
            "Pass the tokenizer, or the ids, that belong to this model."
        )
    return ids


def _find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = model.name_or_path
    error = None
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as caught:
            error = caught
    raise ValueError(
        f"Calibration on text needs a tokenizer, and none was found for the model {name!r}. Pass tokenizer=..., or "
        "calibrate on the model's own samples with Calibration(source='model')."
    ) from error


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text: nothing or the beginning-of-text token."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _tokenize(tokenizer: PreTrainedTokenizerBase, documents: Iterator[str], enough: int) -> Tensor:
    """Token ids of the documents one after the other, stopping once there are enough."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.int64)
