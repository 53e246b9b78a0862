"""Self-speculative decoding (LayerSkip, https://arxiv.org/abs/2404.16710, Section 4.3), through `generate`:

    model.generate(**inputs, custom_generate=SelfSpeculation(exit_layer=8, draft_tokens=6))

The first E decoder layers, with the final norm and the head, draft some tokens; the others verify all of them in one
pass. The verification enters with the states the draft left behind layer E, and both write one KV cache, so that no
layer runs twice for a token. The output is the model's own: greedy decoding gives the same tokens (up to ties that
rounding decides), sampling the same distribution (Leviathan et al., https://arxiv.org/abs/2211.17192).

A round, with n tokens so far of which the last has not run through any layer:

    1. draft: the first E layers run on token n, then on each drafted token but the last; so do norm and head
    2. they run on the last drafted token as well, without norm and head
    3. verify: the other layers run on the kept states of token n and of all drafted ones, in one pass
    4. drafted tokens are accepted up to the first that the model would not have chosen; it chooses that one. Where all
       are accepted it has chosen one more
    5. the cache is taken back to the accepted tokens

With `draft` another model drafts: a slimmed copy of this one, with fewer layers or fewer bits (`pairing.py`). Its
first layers that are those of the model itself are not run again; behind them it reads and writes the keys and values
of the layers it stands in for, which the verification then replaces by those of the model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin, StoppingCriteriaList
from transformers.integrations.fsdp import is_fsdp_managed_module

from .kv_cache import check_cache, forget, record, rewind, view
from .pairing import Pairing, pair
from .processes import place
from .route import Route
from .walk import decoder_layers


SETTINGS = "self_speculation"  # where a generation config keeps them
NEEDS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}  # of a text model
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


@dataclass
class SpeculationReport:
    """What one call of `generate` did.

    Args:
        tokens: generated, over all rows, without the first of each, which comes of the prompt.
        rounds: verification passes.
        drafted, accepted: tokens, over all rows that were not finished.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(eq=False)
