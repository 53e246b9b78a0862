"""BitNet training: an ordinary model is trained until it works with ternary weights, or with signs alone.

BitNet b1.58 (arXiv 2402.17764) and b1 (arXiv 2310.11453) keep a latent weight in full precision for each stored one,
quantize it anew in every forward pass and let the gradient through (`optimum_slim/latent.py` has the equations). Such
models are meant to be trained from scratch on very many tokens. What helps to start from an ordinary model:

- lambda warm-up (Hugging Face, "Fine-tuning LLMs to 1.58bit"): weights and activations go to their quantized values
  little by little, over `lambda_steps`;
- SubLN (BitDistill, arXiv 2510.13998): an RMSNorm before the output projection of attention and before the last
  projection of the feed-forward part (`sub_norm`). The packed layers hold it, and so does Transformers' `bitnet`
  architecture. It starts at the root mean square that its inputs have, so that it changes little at first;
- distillation: the model's own logits before it was quantized are the targets, with next-token loss mixed in by
  `kl_weight`, and attention relations added by `relation_weight` (BitDistill);
- a block-wise stage (EfficientQAT, arXiv 2407.11062): `block_steps` steps for each decoder layer by itself. It trains
  one layer at a time and does most of the work on a small budget; `steps=0` leaves it at that;
- a start from `PT2LLM` (`init="pt2llm"`): its codes, scales and offsets, of which the latter two are trained as well.
  The layout stays that of `PT2LLM`; one scale for the whole matrix, as b1.58 has it, could not hold them.

Learning rate and weight decay come in two stages as for BitNet b1.58: in the second half the rate is two thirds and
nothing decays, because decay pulls latent weights over the borders between codes.

The model ends packed, and the packed layers do what those in training did at lambda = 1. Evaluations and the choice of
the best state are always at lambda = 1. Trained are the linear layers, the norms, scales and offsets; embeddings,
output head and biases stay as they are.

Cost: training all layers takes 16 bytes for each weight, besides the dense model, which is the teacher and what is put
back if training fails. Expect much less than full quality from less than many millions of tokens.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blockwise import outcome, train_blocks
from ..calibration import Calibration
from ..latent import AbsmeanLinear, GridLinear, LatentLinear, Share, SignsLinear, packed_absmean, packed_signs
from ..latent_model import LAST, LatentModel, is_last
from ..losses import Distillation, next_token_loss
from ..packed import PackedLinear, TernaryLinear, linear_shape, linear_weight
from ..relations import RelationDistillation
from ..schedules import SCHEDULES, STEEPNESS, quantized_share
from ..sign import SignLinear
from ..step import LinearStep, StepReport, check_weight, layer_row, register
from ..train import fit, usual_precision
from ..walk import decoder_layers, walk
from .bitnet import LINEAR_CLASSES
from .pt2llm import PT2LLM


CHOICES = {
    "variant": ("b1.58", "b1"),
    "init": ("weights", "pt2llm"),
    "activation_bits": (8, None),
    "linear_class": LINEAR_CLASSES,
    "loss": ("distill", "next_token"),
    "schedule": tuple(SCHEDULES),
    "lambda_schedule": tuple(STEEPNESS),
}


@register("bitnet_training", paper="The Era of 1-bit LLMs (arXiv 2402.17764), BitNet Distillation (arXiv 2510.13998)")
@dataclass(frozen=True, kw_only=True)
class BitNetTraining(LinearStep):
    """Quantization-aware training of an ordinary model to BitNet b1.58 or b1.

    Args:
        variant (`str`): `"b1.58"`, ternary, or `"b1"`, signs.
        init (`str`): `"weights"`, or `"pt2llm"` for ternary codes, scales and offsets of `PT2LLM` (not with `"b1"`).
        group_size (`int`): columns that share a scale and an offset, with `init="pt2llm"`.
        activation_bits (`8` or `None`): int8 activations (per token, with groups per token and group), or as they are.
        sub_norm (`bool`): put an RMSNorm before the last projections of attention and feed-forward part; its
            `norm_eps` is that of the model's norms by default.
        linear_class (`str`): how the scale of b1.58 is stored, see `BitNet`.
        block_steps, block_learning_rate: optimizer steps for each decoder layer by itself, and their peak rate.
        steps, learning_rate: optimizer steps for all layers together, after those, and their peak rate.
        schedule (`str`): of the latter, `"two_stage"` or `"cosine"`, see `fit`.
        lambda_steps (`int`, *optional*): over how many of the `steps` quantization comes; 0 is at once. By default
            1000 and at most half of the steps, and 0 after a block-wise stage.
        lambda_schedule, steepness: `"linear"`, `"exponential"` or `"sigmoid"` and its k, see `quantized_share`.
        loss (`str`): `"distill"`, from the model as it was before the recipe, or `"next_token"`; of `steps`.
        temperature, kl_weight: of the distillation, see `Distillation`.
        relation_weight, relation_layer: of attention relations, and at which layer; by default at three quarters of
            the depth. See `RelationDistillation`.
        batch_size, micro_batch_size, warmup_steps, weight_decay, max_grad_norm, held_out, evaluate_every, patience,
            activation_checkpointing, seed: see `fit`; block by block, weights do not decay.
        samples, length (`int`, *optional*): of the training data; by default those of the recipe's calibration.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.

    Raises:
        `ValueError`: fields out of range, or a model on which the step cannot work, before anything is changed.
        `FloatingPointError`: training diverged. The model is then what it was before.
    """

    variant: str = "b1.58"
    init: str = "weights"
    group_size: int = 128
    activation_bits: int | None = 8
    sub_norm: bool = False
    norm_eps: float | None = None
    linear_class: str = "bitlinear"
    block_steps: int = 0
    block_learning_rate: float = 1e-3
    steps: int = 1000
    learning_rate: float = 1e-4
    schedule: str = "two_stage"
    lambda_steps: int | None = None
    lambda_schedule: str = "linear"
    steepness: float | None = None
    loss: str = "distill"
    temperature: float = 1.0
    kl_weight: float = 1.0
    relation_weight: float = 0.0
    relation_layer: int | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    held_out: float = 0.05
    evaluate_every: int = 50
    patience: int | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    samples: int | None = None
    length: int | None = None

    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, found {getattr(self, name)!r}")
        for name, least in {"group_size": 1, "batch_size": 1, "block_steps": 0, "steps": 0}.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer of at least {least}, found {getattr(self, name)!r}")
        if not self.steps and not self.block_steps:
            raise ValueError("steps=0 and block_steps=0 train nothing; give one of them, or pack with PT2LLM")
        if self.variant == "b1" and self.init == "pt2llm":
            raise ValueError("init='pt2llm' gives ternary codes, and variant='b1' holds signs; use init='weights'")
        if self.relation_weight and (self.loss != "distill" or not self.steps):
            raise ValueError("relation_weight compares with the teacher; it needs loss='distill' and steps above 0")
        if self.lambda_steps is None:
            default = 0 if self.block_steps else min(1000, self.steps // 2)
            object.__setattr__(self, "lambda_steps", default)

    @property
    def needs_teacher(self) -> bool:
        return self.loss == "distill" and self.steps > 0

    def calibration(self, recipe: Calibration) -> Calibration:
        return recipe.resized(self.samples, self.length)

    def resolve(self, model: nn.Module) -> BitNetTraining:
        step = super().resolve(model)
        prefix, stack = decoder_layers(model)
        names = step.targets(model)
        outside = [name for name in names if not name.startswith(f"{prefix}.")]
        if outside and (self.block_steps or self.init == "pt2llm"):
            raise ValueError(
                f"these linear layers lie outside {prefix}, where decoder layers are not: {outside}. Add them to "
                "modules_to_not_convert, or use block_steps=0 and init='weights'"
            )
        if self.sub_norm and not any(map(is_last, names)):
            raise ValueError(f"sub_norm looks for modules named {', '.join(LAST)}; none of those to convert is")
        eps = getattr(model.config.get_text_config(decoder=True), "rms_norm_eps", None) or 1e-5
        layer = self.relation_layer
        return dataclasses.replace(
            step,
            norm_eps=(self.norm_eps or eps) if self.sub_norm else None,
            relation_layer=3 * len(stack) // 4 if self.relation_weight and layer is None else layer,
        )

    def for_layer(self, name: str) -> BitNetTraining:
        return self if is_last(name) else dataclasses.replace(self, sub_norm=False)

    def empty(self, linear: nn.Module) -> PackedLinear:
        out_features, in_features = linear_shape(linear)
        settings = {
            "activation_bits": self.activation_bits,
            "norm_eps": self.norm_eps if self.sub_norm else None,
            "transposed": type(linear) is not nn.Linear,
            "dtype": linear.weight.dtype,
            "device": "meta",
        }
        if self.variant == "b1":
            settings |= {"input_scale": False, "per_tensor": True, "scale_dtype": torch.float32}
            return SignLinear(in_features, out_features, linear.bias is not None, **settings)
        if self.init == "pt2llm":
            settings |= {"group_size": self.group_size, "offset": True, "scale_dtype": torch.float16}
        else:
            settings["reciprocal_scale"] = self.linear_class == "bitlinear"
        return TernaryLinear(in_features, out_features, linear.bias is not None, **settings)

    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """The layer as training starts with it, without its norm."""
        if self.variant == "b1":
            return packed_signs(weight)
        if self.init == "pt2llm":
            return PT2LLM(group_size=self.group_size).compress(weight, gram)
        return packed_absmean(weight, self.linear_class == "bitlinear")

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        begun = time.perf_counter()
        dense = self.targets(model)
        for name, linear in dense.items():
            check_weight(name, linear.weight)
        held, notes, tables = LatentModel(model, dense, self.latent), [], {}
        journal = {stage: None if journal is None else Path(journal) / stage for stage in ("blocks", "all")}
        start = self.start if self.init == "pt2llm" else None
        try:
            if self.sub_norm:
                held.measure_inputs(tokens)
            if self.block_steps:
                tables["blocks"] = self._train_blocks(held, tokens, start, journal["blocks"], notes)
            elif start is not None:
                for block in walk(model, tokens):
                    held.hold_latent(block, start)
            else:
                held.hold_latent()
            if self.steps:
                with held.training_all():
                    tables["training"] = self._train_all(held, tokens, teacher, journal["all"], notes)
                held.hold_packed()
        except BaseException:
            held.restore()
            raise
        finally:
            held.restore_flags()
        rows = [layer_row(name, model.get_submodule(name), linear_weight(dense[name]).detach()) for name in dense]
        return StepReport(self.to_dict(), time.perf_counter() - begun, rows, notes, tables)

    def latent(self, name: str, linear: nn.Module, share: Share, norm: Tensor | None, start=None) -> LatentLinear:
        """The layer that trains in the place of `linear`; see `LatentModel`."""
        settings = (self.for_layer(name).empty(linear), linear_weight(linear), linear.bias, share, norm)
        if start is not None:
            return GridLinear(*settings, start=start)
        return (SignsLinear if self.variant == "b1" else AbsmeanLinear)(*settings)

    def start(self, name: str, linear: nn.Module, gram: Tensor) -> dict[str, Tensor]:
        """The packed state from which `linear` starts, of the second moments of its inputs, fp32 (in, in)."""
        return self.pack(name, linear_weight(linear), gram)

    def _train_blocks(self, held: LatentModel, tokens, start, journal, notes: list[str]) -> list[dict[str, Any]]:
        """The block-wise stage; layers stay in training if all are trained together afterwards."""
        reports = list(
            train_blocks(
                held.model,
                tokens,
                lambda block: held.hold_latent(block, start),
                lambda block: None if self.steps else held.hold_packed(block),
                steps=self.block_steps,
                learning_rate=self.block_learning_rate,
                **self._settings(held.model),
                journal=journal,
                settings=self.to_dict(),
                description="BitNet training, layer",
            )
        )
        notes.append(outcome(reports))
        return [dataclasses.asdict(report) for report in reports]

    def _train_all(self, held: LatentModel, tokens, teacher, journal, notes: list[str]) -> list[dict[str, Any]]:
        """All layers together, lambda following the steps."""

        def set_share(step: int) -> None:
            held.share.value = quantized_share(step, self.lambda_steps, self.lambda_schedule, self.steepness)

        report = fit(
            held.model,
            tokens,
            self._loss(held.model, teacher),
            steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            before_step=set_share,
            activation_checkpointing=self.activation_checkpointing,
            **self._settings(held.model),
            journal=journal,
            description=f"BitNet training ({self.loss})",
        )
        notes.append(f"trained all layers together ({self.loss}): {report.outcome()}")
        return report.history

    def _loss(self, model: nn.Module, teacher: nn.Module | None):
        if self.loss == "next_token":
            return next_token_loss
        if not self.relation_weight:
            return Distillation(teacher, self.temperature, self.kl_weight)
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        settings = {"relation_weight": self.relation_weight, "layer": self.relation_layer, "heads": heads}
        return RelationDistillation(teacher, self.temperature, self.kl_weight, **settings)

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        """What both stages hand to `fit`."""
        names = (
            *("batch_size", "micro_batch_size", "warmup_steps", "max_grad_norm"),
            *("held_out", "evaluate_every", "patience", "seed"),
        )
        settings = {name: getattr(self, name) for name in names}
        return settings | {"mixed_precision": usual_precision(model.dtype, model.device)}
