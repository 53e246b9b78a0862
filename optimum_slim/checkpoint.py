"""The folder of a run that writes its result layer by layer, so that a killed run goes on where it was.

It lies beside the target under a hidden name made from the target's, so that the same command finds it again:

    .OUT.slim-run/
        lock                one process at a time
        run.json            what must be the same for the rest of the run to be the rest of this run
        tokens.json         calibration tokens, if the model wrote them itself
        allocation.json     what the step decided on the data before it packed anything
        complete.json       the report, once `model` is complete
        layer-00003.json    file name, size and SHA-256 of a finished decoder layer, and its rows of the report
        model/              the finished layers' safetensors files, and at the end the rest; becomes OUT

Every file is written under another name, flushed to the disk and renamed, the layer's file before its record, and
every record carries its own checksum. Whatever is damaged, cut short or missing is found and made again.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .journal import differences, put_in_place, read_record, write_record
from .saving import take_place
from .weights import WeightFiles


RUN = "run.json"
COMPLETE = "complete.json"
BLOCK = 1 << 20


def run_folder(out: Path) -> Path:
    """Where a run with the target `out` (an absolute path) keeps its progress."""
    return out.parent / f".{out.name}.slim-run"


class Checkpoint:
    """The run folder of the target `out`; use it inside `locked()`.

    Args:
        out: absolute path of the result.
        layers: number of decoder layers.
    """

    def __init__(self, out: Path, layers: int):
        self.out, self.layers, self.path = out, layers, run_folder(out)
        self.model = self.path / "model"

    def complete(self) -> dict[str, Any] | None:
        """The step's report, if the result took its place already and only this folder is left to remove."""
        found = read_record(self.path / COMPLETE) if self.out.is_dir() and not self.model.is_dir() else None
        return None if found is None else found["report"]

    @contextmanager
    def locked(self, *, restart: bool = False) -> Iterator[None]:
        """Hold the folder for this process; if nothing was finished when an error ends the run, it is removed.

        Args:
            restart: forget what an earlier run has done.

        Raises:
            OSError: another process holds it.
        """
        with _lock(self.path):
            if restart:
                self._clear()
            try:
                yield
            except BaseException:
                if not any(self.path.glob("layer-*.json")):
                    shutil.rmtree(self.path, ignore_errors=True)
                raise

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Start, or go on with, the run of this fingerprint.

        Raises:
            ValueError: the folder belongs to another run; lists what differs.
        """
        self.fingerprint = fingerprint
        complete = self.complete() is not None
        found = read_record(self.path / COMPLETE)["fingerprint"] if complete else read_record(self.path / RUN)
        if found is None:
            self._clear()
            write_record(self.path / RUN, fingerprint)
        elif different := differences(found, fingerprint):
            raise ValueError(
                f"{self.path} holds an unfinished run that is another one: {'; '.join(different)}. Run it as before "
                "to finish it, or pass restart=True (--restart) to start over."
            )
        if not complete:
            self.model.mkdir(exist_ok=True)

    def file(self, index: int | None) -> str:
        """The name of the file of decoder layer `index`, of everything else for `None`."""
        number = 1 if index is None else index + 2
        return f"model-{number:05d}-of-{self.layers + 1:05d}.safetensors"

    def finished(self) -> dict[int, dict[str, Any]]:
        """The records of the layers whose files are there and whole."""
        records = {index: read_record(self._record(index)) for index in range(self.layers)}
        return {index: record for index, record in records.items() if record is not None and self._whole(record)}

    def keep(self, index: int, tensors: dict[str, Tensor], rows: list[dict[str, Any]], seconds: float) -> None:
        """Write a finished layer: its tensors by their names in the model, and its part of the report."""
        part = self.path / "layer.part"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
        name, size, checksum = self.file(index), part.stat().st_size, _sha256(part)
        put_in_place(part, self.model / name)
        entry = {"file": name, "bytes": size, "sha256": checksum, "rows": rows, "seconds": seconds}
        write_record(self._record(index), entry)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished layer."""
        files = WeightFiles([self.model / self.file(index)])
        return {name: files.read(name) for name in files.tensors}

    def tokens(self) -> Tensor | None:
        """The calibration tokens that were kept, if any."""
        found = read_record(self.path / "tokens.json")
        return None if found is None else torch.tensor(found, dtype=torch.int64)

    def keep_tokens(self, tokens: Tensor) -> None:
        write_record(self.path / "tokens.json", tokens.tolist())

    def allocation(self) -> dict[str, Any] | None:
        """The step as its allocation left it, if that was kept."""
        return read_record(self.path / "allocation.json")

    def keep_allocation(self, step: dict[str, Any]) -> None:
        write_record(self.path / "allocation.json", step)

    def take_place(self, report: dict[str, Any]) -> None:
        """Let `model`, which has become the whole result, take the target's place; `report` is the step's."""
        for path in [*self.model.iterdir(), self.model]:
            if path.is_file() or hasattr(os, "O_DIRECTORY"):
                _flush(path)
        write_record(self.path / COMPLETE, {"fingerprint": self.fingerprint, "report": report})
        take_place(self.model, self.out)

    def remove(self) -> None:
        """Remove the folder of a run whose result is in place, the record of that last."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != COMPLETE:
                path.unlink()
        (self.path / COMPLETE).unlink()
        self.path.rmdir()

    def _record(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.json"

    def _whole(self, record: dict[str, Any]) -> bool:
        path = self.model / record["file"]
        return path.is_file() and path.stat().st_size == record["bytes"] and _sha256(path) == record["sha256"]

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    import fcntl  # POSIX only; what needs it asks `lockable` first

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock"))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise OSError(
                f"another process is working on {folder}; wait for it, stop it, or choose another folder to save to"
            )
        yield


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()