class SelfSpeculation:
    """Pass it to `generate` as `custom_generate`; see the module.

    Without `exit_layer` and `draft`, the settings in the model's generation config are used (`tune_speculation`
    writes them; they may say that speculation does not pay, and then decoding is the ordinary one).

    Args:
        exit_layer (`int`, *optional*): E, the number of layers that draft, from 1 to all.
        draft_tokens (`int`, *optional*): tokens drafted in a round, at most. Default: 4.
        confidence (`float`, *optional*): a draft ends before its time when the likeliest token is less likely than
            this, in [0, 1). Default: 0, never.
        draft (`PreTrainedModel`, *optional*): a slimmed copy of the model that drafts in its place; `exit_layer` then
            counts its layers. Equal weights are shared with the model at the first use.
        draft_layers (`tuple[int]`, *optional*): which layer of the model each layer of the draft stands in for; by
            default found by their common weights.

    Its `report` tells about the last call.

    Raises:
        ValueError: a setting out of range; when called: what it cannot do (beams, other caches than the dynamic one,
            models with linear attention, returned attentions or hidden states, ...), by name.
    """

    exit_layer: int | None = None
    draft_tokens: int | None = None
    confidence: float | None = None
    draft: PreTrainedModel | None = None
    draft_layers: tuple[int, ...] | None = None
    report: SpeculationReport = field(default_factory=SpeculationReport, init=False)
    _paired: tuple[PreTrainedModel, Pairing] | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        for name in ("exit_layer", "draft_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        if self.confidence is not None and not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0, 1), found {self.confidence!r}")
        if self.draft_layers is not None and self.draft is None:
            raise ValueError("draft_layers says what the layers of draft stand in for; pass draft as well")

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` calls, with the arguments of `GenerationMixin._sample`."""
        streamer = streamer or _streamer_of_caller()
        settings = self._settings(model, generation_config)
        if settings is None:
            arguments = {"synced_gpus": synced_gpus, "streamer": streamer}
            return GenerationMixin._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config, **arguments, **model_kwargs
            )
        _check(model, input_ids, logits_processor, generation_config, streamer, model_kwargs)
        exit_layer, draft_tokens, confidence = settings
        drafter, pairing = self._drafter(model, exit_layer)
        decoding = _Decoding(model, drafter, pairing, draft_tokens, confidence)
        decoding.processors, decoding.criteria = logits_processor, stopping_criteria
        decoding.config = generation_config
        self.report = decoding.report
        with ExitStack() as routes:
            decoding.route = routes.enter_context(Route(model))
            decoding.draft_route = decoding.route
            if drafter is not model:
                decoding.draft_route = routes.enter_context(Route(drafter))
            return decoding.run(input_ids, streamer, model_kwargs)

    def _settings(self, model: PreTrainedModel, config: GenerationConfig) -> tuple[int | None, int, float] | None:
        """Exit layer, length of a draft and confidence; `None` for no speculation."""
        stored = getattr(config, SETTINGS, None) or getattr(model.generation_config, SETTINGS, None) or {}
        if self.exit_layer is None and self.draft is None:
            if "exit_layer" not in stored:
                raise ValueError(
                    "SelfSpeculation() takes its settings from generation_config.self_speculation, which is missing; "
                    "pass exit_layer and draft_tokens, or let tune_speculation(model, prompts) find them"
                )
            if stored["exit_layer"] is None:
                return None
        else:
            stored = {}
        exit_layer = self.exit_layer or stored.get("exit_layer")
        confidence = self.confidence if self.confidence is not None else stored.get("confidence", 0.0)
        return exit_layer, self.draft_tokens or stored.get("draft_tokens", 4), confidence

    def _drafter(self, model: PreTrainedModel, exit_layer: int | None) -> tuple[PreTrainedModel, Pairing]:
        count = len(decoder_layers(model)[1])
        if self.draft is None:
            drafter, pairing = model, Pairing(tuple(range(count)), count - 1)
        else:
            if self._paired is None or self._paired[0] is not model:
                self._paired = (model, pair(self.draft, model, self.draft_layers))
            drafter, pairing = self.draft, self._paired[1]
            count = len(pairing.places)
        if exit_layer is not None and exit_layer > count:
            raise ValueError(f"exit_layer={exit_layer}, but {type(drafter).__name__} has {count} decoder layers")
        return drafter, pairing.cut(exit_layer)


class _Decoding:
    """One call of `generate`: the rows as they grow, and the state of the cache."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    route: Route
    draft_route: Route

    def __init__(
        self, model: PreTrainedModel, drafter: PreTrainedModel, pairing: Pairing, draft_tokens: int, confidence: float
    ):
        self.model, self.drafter, self.pairing = model, drafter, pairing
        self.draft_tokens, self.confidence = draft_tokens, confidence
        self.report = SpeculationReport()

    def run(
        self, input_ids: Tensor, streamer: Any, model_kwargs: dict[str, Any]
    ) -> GenerateDecoderOnlyOutput | Tensor:
        config, model = self.config, self.model
        self.streamer, self.device = streamer, input_ids.device
        outputs = model._prefill(input_ids, config, model_kwargs)
        self.cache = outputs.past_key_values
        check_cache(self.cache)
        record(self.cache)
        self.layers = range(len(self.route.stack))
        self.views()

        self.rows = list(input_ids)  # the tokens of each row, as they grow
        self.prompt = input_ids.shape[1]
        self.mask = model_kwargs.get("attention_mask")
        position_ids = model_kwargs.get("position_ids")
        self.positions = None if position_ids is None else position_ids[:, -1:] + 1
        self.length = self.cache.get_seq_length()  # columns of the cache
        batch = len(self.rows)
        self.stop_at: list[int | None] = [None] * batch  # at which length a row was finished
        self.scores: list[list[Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[Tensor]] = [[] for _ in range(batch)]
        self.freezes = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

        first = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.device)
        del outputs
        every = self.processed(range(batch), self.rows, first)
        for row, scores in enumerate(every):
            self.append(row, self.choose(scores), first[row], scores)
        while not self.finished():
            self.round()
        if streamer is not None:
            streamer.end()
        return self.result()

    def views(self) -> None:
        """The cache as each kind of pass is to see it."""
        places, shared = self.pairing.places, self.pairing.shared
        everything = list(self.layers)
        slots = list(places) + everything[len(places) :] if self.drafter is self.model else list(places)
        self.seen = {
            "draft": view(self.cache, slots, places),
            "early": view(self.cache, everything, range(shared)) if shared else None,
            "late": view(self.cache, everything, self.layers[shared:] or self.layers),
        }

    def round(self) -> None:
        """Draft, verify, accept."""
        self.report.rounds += 1
        live = [row for row in range(len(self.rows)) if not self.done(row)]
        longest = self.config.max_length - min(len(self.rows[row]) for row in live)
        last = torch.stack([tokens[-1] for tokens in self.rows])[:, None]
        drafted, chances, states = self.make_draft(last, min(self.draft_tokens, longest - 1), live)
        logits = self.verify(torch.cat([last, drafted], dim=1), states)

        count = drafted.shape[1]
        behind = torch.zeros(len(self.rows), dtype=torch.int64)
        before = list(map(len, self.rows))
        self.accept(live, drafted, chances, logits)
        for row in live:
            added = len(self.rows[row]) - before[row]
            behind[row] = count + 1 - added
            self.report.tokens += added
            self.report.drafted += count
            self.report.accepted += added - 1
        going_on = [row for row in live if not self.done(row)]
        for row in set(range(len(self.rows))) - set(going_on):
            if going_on:  # what a finished row holds no longer matters, so it stays in line
                behind[row] = behind[going_on].min()
            elif row not in live:
                behind[row] = behind[live].min()
        self.take_back(count + 1, behind)

    def make_draft(self, last: Tensor, most: int, live: list[int]) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Up to `most` tokens for each row.

        Returns:
            The tokens, int64 (batch, count); when sampling, the distribution (batch, vocabulary) each was drawn from;
            and the states (batch, count + 1, hidden) of the last token and the drafted ones behind the shared layers,
            if there are any.
        """
        shared, current = self.pairing.shared, last
        tokens, chances, kept = [], [], []
        keep = shared - 1 if shared else None
        for done in range(most):
            self.draft_route.run(range(len(self.pairing.places)), keep=keep)
            logits = self.forward(self.drafter, current, "draft", done).logits[:, -1].float().to(self.device)
            kept.append(self.draft_route.kept)
            every = range(len(self.rows))
            behind = [torch.cat([row, *(step[i] for step in tokens)]) for i, row in enumerate(self.rows)]
            scores = self.processed(every, behind, logits)
            if self.config.do_sample:
                chances.append(scores.softmax(-1))
                current = torch.multinomial(chances[-1], 1)
            else:
                current = scores.argmax(-1, keepdim=True)
            tokens.append(current)
            if self.unpromising(scores, current, live):
                break
        if shared:
            self.route.run(range(shared), keep=keep, head=False)
            self.forward(self.model, current, "early", len(tokens))
            kept.append(self.route.kept)
        drafted = torch.cat(tokens, dim=1) if tokens else last[:, :0]
        forget(self.cache, self.pairing.places[shared:], len(tokens))
        return drafted, chances, torch.cat(kept, dim=1) if shared else None

    def unpromising(self, scores: Tensor, tokens: Tensor, live: list[int]) -> bool:
        """Whether no row is worth drafting on: it has come to an end, or is not confident."""
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        eos = getattr(self.config, "_eos_token_tensor", None)
        if eos is not None:
            ended |= torch.isin(tokens[:, 0], eos.to(tokens.device))
        if self.confidence:
            ended |= scores.softmax(-1).amax(-1) < self.confidence
        return bool(ended[live].all())

    def verify(self, tokens: Tensor, states: Tensor | None) -> Tensor:
        """The model's logits, fp32 (batch, count + 1, vocabulary), for the last token and the drafted ones."""
        self.route.run(self.layers[self.pairing.shared :], states=states)
        return self.forward(self.model, tokens, "late", 0).logits.float().to(self.device)

    def forward(self, model: PreTrainedModel, tokens: Tensor, which: str, ahead: int) -> Any:
        """A pass over `tokens`, int64 (batch, count), the first of which lies `ahead` of the last accepted one."""
        count = tokens.shape[1]
        inputs = {"input_ids": tokens.to(model.device), "past_key_values": self.seen[which], "use_cache": True}
        if self.mask is not None:
            inputs["attention_mask"] = nn.functional.pad(self.mask, (0, ahead + count), value=1)
        if self.positions is not None:
            steps = torch.arange(ahead, ahead + count, device=self.positions.device)
            inputs["position_ids"] = self.positions + steps
        return model(**inputs, return_dict=True)

    def accept(self, live: list[int], drafted: Tensor, chances: list[Tensor], logits: Tensor) -> None:
        """Append to each row the accepted tokens and the one that the model chooses behind them."""
        for position in range(drafted.shape[1] + 1):
            every = self.processed(live, [self.rows[row] for row in live], logits[:, position])
            going_on = []
            for row, scores in zip(live, every, strict=True):
                if position == drafted.shape[1]:
                    token, agreed = self.choose(scores), False
                elif self.config.do_sample:
                    token, agreed = _accept(drafted[row, position], chances[position][row], scores.softmax(-1))
                else:
                    token = self.choose(scores)
                    agreed = bool(token == drafted[row, position])
                self.append(row, token, logits[row, position], scores)
                if agreed:
                    going_on.append(row)
            live = [row for row in going_on if not self.done(row)]

    def processed(self, rows: Sequence[int], tokens: list[Tensor], logits: Tensor) -> Tensor:
        """The scores (rows, vocabulary) of what comes behind the tokens of some rows, from logits (batch, vocabulary).

        Processors may treat rows differently, so they see a whole batch at a time, in which rows of other lengths are
        cut, or filled on the left.
        """
        if not self.processors:
            return logits[rows]
        scores = torch.empty_like(logits)
        for length in set(map(len, tokens)):
            members = {row: found for row, found in zip(rows, tokens, strict=True) if len(found) == length}
            batch = [members[i] if i in members else _fitted(other, length) for i, other in enumerate(self.rows)]
            found = self.processors(torch.stack(batch), logits.clone())
            scores[[*members]] = found[[*members]]
        return scores[rows]

    def choose(self, scores: Tensor) -> Tensor:
        return torch.multinomial(scores.softmax(-1), 1)[0] if self.config.do_sample else scores.argmax(-1)

    def append(self, row: int, token: Tensor, logits: Tensor, scores: Tensor) -> None:
        """Add a token to a row, and look whether that ends it."""
        self.rows[row] = torch.cat([self.rows[row], token[None]])
        if self.streamer is not None:
            self.streamer.put(token[None].cpu())
        if self.config.return_dict_in_generate:
            if self.config.output_scores:
                self.scores[row].append(scores)
            if self.config.output_logits:
                self.logits[row].append(logits)
        seen = tuple(step[None] for step in self.scores[row]) if self.config.output_scores else None
        if self.stop_at[row] is None and bool(self.criteria(self.rows[row][None], seen).all()):
            self.stop_at[row] = len(self.rows[row])

    def done(self, row: int) -> bool:
        """Whether a row gets no more tokens; without an end-of-text token it goes on until all have ended."""
        if self.stop_at[row] is None:
            return False
        return self.freezes or (None not in self.stop_at and len(self.rows[row]) >= max(self.stop_at))

    def finished(self) -> bool:
        return all(self.done(row) for row in range(len(self.rows)))

    def take_back(self, run: int, behind: Tensor) -> None:
        """Take the cache back after `run` tokens to what was accepted, `behind` fewer in each row."""
        least = int(behind.min())
        shift = behind - least
        padding = 0
        columns = self.length + run - least
        if self.mask is not None or shift.any():
            mask = self.mask
            if mask is None:
                mask = torch.ones(len(self.rows), self.length, dtype=torch.int64, device=self.device)
            mask = nn.functional.pad(mask, (0, run - least), value=1)
            index = torch.arange(columns, device=mask.device) - shift.to(mask.device)[:, None]
            mask = mask.take_along_dim(index.clamp(min=0), dim=1) * (index >= 0)
            padding = int((mask.cumsum(1) == 0).sum(1).min())
            self.mask = mask[:, padding:]
        rewind(self.cache, behind, padding)
        self.length = columns - padding
        if self.positions is not None:
            self.positions = self.positions + (run - behind).to(self.positions.device)[:, None]

    def result(self) -> GenerateDecoderOnlyOutput | Tensor:
        longest = max(self.stop_at)
        sequences = self.rows[0].new_full((len(self.rows), longest), 0)
        pad = getattr(self.config, "_pad_token_tensor", None)
        if pad is not None:
            sequences.fill_(pad)
        for row, tokens in enumerate(self.rows):
            kept = tokens[:longest]
            sequences[row, : len(kept)] = kept
        if not self.config.return_dict_in_generate:
            return sequences
        aligned = len(set(map(len, self.rows))) == 1 and self.length == longest - 1
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.by_step(self.scores, longest) if self.config.output_scores else None,
            logits=self.by_step(self.logits, longest) if self.config.output_logits else None,
            past_key_values=self.cache if aligned else None,
        )

    def by_step(self, rows: list[list[Tensor]], longest: int) -> tuple[Tensor, ...]:
        """What was kept of each row as a tensor (batch, vocabulary) for each step; zeros where a row had ended."""
        nothing = torch.zeros_like(rows[0][0])
        steps = range(longest - self.prompt)
        return tuple(torch.stack([kept[step] if step < len(kept) else nothing for kept in rows]) for step in steps)


def _fitted(tokens: Tensor, length: int) -> Tensor:
    """So many of a row's last tokens, behind copies of its first one if it is shorter."""
    return torch.cat([tokens[:1].expand(max(0, length - len(tokens))), tokens[-length:]])


def _accept(token: Tensor, draft: Tensor, model: Tensor) -> tuple[Tensor, bool]:
    """Keep a token drawn from `draft` (vocabulary,) with min(1, p/q), else draw from what `model` has more of."""
    if torch.rand((), device=token.device) * draft[token] <= model[token]:
        return token, True
    more = (model - draft).clamp(min=0)
    return torch.multinomial(more if more.sum() > 0 else model, 1)[0], False


def _check(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise a `ValueError` for what self-speculation cannot do."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"self-speculation is for decoder-only models; {type(model).__name__} has an encoder")
    if config.num_beams > 1:
        raise ValueError(f"self-speculation keeps one sequence for each row, found num_beams={config.num_beams}")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"{name}=True is not possible: layers run at different times; generate without it")
    if unknown := model_kwargs.keys() - NEEDS:
        given = [name for name in sorted(unknown) if model_kwargs[name] is not None]
        if given:
            raise ValueError(f"self-speculation decodes text from token ids, found also {', '.join(given)}")
    position_ids = model_kwargs.get("position_ids")
    if position_ids is not None and position_ids.dim() != 2:
        raise ValueError(f"self-speculation takes position_ids (batch, length), found {tuple(position_ids.shape)}")
    for processor in processors:
        if type(processor).__name__ in STATEFUL:
            raise ValueError(
                f"{type(processor).__name__} remembers the tokens it has seen, which drafted ones would spoil; "
                "generate without custom_generate"
            )
    if len(input_ids) > 1:
        if streamer is not None:
            raise ValueError(f"a streamer takes one sequence, found a batch of {len(input_ids)}")
        if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
            raise ValueError("a cache of your own needs a batch of one: rows are moved in it")
    if place()[1] > 1 and is_fsdp_managed_module(model):
        raise ValueError("self-speculation runs other passes in each process, which a sharded model cannot")


def _streamer_of_caller() -> Any:
    """The streamer that `generate` was given: Transformers 5.23 does not hand it on to a custom method."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(2)
    return frame.f_locals.get("streamer") if frame.f_code is code else None
