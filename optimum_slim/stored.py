"""Bytes and bits counted from the files, not from what a format promises.

A safetensors file starts with 8 bytes (little-endian length of the header) and a JSON header that names each tensor
with its dtype, shape and byte range. Reading the headers is enough to count what is stored; no tensor is loaded.

A linear layer counts as packed when its `weight` is uint8 and a `weight_scale` or `weight_values` lies beside it. Its
stored bits are those of `weight` and of every `weight_*` companion (scales, offsets, values); its weights are
out_features * in_features.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path


WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin")


@dataclass(frozen=True)
class StoredBits:
    """What the safetensors files of a model hold.

    Args:
        packed_bytes: bytes of the packed linear layers' `weight` and `weight_*` tensors.
        packed_weights: weights those layers stand for.
        dense_bytes: bytes of all other tensors (embeddings, norms, biases, layers left dense).
        dense_weights: their number of elements.
    """

    packed_bytes: int
    packed_weights: int
    dense_bytes: int
    dense_weights: int

    @property
    def packed(self) -> float | None:
        """Stored bits per weight of the packed layers, `None` if there are none."""
        return 8 * self.packed_bytes / self.packed_weights if self.packed_weights else None

    @property
    def overall(self) -> float:
        """Stored bits per weight of the whole model."""
        return 8 * (self.packed_bytes + self.dense_bytes) / (self.packed_weights + self.dense_weights)


def stored_bits(path: str | Path) -> StoredBits:
    """Count the stored bits of the safetensors model in folder `path` (or of one file).

    The number of output rows comes from the scale, (out_features, groups), or from the bias; a layer with one scale
    and no bias is taken to have 4 rows for each packed row, at most 3 too many. A sparse layer's columns come from its
    index, rounded up to whole bytes of it.

    Raises:
        FileNotFoundError: no safetensors file there.
        ValueError: a file is too short for its header or for the tensors that its header names.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {path}; stored bits are counted from safetensors headers")
    tensors = {name: entry for file in files for name, entry in read_header(file).items()}
    packed_bytes = packed_weights = dense_bytes = dense_weights = 0
    packed = {name.removesuffix("weight") for name in tensors if _is_packed(name, tensors)}
    per_byte = _columns_per_index_byte(files[0].parent)
    for name, entry in tensors.items():
        begin, end = entry["data_offsets"]
        prefix, _, leaf = name.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if prefix in packed and (leaf == "weight" or leaf.startswith("weight_")):
            packed_bytes += end - begin
            if leaf == "weight":
                packed_weights += _weights(prefix, tensors, per_byte)
        else:
            dense_bytes += end - begin
            dense_weights += _count(entry["shape"])
    return StoredBits(packed_bytes, packed_weights, dense_bytes, dense_weights)


def read_header(file: str | Path) -> dict[str, dict]:
    """The header of one safetensors file: name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        ValueError: the file ends before its header or before its last tensor.
    """
    file = Path(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file.name} is truncated: {size} bytes, too few for its header; copy the file again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed > size:
        raise ValueError(f"{file.name} is truncated: {size} bytes where its header asks for {needed}; copy it again")
    return header


def bytes_on_disk(path: str | Path) -> int:
    """Bytes of the weight files in folder `path`: safetensors, else GGUF, else PyTorch files.

    Raises:
        FileNotFoundError: no weight file there.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    for pattern in WEIGHT_FILES:
        files = list(path.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    raise FileNotFoundError(f"no weight file ({', '.join(WEIGHT_FILES)}) in {path}")


def _is_packed(name: str, tensors: dict) -> bool:
    return (
        name.rpartition(".")[2] == "weight"
        and tensors[name]["dtype"] == "U8"
        and any(f"{name}_{companion}" in tensors for companion in ("scale", "values", "out"))
    )


def _weights(prefix: str, tensors: dict, per_byte: int) -> int:
    """How many weights a packed layer stands for; without scales for its columns, bits that fill up bytes count."""
    rows, *_, width = tensors[f"{prefix}weight"]["shape"]
    if f"{prefix}weight_values" in tensors:
        return rows * width * per_byte
    for kind, columns in {"weight_salient": "weight_columns", "weight_out": "weight_in"}.items():
        if f"{prefix}{kind}" in tensors:
            scaled = tensors.get(f"{prefix}{columns}")
            return rows * (scaled["shape"][-1] if scaled else 8 * width)
    return _out_features(prefix, tensors) * width


def _columns_per_index_byte(folder: Path) -> int:
    """Columns that a byte of a sparse layer's index stands for: 16 where the recorded recipe keeps 1 of 4, else 8."""
    config = folder / "config.json"
    recipe = json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {}) if config.is_file() else {}
    return 16 if any(step.get("sparsity") == "1:4" for step in recipe.get("steps", ())) else 8


def _out_features(prefix: str, tensors: dict) -> int:
    scale = tensors[f"{prefix}weight_scale"]["shape"]
    bias = tensors.get(f"{prefix}bias")
    if len(scale) == 2:
        return scale[0]
    return bias["shape"][0] if bias else 4 * tensors[f"{prefix}weight"]["shape"][0]


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
