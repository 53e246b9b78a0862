"""The tensors of a safetensors checkpoint, read one at a time with plain file reads.

Transformers and safetensors map the files into memory. That is convenient, but every page that was touched stays in
the process's resident memory for as long as one tensor of the file is alive. Whoever wants a memory limit to mean
something reads the bytes into tensors of its own:

    files = WeightFiles.find("path/or/hub-id")
    weight = files.read("model.layers.0.self_attn.q_proj.weight", torch.bfloat16)
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .stored import read_header


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PROBES = 64  # places of each tensor that go into the digest of a checkpoint
PROBE_BYTES = 256  # read at each of them; tensors of up to 16 KiB are digested whole


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, the position and number of its bytes, its shape and safetensors dtype."""

    file: Path
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The tensors in some safetensors files, by name.

    Args:
        files: paths of the files.

    Raises:
        ValueError: a file is truncated.
    """

    def __init__(self, files: list[str | Path]):
        self.files = [Path(file) for file in files]
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            header = read_header(file)
            with file.open("rb") as stream:
                data = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                place = StoredTensor(file, data + start, end - start, tuple(entry["shape"]), entry["dtype"])
                self.tensors[name] = place

    @classmethod
    def find(cls, model: str | Path) -> "WeightFiles | None":
        """The safetensors files of a local folder or (downloaded) of a Hub id, `None` if it has none."""
        if (single := _file(model, SAFE_WEIGHTS_NAME)) is not None:
            return cls([single])
        if (index := _file(model, SAFE_WEIGHTS_INDEX_NAME)) is None:
            return None
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [_file(model, name) for name in names]
        if None in files:
            raise FileNotFoundError(f"{model} lacks {names[files.index(None)]}, which its index names; copy it again")
        return cls(files)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in memory of its own, converted to `dtype` if given."""
        place = self.tensors[name]
        tensor = torch.empty(place.shape, dtype=DTYPES[place.dtype])
        with place.file.open("rb", buffering=0) as file:
            read_into(file, place.start, tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def digest(self) -> str:
        """SHA-256 of all headers and of some bytes of every tensor, whatever the files are called."""
        total = hashlib.sha256()
        for name, place in sorted(self.tensors.items()):
            total.update(f"{name} {place.shape} {place.dtype}".encode())
            step = max(PROBE_BYTES, place.size // PROBES)
            with place.file.open("rb", buffering=0) as file:
                for offset in range(0, place.size, step):
                    file.seek(place.start + offset)
                    total.update(file.read(min(PROBE_BYTES, place.size - offset)))
        return total.hexdigest()


def read_into(file, start: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of an unbuffered file from position `start` on.

    Raises:
        OSError: the file ends before the tensor is full.
    """
    left = memoryview(_bytes(tensor))
    file.seek(start)
    while left:
        count = file.readinto(left)
        if not count:
            raise OSError(f"{file.name} ends {len(left)} bytes before its tensor does; copy the file again")
        left = left[count:]


def write_from(file, start: int, tensor: Tensor) -> None:
    """Write the bytes of a tensor to an unbuffered file from position `start` on."""
    left = memoryview(_bytes(tensor.contiguous()))
    file.seek(start)
    while left:
        left = left[file.write(left) :]


def _bytes(tensor: Tensor):
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _file(model: str | Path, name: str) -> str | None:
    if os.path.isdir(model):
        path = Path(model) / name
        return str(path) if path.is_file() else None
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)
