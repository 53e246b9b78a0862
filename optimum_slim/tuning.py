"""Finding out whether and how a model should speculate on this machine: `tune_speculation`.

How many drafted tokens are accepted and what a round costs both depend on the exit layer E and the length d of a
draft, and neither tells the other. Both are measured, each in the cheapest way that is exact:

- Acceptance. The model's own greedy continuations are what its drafts are compared with. As long as a draft agrees its
  prefix is that of the continuation, so one pass over the continuations, with every layer's states sent through norm
  and head, tells for every E and d (and every confidence that ends a draft early) how many tokens each round brings.
- Cost. The time of a round is linear in E for given d: d drafted tokens through E layers, one verification through
  the others. So two values of E are timed for each d, in turns, through `generate` itself.

The best prediction is then timed against plain decoding, in turns. If it does not win, speculation is off.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .block import evaluating
from .hidden_states import outputs
from .route import exit_logits
from .speculation import SETTINGS, SelfSpeculation
from .walk import decoder_layers


DRAFT_TOKENS = (1, 2, 3, 4, 6, 8, 12)
CONFIDENCES = (0.0, 0.2, 0.4, 0.6, 0.8)
ROUNDS = 6  # of a timed run
REPEATS = 3


@dataclass
class SpeculationTuning:
    """What `tune_speculation` found.

    Args:
        exit_layer, draft_tokens, confidence: for `SelfSpeculation`; `draft_tokens` is `None` where speculation does
            not pay, and so is `exit_layer`.
        acceptance: share of drafted tokens accepted, of the best candidate.
        speedup: its tokens per second over those of plain greedy decoding, medians of runs in turns.
        plain: tokens per second of plain decoding.
        candidates: rows with `exit_layer`, `draft_tokens`, `confidence`, `acceptance`, `tokens_per_round`,
            `milliseconds_per_round` and `speedup` (predicted), the best of each exit layer, best first. With `draft`
            each length of it, measured.
    """

    exit_layer: int | None
    draft_tokens: int | None
    confidence: float
    acceptance: float
    speedup: float
    plain: float
    candidates: list[dict[str, Any]] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """What a generation config keeps as `self_speculation`."""
        return {"exit_layer": self.exit_layer, "draft_tokens": self.draft_tokens, "confidence": self.confidence}

    def outcome(self) -> str:
        """The decision with its figures, in a line."""
        best = self.candidates[0]
        source = "another model" if best["exit_layer"] is None else f"{best['exit_layer']} layers"
        tried = f"{best['draft_tokens']} tokens from {source}"
        if best["confidence"]:
            tried += f" while more confident than {best['confidence']}"
        figures = f"{self.acceptance:.0%} accepted, {self.speedup:.2f} x plain decoding ({self.plain:.1f} tokens/s)"
        decision = "self-speculation" if self.draft_tokens is not None else "no self-speculation, which would not pay"
        return f"{decision}: drafts of {tried}: {figures}"


@torch.no_grad()
def tune_speculation(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Tensor] | Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft: PreTrainedModel | None = None,
    exit_layers: Sequence[int] | None = None,
    draft_tokens: Sequence[int] = DRAFT_TOKENS,
    confidences: Sequence[float] = CONFIDENCES,
    max_new_tokens: int = 64,
    store: bool = True,
) -> SpeculationTuning:
    """Find exit layer and draft length for `SelfSpeculation` by measurement, print the decision, and keep it.

    Args:
        model: a causal language model; it is not changed but for `generation_config.self_speculation`.
        prompts: strings (with `tokenizer`) or token ids, int64 (length,) each; a few, of the kind to be expected.
        draft: a slimmed copy of the model that drafts, as for `SelfSpeculation`; only its length is sought then.
        exit_layers: candidates for E; by default all but the last.
        draft_tokens: candidates for d.
        confidences: candidates for what ends a draft early.
        max_new_tokens: of each continuation that acceptance is measured on.
        store: keep the decision in `model.generation_config`, where `SelfSpeculation()` finds it and `save_pretrained`
            saves it.

    Raises:
        ValueError: no prompt, prompts that are no token ids, candidates out of range.
    """
    prompts = _token_ids(prompts, tokenizer)
    count = len(decoder_layers(model)[1])
    exit_layers = range(1, count) if exit_layers is None else sorted(set(exit_layers))
    if not exit_layers or exit_layers[0] < 1 or exit_layers[-1] >= count:
        raise ValueError(f"exit_layers must lie between 1 and {count - 1}, found {list(exit_layers)}")
    draft_tokens = sorted(set(draft_tokens))
    if not draft_tokens or draft_tokens[0] < 1:
        raise ValueError(f"draft_tokens must be positive, found {draft_tokens}")
    with evaluating(model):
        if draft is None:
            rows = _by_exit(model, prompts, exit_layers, draft_tokens, confidences, max_new_tokens)
        else:
            rows = _by_draft(model, prompts, draft, draft_tokens, max_new_tokens)
        rows.sort(key=lambda row: -row["speedup"])
        best = rows[0]
        speed, speedup, acceptance = _race(model, prompts, best, draft, max_new_tokens)
    wins = speedup > 1
    chosen = {name: best[name] if wins else None for name in ("exit_layer", "draft_tokens")}
    chosen |= {"confidence": best["confidence"] if wins else 0.0}
    tuning = SpeculationTuning(**chosen, acceptance=acceptance, speedup=speedup, plain=speed, candidates=rows)
    if store and draft is None:
        keep_tuning(model, tuning)
    print(tuning.outcome())
    return tuning


def keep_tuning(model: PreTrainedModel, tuning: SpeculationTuning) -> SpeculationTuning:
    """Let the model's generation config keep what was found, also when saved and loaded; returns `tuning`."""
    setattr(model.generation_config, SETTINGS, tuning.settings())
    model.generation_config._from_model_config = False  # one that is does not keep such settings on reload
    return tuning


