"""Speed and memory of a model: prefill and decode at batch 1, models taking turns, and the peak of a block of code.

Machines drift (clock, caches, neighbours), so two models are compared by running them alternately in one process, and
the median over the runs is reported. Memory is the opposite: it is compared with one model per process.
"""

import inspect
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import torch
from torch import nn


@dataclass(frozen=True)
class Speed:
    """Seconds of each run of one model at batch 1, and the tokens a run handles."""

    prompt_tokens: int
    generate_tokens: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]

    @property
    def prefill(self) -> float:
        """Prompt tokens per second, median over the runs."""
        return self.prompt_tokens / median(self.prefill_seconds)

    @property
    def decode(self) -> float:
        """Generated tokens per second, median over the runs."""
        return self.generate_tokens / median(self.decode_seconds)


def measure_speed(
    models: Sequence[nn.Module], prompt_tokens: int = 128, generate_tokens: int = 64, repeats: int = 3
) -> list[Speed]:
    """Time prefill and greedy decode of each model at batch 1, the models taking turns in every repeat.

    Prompt tokens are random (seeded), end-of-text is ignored, and one untimed short run per model comes first.
    """
    runs: list[list[tuple[float, float]]] = [[] for _ in models]
    for model in models:
        _run_once(model, min(prompt_tokens, 8), min(generate_tokens, 2))
    for _ in range(repeats):
        for model, results in zip(models, runs, strict=True):
            results.append(_run_once(model, prompt_tokens, generate_tokens))
    return [
        Speed(prompt_tokens, generate_tokens, tuple(p for p, _ in results), tuple(d for _, d in results))
        for results in runs
    ]


def speed_ratio(
    model_a: nn.Module, model_b: nn.Module, prompt_tokens: int = 128, generate_tokens: int = 64, repeats: int = 3
) -> dict[str, float]:
    """How many times faster `model_b` is than `model_a`, measured in turns: {"prefill": ratio, "decode": ratio}."""
    a, b = measure_speed([model_a, model_b], prompt_tokens, generate_tokens, repeats)
    return {"prefill": b.prefill / a.prefill, "decode": b.decode / a.decode}


@torch.inference_mode()
def _run_once(model, prompt_tokens: int, generate_tokens: int) -> tuple[float, float]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator).to(device)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(device)
    output = model(input_ids=ids, use_cache=True, **last_only)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = _now(device)
    for _ in range(generate_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return prefilled - start, _now(device) - prefilled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """Peak memory while the block runs: resident memory of this process, or allocated memory of a CUDA device.

    Resident memory is sampled every 5 ms by a thread, so a shorter peak can be missed, and whatever else the process
    holds is in it: measure one model per process to compare models.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.peak = 0
        cuda = self.device.type == "cuda"
        self.what = "allocated on the CUDA device" if cuda else "resident memory of the whole process, sampled at 5 ms"

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._process, self._stop = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)
