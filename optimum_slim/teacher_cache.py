"""What a teacher says about fixed samples, on disk: its k likeliest tokens at every position, and the sum of the rest.

A teacher that was run once need not run again in every epoch or for every student, nor be in memory while one trains:

    cache = TeacherCache.build(teacher, tokens, "folder", top_k=256)
    fit(student, tokens, CachedDistillation(cache), steps=500, learning_rate=1e-4)

A predicted token takes 4 k + 2 bytes, or 6 k + 2 with a vocabulary above 65536: at k = 256 about 1 KB and 1.5 KB, for
which all logits in bf16 take 64 KB with a vocabulary of 32k and 256 KB with 128k. Log-probabilities are kept in fp16:
an error of up to 2⁻¹² in a probability, less than that of a 16-bit teacher's own logits. What is left out is measured
while the cache is built, and kept as `figures`.

The folder has `cache.json`, which says what the cache was built for, and shards (`teacher_shards.py`). A killed build
goes on with the shard it was at. Shards are mapped, not read, and samples are found by a digest of their tokens, since
a loss sees nothing else of them.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm

from .block import device_of, evaluating
from .journal import differences, read_record, write_record
from .losses import ROWS
from .sampling import fingerprint
from .student import differentiable
from .teacher_shards import DIGEST_BYTES, FIGURES, Layout, ShardWriter, open_shard
from .train import check_tokens
from .undisturbed import own_accelerator


logger = logging.getLogger(__name__)

TOP_K = 256
RECORD = "cache.json"


class TeacherCache:
    """A finished cache, opened from its folder.

    Args:
        folder: where `TeacherCache.build` put it.

    Attributes:
        top_k, temperature, vocabulary, samples, length: what it was built with.
        digest (`str`): SHA-256 of these, the teacher and the tokens.
        bytes (`int`): its size on disk.
        figures (`dict`): means over all positions: `"outside"`, the teacher's probability outside of its k likeliest
            tokens; `"entropy"`, of the teacher, in nats; `"hidden"`, the part of it that is in how that probability
            is divided, which is not taught.

    Raises:
        ValueError: there is no finished cache in the folder, or it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        record = read_record(self.folder / RECORD)
        if record is None or record["figures"] is None:
            raise ValueError(f"{folder} has no finished teacher cache; TeacherCache.build(...) makes or finishes one")
        built_for, self.figures = record["built for"], record["figures"]
        layout = _layout(built_for)
        self.top_k, self.vocabulary, self.temperature = layout.top_k, layout.vocabulary, built_for["temperature"]
        self.samples, self.length, self.digest = layout.samples, layout.length, _digest(built_for)
        self.shards, self.places, self.bytes = [], {}, 0
        for path, first, end in layout.shards(self.folder):
            shard = open_shard(path, layout, end - first, self.digest)
            if shard is None:
                raise ValueError(f"{path} is missing or damaged; the same TeacherCache.build(...) makes it again")
            for row, digest in enumerate(_rows(shard, "digests").tolist()):
                self.places[bytes(digest)] = len(self.shards), row
            self.shards.append(shard)
            self.bytes += path.stat().st_size

    def __repr__(self) -> str:
        return f"TeacherCache(top_k={self.top_k}, temperature={self.temperature})"

    @classmethod
    def build(
        cls,
        teacher: nn.Module,
        tokens: Tensor,
        folder: str | Path,
        *,
        top_k: int = TOP_K,
        temperature: float = 1.0,
        batch_size: int = 8,
    ) -> "TeacherCache":
        """Run `teacher` over all samples, or those that an earlier, killed build has not done, and open the cache.

        Memory is that of the teacher and of one micro-batch of its logits. In several processes each makes its share
        of the shards, in a folder that all of them see.

        Args:
            teacher (`PreTrainedModel`): a causal language model, on the device where it is to run. It is in evaluation
                mode meanwhile, and otherwise left as it is.
            tokens: int64 (samples, length), on the CPU.
            folder: made if need be.
            top_k (`int`): how many tokens to keep at each position.
            temperature (`float`): divides the logits.
            batch_size (`int`): samples that go through the teacher at once.

        Raises:
            ValueError: settings or tokens that cannot work; logits that are not numbers; the folder has the cache of
                other tokens, another teacher or other settings.
            OSError: the disk has not enough room, said before the teacher runs.
        """
        check_tokens(tokens)
        check_cache(top_k, temperature)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, found {batch_size!r}")
        with torch.no_grad(), evaluating(teacher), differentiable(teacher), own_accelerator("no") as accelerator:
            rank, processes = accelerator.process_index, accelerator.num_processes
            if processes > 1:
                teacher.to(accelerator.device)
            folder = Path(broadcast_object_list([str(folder)])[0])
            built_for = _purpose(teacher, tokens, top_k, temperature)
            with accelerator.main_process_first():
                mine = _missing(folder, built_for)[rank::processes]
            accelerator.wait_for_everyone()
            total = sum(end - first for _, first, end in mine) * tokens.shape[1]
            quiet = None if accelerator.is_main_process else True
            with tqdm(total=total, desc="caching the teacher", unit="tok", disable=quiet) as progress:
                for path, first, end in mine:
                    with ShardWriter(path, _layout(built_for), end - first, _digest(built_for)) as shard:
                        for ids in tokens[first:end].split(batch_size):
                            shard.add(**_ask(teacher, ids, top_k, temperature), digests=_digests(ids))
                            progress.update(ids.numel())
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _finish(folder, built_for)
            accelerator.wait_for_everyone()
        return cls(folder)

    def find(self, input_ids: Tensor) -> list[tuple[int, int]]:
        """Shard and row of each of the samples (batch, length).

        Raises:
            ValueError: one of them is not in the cache.
        """
        digests = [bytes(row) for row in _digests(input_ids.cpu()).tolist()]
        if missing := [number for number, digest in enumerate(digests) if digest not in self.places]:
            raise ValueError(
                f"the teacher cache in {self.folder} was built for {self.samples} samples of {self.length} tokens, "
                f"and sample {missing[0]} of {tuple(input_ids.shape)} is not one of them; build it for the tokens to "
                "train on, and pass whole rows of them"
            )
        return [self.places[digest] for digest in digests]

    def read(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher said about the samples (batch, length), at each position but the last.

        Returns:
            uint16 or int32 (batch, length - 1, top_k), the likeliest tokens in descending order, and fp16 (batch,
            length - 1, top_k + 1), their log-probabilities and that of all other tokens together; on the CPU.
        """
        found = [(self.shards[shard], row) for shard, row in self.find(input_ids)]
        return tuple(torch.stack([_rows(shard, name, row) for shard, row in found]) for name in ("ids", "log_probs"))

    def note(self) -> str:
        """What it costs and leaves out, in a line for a report."""
        outside, hidden, entropy = (self.figures[name] for name in FIGURES)
        return (
            f"teacher cached, the {self.top_k} likeliest of {self.vocabulary:,} tokens: {outside:.3%} of its "
            f"probability is outside of them, and {hidden:.3g} of its {entropy:.3g} nats of entropy are not taught; "
            f"{self.bytes / (self.samples * (self.length - 1)):,.0f} bytes a token on disk"
        )


def check_cache(top_k: int, temperature: float) -> None:
    """Raise a `ValueError` for settings that no cache can have."""
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k must be a positive integer, found {top_k!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}; 1 leaves the logits as they are")


def _purpose(teacher: nn.Module, tokens: Tensor, top_k: int, temperature: float) -> dict[str, Any]:
    """All that decides what is in the cache, as JSON data."""
    name = fingerprint(teacher)
    vocabulary = teacher(input_ids=tokens[:1, :2].to(device_of(teacher)), use_cache=False).logits.shape[-1]
    if top_k > vocabulary:
        raise ValueError(f"top_k={top_k} is more than the {vocabulary} tokens of the vocabulary; pass fewer")
    content = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
    settings = {"teacher": name, "tokens": content, "temperature": float(temperature)}
    return settings | dataclasses.asdict(Layout(*tokens.shape, vocabulary, top_k))


def _layout(built_for: dict[str, Any]) -> Layout:
    return Layout(**{field.name: built_for[field.name] for field in dataclasses.fields(Layout)})


def _digest(built_for: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(built_for, sort_keys=True).encode()).hexdigest()


def _missing(folder: Path, built_for: dict[str, Any]) -> list[tuple[Path, int, int]]:
    """The shards that are still to be made in `folder`, which is claimed for this cache.

    Raises:
        ValueError: it belongs to another one.
        OSError: they are too large for the disk.
    """
    record = read_record(folder / RECORD)
    if record is not None and (different := differences(record["built for"], built_for)):
        raise ValueError(
            f"the teacher cache in {folder} was built for something else: {'; '.join(different)}. Build this one in "
            "another folder, or remove that one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if record is None:
        write_record(folder / RECORD, {"built for": built_for, "figures": None})
    layout, missing = _layout(built_for), []
    for path, first, end in layout.shards(folder):
        if open_shard(path, layout, end - first, _digest(built_for)) is None:
            if path.exists():
                logger.warning("%s is damaged or left over from another cache; it is made again.", path)
            missing.append((path, first, end))
    needed, free = sum(layout.bytes(end - first) for _, first, end in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the teacher cache needs {needed:,} bytes and the disk of {folder} has {free:,} free; use a smaller "
            f"top_k (now {layout.top_k}), fewer samples or another folder",
        )
    return missing


def _finish(folder: Path, built_for: dict[str, Any]) -> None:
    """Record the figures of all shards."""
    layout, digest = _layout(built_for), _digest(built_for)
    shards = [open_shard(path, layout, end - first, digest) for path, first, end in layout.shards(folder)]
    means = torch.cat([_rows(shard, "figures") for shard in shards]).double().mean(0)
    write_record(folder / RECORD, {"built for": built_for, "figures": dict(zip(FIGURES, means.tolist(), strict=True))})


def _ask(teacher: nn.Module, ids: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    """What a shard keeps of the teacher's logits for samples (batch, length), on the CPU."""
    logits = teacher(input_ids=ids.to(device_of(teacher)), use_cache=False).logits[:, :-1]
    wide = torch.uint16 if logits.shape[-1] <= 2**16 else torch.int32
    found = []
    for rows in (rows for sample in logits for rows in sample.split(ROWS)):
        log_p = (rows.float() / temperature).log_softmax(-1)
        top, tokens = log_p.topk(top_k)
        others = log_p.scatter(-1, tokens, -torch.inf)
        rest = others.logsumexp(-1, keepdim=True)
        entropy, unseen, together = (torch.special.entr(x.exp()).sum(-1) for x in (log_p, others, rest))
        figures = torch.stack([rest.exp()[:, 0], (unseen - together).clamp_(min=0), entropy], -1)
        found.append((figures.cpu(), tokens.cpu().to(wide), torch.cat([top, rest], -1).half().cpu()))
    shape, parts = logits.shape[:2], zip(*found, strict=True)
    figures, tokens, log_probs = (torch.cat(each).unflatten(0, shape) for each in parts)
    if not bool(figures.isfinite().all()):
        raise ValueError("the teacher's logits are not finite, so that nothing can be learned from it; load it again")
    return {"figures": figures.mean(1), "ids": tokens, "log_probs": log_probs}


def _digests(ids: Tensor) -> Tensor:
    """uint8 (batch, 16) of tokens (batch, length) on the CPU."""
    rows = ids.to(torch.int64).contiguous().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).digest() for row in rows]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)


def _rows(shard, name: str, row: int | slice = slice(None)) -> Tensor:
    return shard.get_slice(name)[row]