def _by_exit(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    exit_layers: Sequence[int],
    draft_tokens: Sequence[int],
    confidences: Sequence[float],
    new: int,
) -> list[dict[str, Any]]:
    """The best candidate of each exit layer."""
    texts = [_generate(model, prompt, new) for prompt in tqdm(prompts, desc="texts", disable=None)]
    pairs = [(text, prompt) for text, prompt in zip(texts, prompts, strict=True) if len(text) > len(prompt) + 1]
    if not pairs:
        raise ValueError("every prompt is answered by a single token, which leaves nothing to draft; pass others")
    agreements = [_agreement(model, text, len(prompt), exit_layers) for text, prompt in pairs]
    plain, rounds = _times(model, prompts[0], exit_layers, draft_tokens)
    rows = []
    for exit_layer in exit_layers:
        every = [agreement[exit_layer] for agreement in agreements]
        tried = [_predict(every, exit_layer, d, c, rounds, plain) for d in draft_tokens for c in confidences]
        rows.append(max(tried, key=lambda row: row["speedup"]))
    return rows


def _by_draft(
    model: PreTrainedModel, prompts: Sequence[Tensor], draft: PreTrainedModel, draft_tokens: Sequence[int], new: int
) -> list[dict[str, Any]]:
    """Every length of a draft by another model, timed."""
    rows = []
    for length in tqdm(draft_tokens, desc="drafts", disable=None):
        row = {"exit_layer": None, "draft_tokens": length, "confidence": 0.0}
        _, speedup, acceptance = _race(model, prompts, row, draft, new)
        rows.append(row | {"acceptance": acceptance, "speedup": speedup})
    return rows


def _token_ids(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[Tensor]:
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings or of token ids, found a single string")
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("prompts are strings; pass tokenizer, or token ids")
            prompt = tokenizer(prompt, return_tensors="pt").input_ids[0]
        prompt = torch.as_tensor(prompt)
        if prompt.dim() != 1 or prompt.dtype != torch.int64 or not len(prompt):
            raise ValueError(f"a prompt must be int64 (length,), found {prompt.dtype} {tuple(prompt.shape)}")
        found.append(prompt)
    if not found:
        raise ValueError("tuning needs at least one prompt")
    return found


def _generate(
    model: PreTrainedModel, prompt: Tensor, new: int, speculation: SelfSpeculation | None = None, **settings: Any
) -> Tensor:
    """The greedy continuation of a prompt with the prompt, int64 (length,), on the CPU."""
    ids = prompt[None].to(model.device)
    settings |= {"max_new_tokens": new, "do_sample": False, "num_beams": 1, "custom_generate": speculation}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].cpu()


def _agreement(
    model: PreTrainedModel, text: Tensor, prompt: int, exit_layers: Sequence[int]
) -> dict[int, tuple[list[bool], list[float]]]:
    """For each exit layer and each generated token but the first: would it have been drafted, and how confidently."""
    ids = text[None].to(model.device)
    with outputs(model, [exit_layer - 1 for exit_layer in exit_layers], "model") as states:
        model(input_ids=ids, use_cache=False)
    found = {}
    for exit_layer in exit_layers:
        kept = states[exit_layer - 1][:, prompt:-1]
        logits = exit_logits(model, ids[:, prompt:-1], kept)[0].float()
        chance, token = logits.softmax(-1).max(-1)
        found[exit_layer] = ((token.cpu() == text[prompt + 1 :]).tolist(), chance.tolist())
    return found


