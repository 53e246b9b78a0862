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
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .pairing import Pairing, pair
from .processes import place
from .route import Route
from .speculative_decoding import Decoding, SpeculationReport
from .walk import decoder_layers


DRAFT_TOKENS = 4  # in a round, by default
SETTINGS = "self_speculation"  # where a generation config keeps them
NEEDS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}  # of a text model
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


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
        if generation_config.num_beams > 1:
            raise ValueError(
                f"self-speculation keeps one sequence for each row, found num_beams={generation_config.num_beams}"
            )
        if settings is None:
            arguments = {"synced_gpus": synced_gpus, "streamer": streamer}
            return GenerationMixin._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config, **arguments, **model_kwargs
            )
        _check(model, input_ids, logits_processor, generation_config, streamer, model_kwargs)
        exit_layer, draft_tokens, confidence = settings
        drafter, pairing = self._drafter(model, exit_layer)
        of_generate = (logits_processor, stopping_criteria, generation_config, streamer)
        with ExitStack() as routes:
            route = routes.enter_context(Route(model))
            draft_route = route if drafter is model else routes.enter_context(Route(drafter))
            decoding = Decoding(
                model, drafter, pairing, draft_tokens, confidence, *of_generate, route=route, draft_route=draft_route
            )
            self.report = decoding.report
            return decoding.run(input_ids, model_kwargs)

    def _settings(self, model: PreTrainedModel, config: GenerationConfig) -> tuple[int | None, int, float] | None:
        """Exit layer, length of a draft and confidence; `None` for no speculation."""
        if self.exit_layer is not None or self.draft is not None:
            return self.exit_layer, self.draft_tokens or DRAFT_TOKENS, self.confidence or 0.0
        stored = getattr(config, SETTINGS, None) or getattr(model.generation_config, SETTINGS, None) or {}
        if "exit_layer" not in stored:
            raise ValueError(
                "SelfSpeculation() takes its settings from generation_config.self_speculation, which is missing; "
                "pass exit_layer and draft_tokens, or let tune_speculation(model, prompts) find them"
            )
        if stored["exit_layer"] is None:
            return None
        confidence = stored.get("confidence", 0.0) if self.confidence is None else self.confidence
        return stored["exit_layer"], self.draft_tokens or stored.get("draft_tokens", DRAFT_TOKENS), confidence

    def _drafter(self, model: PreTrainedModel, exit_layer: int | None) -> tuple[PreTrainedModel, Pairing]:
        count = len(decoder_layers(model)[1])
        if self.draft is None:
            drafter, pairing = model, Pairing(tuple(range(count)), count - 1)
        else:
            drafter, pairing = self.draft, pair(self.draft, model, self.draft_layers)  # either may have changed since
            count = len(pairing.places)
        if exit_layer is not None and exit_layer > count:
            raise ValueError(f"exit_layer={exit_layer}, but {type(drafter).__name__} has {count} decoder layers")
        return drafter, pairing.cut(exit_layer)


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
    text = model.config.get_text_config(decoder=True)
    for rope in _ropes(text):
        kind = rope.get("rope_type", rope.get("type"))
        limit = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        limit = limit or text.max_position_embeddings
        if kind in ("dynamic", "longrope") and config.max_length > limit:
            raise ValueError(
                f"{type(model).__name__} turns its positions otherwise in texts longer than {limit} tokens (rope_type "
                f"{kind!r}), so that several cannot be verified at once; generate at most so many, or without "
                "custom_generate"
            )
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
    if place()[1] > 1 and (is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()):
        raise ValueError("self-speculation runs other passes in each process, which a sharded model cannot")


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a text config, of which there may be one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def _streamer_of_caller() -> Any:
    """The streamer that `generate` was given: Transformers 5.23 does not hand it on to a custom method."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(2)
    return frame.f_locals.get("streamer") if frame.f_code is code else None
