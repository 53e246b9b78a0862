"""The files of a teacher cache (`teacher_cache.py`): safetensors shards of a bounded size, written piece by piece.

    shard-00000.safetensors    figures    fp32    (samples, 3)                  means over a sample's positions
                               ids        uint16  (samples, length - 1, k)      or int32, of a larger vocabulary
                               log_probs  fp16    (samples, length - 1, k + 1)  of `ids`, and of all other tokens
                               digests    uint8   (samples, 16)                 BLAKE2b of each sample's tokens

All sizes are known beforehand, so a shard is never in memory: the header comes first, and what a micro-batch gives
goes to its places in the file, which gets its name when it is whole. The header also bears the digest of the cache, so
that no shard passes for one of another.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .journal import put_in_place
from .weights import write_from


SHARD_BYTES = 64 * 2**20
DIGEST_BYTES = 16
FIGURES = ("outside", "hidden", "entropy")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.uint16: "U16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Layout:
    """How a cache is cut into shards: `per_shard` samples in each, by default what `SHARD_BYTES` have room for."""

    samples: int
    length: int
    vocabulary: int
    top_k: int
    per_shard: int = 0

    def __post_init__(self):
        if not self.per_shard:
            object.__setattr__(self, "per_shard", max(1, SHARD_BYTES // self.bytes(1)))

    def tensors(self, count: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of what a shard of `count` samples holds, in the order of the file."""
        ids = torch.uint16 if self.vocabulary <= 2**16 else torch.int32
        return {
            "figures": (torch.float32, [count, len(FIGURES)]),
            "ids": (ids, [count, self.length - 1, self.top_k]),
            "log_probs": (torch.float16, [count, self.length - 1, self.top_k + 1]),
            "digests": (torch.uint8, [count, DIGEST_BYTES]),
        }

    def bytes(self, count: int) -> int:
        """Of a shard of `count` samples, without its header."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.tensors(count).values())

    def shards(self, folder: Path) -> list[tuple[Path, int, int]]:
        """The file of each shard, its first sample, and the first of the next."""
        firsts = range(0, self.samples, self.per_shard)
        return [
            (folder / f"shard-{number:05}.safetensors", first, min(first + self.per_shard, self.samples))
            for number, first in enumerate(firsts)
        ]


def open_shard(path: Path, layout: Layout, count: int, digest: str):
    """What `safe_open` gives for a shard of `count` samples; `None` if it is missing, damaged or of another cache."""
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError):
        return None
    wanted = {name: shape for name, (_, shape) in layout.tensors(count).items()}
    found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return file if found == wanted and (file.metadata() or {}).get("cache") == digest else None


class ShardWriter:
    """A shard of `count` samples, under another name inside a `with` block, gone after an error.

    Args:
        path: its name in the end.
        layout, count: say what is in it.
        digest: of the cache.
    """

    def __init__(self, path: Path, layout: Layout, count: int, digest: str):
        self.path, self.part, self.done, self.places = path, path.with_suffix(".part"), 0, {}
        header, end = {"__metadata__": {"cache": digest}}, 0
        for name, (dtype, shape) in layout.tensors(count).items():
            start, end = end, end + dtype.itemsize * prod(shape)
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            self.places[name] = start, (end - start) // count
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = open(self.part, "wb", buffering=0)  # noqa: SIM115
        self.file.write(len(text).to_bytes(8, "little") + text)

    def add(self, **rows: Tensor) -> None:
        """Write the next samples: the tensors of the shard, with these rows."""
        for name, (start, size) in self.places.items():
            write_from(self.file, self.start + start + self.done * size, rows[name])
        self.done += len(rows["digests"])

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.file.close()
        if kind is None:
            put_in_place(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)
