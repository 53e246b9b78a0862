"""The decoding loop of self-speculation; what it does is told in `speculation.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList

from .kv_cache import check_cache, forget, forget_past, record, rewind, view
from .pairing import Pairing
from .route import Route


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
class Decoding:
    """One call of `generate`: the rows as they grow, and the state of the cache."""

    model: PreTrainedModel
    drafter: PreTrainedModel  # the model itself, or its slimmed copy
    pairing: Pairing
    draft_tokens: int
    confidence: float
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    route: Route
    draft_route: Route  # that of the drafter
    report: SpeculationReport = field(default_factory=SpeculationReport)

    def run(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> GenerateDecoderOnlyOutput | Tensor:
        """Decode; the arguments are those of `GenerationMixin._sample`."""
        self.device = input_ids.device
        outputs = self.model._prefill(input_ids, self.config, model_kwargs)
        self.cache = getattr(outputs, "past_key_values", None)
        check_cache(self.cache)
        record(self.cache)
        self.layers = range(len(self.route.stack))
        self.views()
        special = (getattr(self.config, f"_{name}_token_tensor", None) for name in ("eos", "pad"))
        self.eos, self.pad = (None if token is None else token.to(self.device) for token in special)

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
        try:
            while not self.finished():
                self.round()
        finally:
            forget_past(self.cache)
        if self.streamer is not None:
            self.streamer.end()
        return self.result()

    def views(self) -> None:
        """The cache as each kind of pass is to see it."""
        places, shared = self.pairing.places, self.pairing.shared
        everything = list(self.layers)
        slots = list(places) + everything[len(places) :] if self.drafter is self.model else list(places)
        self.seen = {
            "draft": view(self.cache, slots, places),
            "early": view(self.cache, everything, range(shared)) if shared else None,
            "late": view(self.cache, everything, self.layers[shared:]),
        }

    def round(self) -> None:
        """Draft, verify, accept."""
        self.report.rounds += 1
        live = [row for row in range(len(self.rows)) if not self.done(row)]
        # Rows that are ahead draft beyond the end with the others; only positions can be held back (`forward`).
        ahead = min if self.positions is not None else max
        longest = max(1, self.config.max_length - ahead(len(self.rows[row]) for row in live))
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
        ended = torch.ones(len(last), dtype=torch.bool, device=last.device)  # gets no more tokens
        ended[live] = False
        keep = shared - 1 if shared else None
        for done in range(most):
            layers = range(len(self.pairing.places))
            output, behind_shared = self.forward(self.drafter, current, "draft", done, layers, keep=keep)
            logits = output.logits[:, -1].float().to(self.device)
            kept.append(behind_shared)
            scores = logits
            if self.processors:
                behind = [torch.cat([row, *(step[i] for step in tokens)]) for i, row in enumerate(self.rows)]
                scores = self.processed(range(len(behind)), behind, logits)
            if self.config.do_sample:
                chances.append(scores.softmax(-1))
                current = torch.multinomial(chances[-1], 1)
            else:
                current = scores.argmax(-1, keepdim=True)
            if self.pad is not None:  # as generation goes on behind the end of a text
                current = torch.where(ended[:, None], self.pad, current)
            tokens.append(current)
            if self.eos is not None:
                ended |= torch.isin(current[:, 0], self.eos)
            unsure = ended
            if self.confidence:
                unsure = ended | (scores.softmax(-1).amax(-1) < self.confidence)
            if bool(unsure[live].all()):
                break
        if shared:
            early = {"layers": range(shared), "keep": keep, "head": False}
            kept.append(self.forward(self.model, current, "early", len(tokens), **early)[1])
        drafted = torch.cat(tokens, dim=1) if tokens else last[:, :0]
        forget(self.cache, self.pairing.places[shared:], len(tokens))
        return drafted, chances, torch.cat(kept, dim=1) if shared else None

    def verify(self, tokens: Tensor, states: Tensor | None) -> Tensor:
        """The model's logits, fp32 (batch, count + 1, vocabulary), for the last token and the drafted ones."""
        late = self.layers[self.pairing.shared :]
        return self.forward(self.model, tokens, "late", 0, late, states)[0].logits.float().to(self.device)

    def forward(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        which: str,
        ahead: int,
        layers: range,
        states: Tensor | None = None,
        keep: int | None = None,
        head: bool = True,
    ) -> tuple[Any, Tensor | None]:
        """A pass over `tokens`, int64 (batch, count), the first of which lies `ahead` of the last accepted one.

        Args:
            which: how it is to see the cache.
            layers, states, keep, head: as for `Route.run`.

        Returns:
            What the model returned, and the states that were to be kept.
        """
        count = tokens.shape[1]
        inputs = {"input_ids": tokens.to(model.device), "past_key_values": self.seen[which], "use_cache": True}
        if self.mask is not None:
            inputs["attention_mask"] = nn.functional.pad(self.mask, (0, ahead + count), value=1)
        if self.positions is not None:
            steps = torch.arange(ahead, ahead + count, device=self.positions.device)
            inputs["position_ids"] = (self.positions + steps).clamp(max=self.config.max_length - 1)
        route = self.draft_route if which == "draft" else self.route
        route.run(layers, states=states, keep=keep, head=head)
        try:
            return model(**inputs, return_dict=True), route.kept
        finally:
            route.run(range(len(route.stack)))  # processors and criteria may call the model, too

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
        cut at their end, or filled as if they had ended.
        """
        if not self.processors:
            return logits[rows]
        scores = torch.empty_like(logits)
        for length in set(map(len, tokens)):
            members = {row: found for row, found in zip(rows, tokens, strict=True) if len(found) == length}
            batch = [members[i] if i in members else self.fitted(other, length) for i, other in enumerate(self.rows)]
            found = self.processors(torch.stack(batch), logits.clone())
            scores[[*members]] = found[[*members]].to(scores.dtype)
        return scores[rows]

    def fitted(self, tokens: Tensor, length: int) -> Tensor:
        """So many of a row's first tokens; behind a shorter row its end and padding."""
        missing = length - len(tokens)
        if missing <= 0:
            return tokens[:length]
        end = tokens[-1:] if self.eos is None else self.eos.reshape(-1)[:1]
        fill = end if self.pad is None else self.pad.reshape(-1)[:1]
        return torch.cat([tokens, end, fill.expand(missing - 1)])

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
        if self.pad is not None:
            sequences.fill_(self.pad)
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


def _accept(token: Tensor, draft: Tensor, model: Tensor) -> tuple[Tensor, bool]:
    """Keep a token drawn from `draft` (vocabulary,) with min(1, p/q), else draw from what `model` has more of."""
    if torch.rand((), device=token.device) * draft[token] < model[token]:
        return token, True
    more = (model - draft).clamp(min=0)
    return torch.multinomial(more if more.sum() > 0 else model, 1)[0], False