def _predict(
    agreements: Sequence[tuple[list[bool], list[float]]],
    exit_layer: int,
    draft_tokens: int,
    confidence: float,
    rounds: dict[int, tuple[float, float]],
    plain: float,
) -> dict[str, Any]:
    """What drafts of this kind bring on the given texts, at the measured cost of rounds.

    Args:
        rounds: by length of the draft, the seconds of a round as intercept and slope over the exit layer.
        plain: seconds per token of plain decoding.
    """
    tokens = drafted = accepted = count = 0
    seconds = 0.0
    for agrees, chances in agreements:
        at = 0
        while at < len(agrees):
            length, agreed = _draft(agrees[at:], chances[at:], draft_tokens, confidence)
            at += agreed + 1
            tokens, drafted, accepted, count = tokens + agreed + 1, drafted + length, accepted + agreed, count + 1
            intercept, slope = _cost(rounds, length)
            seconds += intercept + slope * exit_layer
    return {
        "exit_layer": exit_layer,
        "draft_tokens": draft_tokens,
        "confidence": confidence,
        "acceptance": accepted / max(1, drafted),
        "tokens_per_round": tokens / max(1, count),
        "milliseconds_per_round": 1e3 * seconds / max(1, count),
        "speedup": tokens * plain / seconds if seconds else 0.0,
    }


def _draft(agrees: list[bool], chances: list[float], most: int, confidence: float) -> tuple[int, int]:
    """How many tokens a round drafts, and how many of them are accepted."""
    most = min(most, len(agrees))
    unsure = next((i for i, chance in enumerate(chances[:most]) if chance < confidence), most - 1)
    length = unsure + 1
    agreed = next((i for i, agree in enumerate(agrees[:length]) if not agree), length)
    return length, agreed


def _cost(rounds: dict[int, tuple[float, float]], length: int) -> tuple[float, float]:
    """Intercept and slope for a draft of this length, between those that were measured."""
    if length in rounds:
        return rounds[length]
    below = max((d for d in rounds if d < length), default=None)
    above = min((d for d in rounds if d > length), default=None)
    if below is None or above is None:
        return rounds[above if below is None else below]
    part = (length - below) / (above - below)
    return tuple(a + part * (b - a) for a, b in zip(rounds[below], rounds[above], strict=True))


def _times(
    model: PreTrainedModel, prompt: Tensor, exit_layers: Sequence[int], draft_tokens: Sequence[int]
) -> tuple[float, dict[int, tuple[float, float]]]:
    """Seconds per token of plain decoding, and of rounds by length of the draft: intercept and slope over E.

    Each is the median of the differences between a longer and a shorter run, which leaves out the prompt, in turns.
    """
    low, high = exit_layers[0], exit_layers[len(exit_layers) // 2]
    runs = {(d, e): SelfSpeculation(exit_layer=e, draft_tokens=d) for d in draft_tokens for e in {low, high}}
    found: dict[Any, list[float]] = {key: [] for key in [None, *runs]}
    for _ in tqdm(range(REPEATS), desc="rounds", disable=None):
        for key in found:
            found[key].append(_pace(model, prompt, runs.get(key)))
    medians = {key: statistics.median(values) for key, values in found.items()}
    rounds = {}
    for d in draft_tokens:
        slope = (medians[d, high] - medians[d, low]) / (high - low) if high > low else 0.0
        rounds[d] = (medians[d, low] - slope * low, slope)
    return medians[None], rounds


def _pace(model: PreTrainedModel, prompt: Tensor, speculation: SelfSpeculation | None) -> float:
    """Seconds per round, or per token without speculation, of a short run."""
    start = time.perf_counter()
    _generate(model, prompt, 1)
    before = time.perf_counter()
    if speculation is None:
        count = len(_generate(model, prompt, 1 + ROUNDS)) - len(prompt) - 1
    else:
        enough = _Rounds(speculation)
        longest = 1 + ROUNDS * (speculation.draft_tokens + 1)
        _generate(model, prompt, longest, speculation, stopping_criteria=StoppingCriteriaList([enough]))
        count = speculation.report.rounds
    seconds = (time.perf_counter() - before) - (before - start)
    return max(seconds, 1e-9) / max(1, count)


class _Rounds(StoppingCriteria):
    """Ends a run after `ROUNDS` rounds, however many tokens they brought."""

    def __init__(self, speculation: SelfSpeculation):
        self.speculation = speculation

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.speculation.report.rounds >= ROUNDS, device=input_ids.device)


def _race(
    model: PreTrainedModel, prompts: Sequence[Tensor], row: dict[str, Any], draft: PreTrainedModel | None, new: int
) -> tuple[float, float, float]:
    """Tokens per second of plain decoding, how many times faster a candidate is, and its acceptance."""
    settings = {name: row[name] for name in ("exit_layer", "draft_tokens", "confidence")}
    speculation, speeds = SelfSpeculation(**settings, draft=draft), {True: [], False: []}
    drafted = accepted = 0
    for prompt in prompts:
        for speculates in (False, True):
            start = time.perf_counter()
            text = _generate(model, prompt, new, speculation if speculates else None)
            speeds[speculates].append((len(text) - len(prompt)) / (time.perf_counter() - start))
        drafted, accepted = drafted + speculation.report.drafted, accepted + speculation.report.accepted
    ratio = statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True))
    return statistics.median(speeds[False]), ratio, accepted / max(1, drafted)
