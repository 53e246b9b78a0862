"""What a long run has done so far, in one file, so that a killed run goes on where it was.

A journal is a folder with the file `fit.pt`: a `torch.save` archive followed by the SHA-256 of its bytes, because
the archive alone does not notice a flipped bit. The file is written under another name, flushed to the disk and
renamed, so that at every moment there is a whole one, the old or the new. It holds a fingerprint of everything that
must be the same for the rest of the run to be the rest of this run, and is read with `weights_only=True`.
"""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


logger = logging.getLogger(__name__)

FILE = "fit.pt"
PROBES = 64  # values of each weight, about, that go into a digest
DIGEST = re.compile("[0-9a-f]{64}")
DAMAGED = (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)


class Journal:
    """The journal in `folder` of a run with the given fingerprint.

    Args:
        folder: made when something is written.
        fingerprint: names and values (numbers, strings, lists of them) that a run must have to go on from the file.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]):
        self.path = Path(folder) / FILE
        self.fingerprint = fingerprint

    def read(self) -> dict[str, Any] | None:
        """The entry written last, or `None` if there is none; a damaged one is set aside with a warning.

        Raises:
            ValueError: the entry belongs to a run with another fingerprint.
        """
        if not self.path.exists():
            return None
        try:
            found = _load(self.path)
            fingerprint, entry = found["fingerprint"], found["entry"]
        except DAMAGED as error:
            aside = self.path.with_suffix(".damaged")
            os.replace(self.path, aside)
            logger.warning("Starting over: the journal %s is damaged (%s); it is kept as %s.", self.path, error, aside)
            return None
        if different := differences(fingerprint, self.fingerprint):
            raise ValueError(
                f"the journal {self.path} belongs to another run: {'; '.join(different)}. Go on with what it was "
                "written for, or remove it (or give another folder) to start over."
            )
        return entry

    def write(self, entry: dict[str, Any]) -> None:
        """Replace the entry in one atomic step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with open(part, "wb") as file:
            hashing = _HashingWriter(file)
            torch.save({"fingerprint": self.fingerprint, "entry": entry}, hashing)
            file.write(hashing.digest.digest())
        put_in_place(part, self.path)

    def remove(self) -> None:
        """Forget the entry."""
        self.path.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk: at every moment there is a whole file or none."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if hasattr(os, "O_DIRECTORY"):  # POSIX: the new name reaches the disk with its folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def write_record(path: Path, entry: Any) -> None:
    """Write JSON data with their checksum in one atomic step."""
    text = json.dumps(entry)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "entry": entry}), "utf-8")
    put_in_place(part, path)


def read_record(path: Path) -> Any:
    """What `write_record` wrote; `None` if the file is not there or is damaged, the latter with a warning."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        if hashlib.sha256(json.dumps(found["entry"]).encode()).hexdigest() == found["sha256"]:
            return found["entry"]
    except (ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged; what it records is done again.", path)
    return None


def digest(tensors: Iterable[tuple[str, Tensor]], *, values: bool = True, start: bytes = b"") -> str:
    """SHA-256 of `start` and of the tensors' names, shapes, dtypes and, unless told otherwise, about `PROBES` values
    of each."""
    total = hashlib.sha256(start)
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if values and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            chosen = torch.arange(0, flat.numel(), max(1, flat.numel() // PROBES), device=flat.device)
            total.update(flat[chosen].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def identity_of(model: nn.Module, tokens: Tensor) -> dict[str, str]:
    """What of model and tokens must be the same for a journal to be taken up."""
    return {
        "tokens": f"{tuple(tokens.shape)} {hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()}",
        "weights": digest(model.named_parameters()),
    }


class _HashingWriter:
    """The part of a file that `torch.save` needs, with a checksum of all that passes through."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _load(path: Path) -> dict[str, Any]:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        left = path.stat().st_size - checksum.digest_size
        while left > 0:
            block = file.read(min(left, 1 << 20))
            checksum.update(block)
            left -= len(block)
        if file.read() != checksum.digest():
            raise ValueError("its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """One phrase for each entry that differs, digests without their value."""
    phrases = []
    for key in dict.fromkeys([*theirs, *ours]):
        old, new = theirs.get(key), ours.get(key)
        if old != new:
            hashed = DIGEST.search(f"{old} {new}")
            phrases.append(f"other {key}" if hashed else f"{key}: {old} there, {new} here")
    return phrases
