"""Measure a model in one call: perplexity, bytes, stored bits per weight, peak memory, speed, task accuracy.

    evaluate(model, tokenizer, text="wiki.test.raw", path="slim")

Perplexity is exp(mean negative log-likelihood of the predicted tokens): the whole text is tokenized once, cut into
non-overlapping windows, and each window predicts all its tokens but the first. It depends on the window's length, so
the length is part of the result. Speed is measured on random tokens at batch 1, prefill and decode apart.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .report import compare
from .speed import PeakMemory, Speed, measure_speed, speed_ratio
from .stored import StoredBits, bytes_on_disk, stored_bits


__all__ = [
    "Evaluation",
    "PeakMemory",
    "Speed",
    "StoredBits",
    "bytes_on_disk",
    "compare",
    "evaluate",
    "logical_parameters",
    "measure_speed",
    "perplexity",
    "speed_ratio",
    "stored_bits",
    "tokenize",
]

POSITIONS_AT_ONCE = 128  # rows of logits turned into fp32 together


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; fields that were not asked for are `None`.

    Args:
        parameters: logical weights: a packed layer counts out_features * in_features.
        dtype, device, threads: under which everything was measured.
        perplexity, window, windows, tokens: the perplexity, the length and number of its windows, and the number of
            predicted tokens it is a mean over.
        bytes_on_disk: size of the weight files in `path`.
        stored_bits_per_weight, stored_bits_packed: counted from the files, of the whole model and of the packed
            layers alone (scales and offsets included).
        peak_memory: bytes; see `peak_memory_of` for what was counted.
        prefill_tokens_per_second, decode_tokens_per_second: batch 1, median over the runs.
        tasks: lm-eval metrics, "task metric" -> value.
    """

    parameters: int
    dtype: str
    device: str
    threads: int
    perplexity: float | None = None
    window: int | None = None
    windows: int | None = None
    tokens: int | None = None
    bytes_on_disk: int | None = None
    stored_bits_per_weight: float | None = None
    stored_bits_packed: float | None = None
    peak_memory: int | None = None
    peak_memory_of: str = ""
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prompt_tokens: int | None = None
    generate_tokens: int | None = None
    tasks: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    tokenizer=None,
    text: str | Path | Sequence[str] | Sequence[int] | Tensor | None = None,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    prompt_tokens: int = 128,
    generate_tokens: int = 64,
    repeats: int = 3,
    path: str | Path | None = None,
    lm_eval_tasks: Sequence[str] | None = None,
) -> Evaluation:
    """Measure `model`.

    Args:
        model: a causal language model of Transformers, dense or slimmed.
        tokenizer: needed for `text` that is not ids, and for lm-eval.
        text: a file's path, a list of strings (joined by blank lines) or token ids; `None` skips perplexity.
        window: tokens per window, at most the model's own limit (the result states the length used).
        max_windows: stop after so many windows; `None` reads the whole text.
        prompt_tokens, generate_tokens, repeats: size and number of the speed runs; 0 generated tokens skips them.
        path: folder of the saved model, for sizes and stored bits.
        lm_eval_tasks: names of lm-eval tasks; needs `pip install optimum-slim[eval]`.

    Returns:
        An `Evaluation`.

    Raises:
        FileNotFoundError: `text` names no file, or `path` holds no weights.
        ValueError: text without a tokenizer, or fewer than two tokens.
        ImportError: lm-eval tasks without lm-eval.
    """
    ids = None if text is None else tokenize(text, tokenizer)
    parameter = next(model.parameters())
    found: dict[str, Any] = {}
    with PeakMemory(parameter.device) as memory, _eval_mode(model):
        if ids is not None:
            found["window"] = min(window, _position_limit(model) or window, len(ids))
            nll, found["tokens"], found["windows"] = _mean_nll(model, ids, found["window"], max_windows)
            found["perplexity"] = math.exp(nll)
        if generate_tokens:
            speed = measure_speed([model], prompt_tokens, generate_tokens, repeats)[0]
            found |= {"prefill_tokens_per_second": speed.prefill, "decode_tokens_per_second": speed.decode}
            found |= {"prompt_tokens": prompt_tokens, "generate_tokens": generate_tokens}
        if lm_eval_tasks:
            found["tasks"] = _lm_eval(model, tokenizer, lm_eval_tasks)
    if path is not None:
        found["bytes_on_disk"] = bytes_on_disk(path)
        if Path(path).suffix == ".safetensors" or any(Path(path).glob("*.safetensors")):
            bits = stored_bits(path)
            found |= {"stored_bits_per_weight": bits.overall, "stored_bits_packed": bits.packed}
    return Evaluation(
        parameters=logical_parameters(model),
        dtype=str(_compute_dtype(model)).removeprefix("torch."),
        device=str(parameter.device),
        threads=torch.get_num_threads(),
        peak_memory=memory.peak,
        peak_memory_of=memory.what,
        **found,
    )


