"""In which form a student gets its teacher, the model as it was before the recipe.

As it is, the teacher shares its tensors with the student, so that only those that one of them has alone cost memory:
removed layers, and, where the student was cut narrower or trains in full, all of the teacher. Then

- `bits=4` makes a copy in 4 bits (nf4 of bitsandbytes with double quantization, about 4.13 bits a weight; embeddings,
  output head and norms stay as they are), a quarter of a 16-bit teacher and as close to it as a 4-bit model is;
- `top_k` runs it once over all samples and keeps what it says on disk (`teacher_cache.py`), so that it is neither in
  memory nor computed while the student trains.

Both together cache the 4-bit teacher.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .fourbit import finish, nf4
from .memory import shared_copy
from .packed import PackedLinear
from .report import megabytes
from .saving import stored_bytes
from .teacher_cache import TeacherCache, check_cache


Teacher = nn.Module | TeacherCache
FOLDER = "teacher"  # of a cache, inside a journal


@dataclass(frozen=True)
class TeacherForm:
    """What becomes of the teacher before a student trains.

    Args:
        bits (`int`, *optional*): 4, or `None` for the weights as they are.
        top_k (`int`, *optional*): how many of its likeliest tokens to cache; `None` runs it at every step.
        folder (`str`, *optional*): of a cache that stays.
        temperature, batch_size: as for `TeacherCache.build`.

    Raises:
        ValueError: fields that cannot work.
    """

    bits: int | None = None
    top_k: int | None = None
    folder: str | None = None
    temperature: float = 1.0
    batch_size: int = 8

    def __post_init__(self):
        if self.bits not in (None, 4):
            raise ValueError(f"teacher_bits must be 4, or None for the weights as they are, found {self.bits!r}")
        if self.top_k is not None:
            check_cache(self.top_k, self.temperature)
        elif self.folder is not None:
            raise ValueError("teacher_cache is a folder for what teacher_top_k keeps; add teacher_top_k=256")

    def check_loss(self, *, kl_weight: float, divergence: str, hidden_weight: float) -> None:
        """Raise a `ValueError` unless a teacher in this form can give the loss."""
        if self.top_k is None:
            return
        if divergence != "forward":
            raise ValueError(
                f"divergence={divergence!r} needs the teacher's probability of every token the student finds likely, "
                "and a cache has those of the teacher's likeliest; use divergence='forward', or teacher_top_k=None"
            )
        if hidden_weight:
            raise ValueError("a cached teacher has no hidden states; use hidden_weight=0, or teacher_top_k=None")
        if not kl_weight:
            raise ValueError("kl_weight=0 leaves a cached teacher no part; use loss='next_token'")

    def make(self, teacher: Teacher, tokens: Tensor, journal: Path | None) -> Teacher:
        """The teacher in this form; a cache, and a model in 4 bits, have it already.

        Args:
            teacher: the model, which stays as it is.
            tokens: int64 (samples, length), what the student will see.
            journal: folder for a cache that has none of its own.

        Raises:
            ImportError: bitsandbytes is missing.
            ValueError: a model that cannot be quantized; see `TeacherCache.build` for others.
        """
        if isinstance(teacher, TeacherCache):
            return teacher
        if self.bits is not None:
            teacher = four_bit_copy(teacher)
        if self.top_k is None:
            return teacher
        folder = Path(journal) / FOLDER if self.folder is None else self.folder
        settings = {"top_k": self.top_k, "temperature": self.temperature, "batch_size": self.batch_size}
        return TeacherCache.build(teacher, tokens, folder, **settings)

    @contextlib.contextmanager
    def ready(self, teacher: Teacher, tokens: Tensor, journal: Path | None) -> Iterator[Teacher]:
        """The teacher in this form while a student trains.

        A cache in the journal stays, for a run that is killed, unless the training itself fails; without a journal it
        is in a temporary folder, gone afterwards.
        """
        with contextlib.ExitStack() as stack:
            if journal is None and self.folder is None and self.top_k is not None:
                options = {"prefix": "optimum_slim_", "ignore_cleanup_errors": True}
                journal = stack.enter_context(tempfile.TemporaryDirectory(**options))
            try:
                yield self.make(teacher, tokens, journal)
            except FloatingPointError:
                if self.folder is None and journal is not None:
                    shutil.rmtree(Path(journal) / FOLDER, ignore_errors=True)
                raise

    def notes(self, teacher: Teacher) -> list[str]:
        """Remarks for the report, on the teacher that `make` gave."""
        if isinstance(teacher, TeacherCache):
            return [teacher.note() + (" (of a copy in 4 bits)" if self.bits else "")]
        return [f"teacher in 4 bits: {megabytes(stored_bytes(teacher))}"] if self.bits else []


def four_bit_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` whose linear layers are in 4 bits, or itself if it is in 4 bits already.

    Nothing of the model changes. The copy shares the tensors that stay as they are: embeddings, output head, norms.

    Raises:
        ImportError: bitsandbytes is missing.
        TypeError, ValueError: the model is packed, quantized otherwise, or has no linear layer; see `finish`.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        return model
    if packed := [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        raise ValueError(
            f"a teacher in 4 bits is made of dense layers, and {packed[0]} is packed ({len(packed)} layers); use "
            "teacher_bits=None, it is small already"
        )
    copied = shared_copy(model)
    finish(copied, nf4(model.dtype))
    for module in copied.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # or bitsandbytes repacks it, and computes in bf16 from then on
            module.support_avx512bf16_for_cpu = False
    return copied