def perplexity(
    model: nn.Module, ids: Tensor | Sequence[int], window: int = 1024, max_windows: int | None = None
) -> float:
    """Perplexity of `model` on token ids (int64, one sequence) in non-overlapping windows at batch 1.

    The model runs in its own dtype; log-softmax and sums are fp32, a few rows of logits at a time. Tokens after the
    last full window are left out; a text shorter than one window is one window.

    Raises:
        ValueError: fewer than two tokens, or a window beyond the model's position limit.
    """
    return math.exp(mean_loss(model, ids, window, max_windows))


def mean_loss(
    model: nn.Module, ids: Tensor | Sequence[int], window: int = 1024, max_windows: int | None = None
) -> float:
    """Mean negative log-likelihood of the predicted tokens, in nats: the logarithm of `perplexity`."""
    with _eval_mode(model):
        return _mean_nll(model, torch.as_tensor(ids), window, max_windows)[0]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def _mean_nll(model, ids: Tensor, window: int, max_windows: int | None) -> tuple[float, int, int]:
    ids = ids.flatten().to(torch.int64)
    limit = _position_limit(model)
    if limit is not None and window > limit:
        raise ValueError(f"window={window} is longer than the {limit} positions of the model; pass window={limit}")
    window = min(window, len(ids))
    if window < 2:
        raise ValueError(f"perplexity needs at least 2 tokens in a window, found {window}; pass a longer text")
    windows = ids[: len(ids) // window * window].view(-1, window)[:max_windows]
    device, total = next(model.parameters()).device, 0.0
    for row in windows.to(device):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        for part, labels in zip(logits.split(POSITIONS_AT_ONCE), row[1:].split(POSITIONS_AT_ONCE), strict=True):
            total += float(nn.functional.cross_entropy(part.float(), labels, reduction="sum"))
        del logits
    tokens = len(windows) * (window - 1)
    return total / tokens, tokens, len(windows)


def tokenize(text: str | Path | Sequence[str] | Sequence[int] | Tensor, tokenizer=None) -> Tensor:
    """Token ids, int64 (tokens,), of a file, of a list of strings joined by blank lines, or of ids as they are.

    Raises:
        FileNotFoundError: a string that names no file (pass the text itself in a list).
        ValueError: text but no tokenizer.
    """
    if isinstance(text, Tensor):
        return text.flatten().to(torch.int64)
    if isinstance(text, str | Path):
        file = Path(text)
        if "\n" in str(text) or not file.is_file():
            name = f"{str(text)[:60]!r}"
            raise FileNotFoundError(f"no such text file: {name}; to evaluate on the text itself, pass it in a list")
        text = [file.read_text(encoding="utf-8")]
    if all(isinstance(item, int) for item in text):
        return torch.tensor(text, dtype=torch.int64)
    if tokenizer is None:
        raise ValueError("evaluating on text needs its tokenizer; pass tokenizer=... or token ids instead of text")
    return torch.tensor(tokenizer("\n\n".join(text), verbose=False)["input_ids"], dtype=torch.int64)


def logical_parameters(model: nn.Module) -> int:
    """Weights the model stands for: tied ones once, packed layers by their logical size, scales not at all."""
    total, seen = 0, set()
    for module in model.modules():
        packed = isinstance(module, nn.Linear) and module.weight.dtype == torch.uint8
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (packed and name.startswith("weight_")):
                continue
            seen.add(id(parameter))
            is_packed_weight = packed and name == "weight"
            total += module.in_features * module.out_features if is_packed_weight else parameter.numel()
    return total


def _compute_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _position_limit(model: nn.Module) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _lm_eval(model: nn.Module, tokenizer, tasks: Sequence[str]) -> dict[str, float]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"lm-eval tasks {list(tasks)} need lm-eval, which is missing. Run: pip install optimum-slim[eval]"
        ) from error
    found = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }
