"""OneBit (arXiv 2402.11295): one bit a weight, the signs of a matrix between two vectors of scales.

A weight matrix is split into signs and magnitudes, and the magnitudes become a product of two vectors (SVID):

    W ~ S ∘ (a bᵀ)        S = sign(W),  a bᵀ = the best rank-1 matrix for |W|,  a and b without negative entries

so that a layer scales its inputs by b, adds and subtracts them by the signs, and scales the sums by a. The error is
||W||² - σ₁(|W|)², never more than that of the best rank-1 matrix for W itself, which has the magnitudes but not the
signs of the result. The paper factorizes |W| with NMF; for rank 1 that has the same optimum as the largest singular
pair of |W|, which power iteration finds without another package.

`OneBit()` stops there. It needs no data and takes seconds, and the model is hardly of use: signs alone lose too much
of a matrix that was not trained for them. It is the start of two stages of training, one or both:

- `block_steps`, in the manner of EfficientQAT (arXiv 2407.11062): one decoder layer after the other learns to put out
  what the dense one did (`optimum_slim/blockwise.py`).
- `steps`, the paper's distillation: all layers at once learn to give the teacher's predictions and hidden states
  (`optimum_slim/sign_training.py`).

A layer in training takes 16 bytes for each weight: in the first stage those of one decoder layer, in the second (and
in the first if both are asked for) those of the model. Embeddings, the output head and norms stay as they are.

In the paper's layers (`variant="paper"`) the outputs are normalized to mean 0 and variance 1 for each token, without
weights, which throws away how much each layer adds to the residual stream; all of it has to be learned again.
`variant="plain"` leaves the outputs alone, so that the layer stands in for the dense one before any training.

Cost: 1 + 16 (1 / in + 1 / out) bits a weight.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._kernels import pack_signs
from ..blockwise import outcome, train_blocks
from ..calibration import Calibration
from ..latent_model import LatentModel
from ..packed import SCALE_DTYPES, linear_shape, linear_weight
from ..sign import SignLinear
from ..sign_training import STARTS, LatentSignLinear, SignDistillation, first_latents
from ..step import LinearStep, StepReport, check_weight, layer_row, register
from ..train import fit, usual_precision
from ..walk import decoder_layers


CHOICES = {
    "variant": ("plain", "paper"),
    "start": (None, *STARTS),
    "activation_bits": (8, None),
    "scale_dtype": tuple(SCALE_DTYPES),
}
MOST_ITERATIONS = 500
TOLERANCE = 1e-6  # change of the unit vector in one iteration


@register("onebit", paper="OneBit: Towards Extremely Low-bit Large Language Models (NeurIPS 2024, arXiv 2402.11295)")
@dataclass(frozen=True, kw_only=True)
class OneBit(LinearStep):
    """Signs and two vectors of scales, with or without training.

    Args:
        variant (`str`): `"plain"`, or `"paper"` with a layer normalization behind each product, which is of use only
            with training.
        start (`str`, *optional*): of the latents behind the signs: `"weights"`, in proportion to the weights (default
            of `"plain"`), or `"signs"`, all of one magnitude (default of `"paper"`).
        block_steps, block_learning_rate: optimizer steps for each decoder layer by itself, and their peak rate.
        steps, learning_rate: optimizer steps for all layers together, after those, and their peak rate; the paper
            takes 1e-4 to 4e-4.
        hidden_weight (`float`): of the hidden states in the loss of `steps`.
        batch_size, micro_batch_size, warmup_steps, weight_decay, max_grad_norm, held_out, evaluate_every, patience,
            activation_checkpointing, seed: see `fit`. Of the parameters only latents decay.
        samples, length (`int`, *optional*): of the training data; by default those of the recipe's calibration.
        activation_bits (`8` or `None`): int8 activations per token, or activations left as they are, as in the paper.
        scale_dtype (`str`): `"float16"`, `"bfloat16"` or `"float32"`: how scales are stored.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.

    Raises:
        `ValueError`: fields out of range; with `block_steps` a linear layer outside the decoder layers.
        `FloatingPointError`: training diverged. The model is then what it was before.
    """

    variant: str = "plain"
    start: str | None = None
    block_steps: int = 0
    block_learning_rate: float = 1e-3
    steps: int = 0
    learning_rate: float = 1e-3
    hidden_weight: float = 1.0
    batch_size: int = 8
    micro_batch_size: int | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    held_out: float = 0.05
    evaluate_every: int = 50
    patience: int | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    samples: int | None = None
    length: int | None = None
    activation_bits: int | None = None
    scale_dtype: str = "float16"

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, found {getattr(self, name)!r}")
        for name, least in {"batch_size": 1, "block_steps": 0, "steps": 0}.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer of at least {least}, found {getattr(self, name)!r}")
        for name in ("block_learning_rate", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)!r}")
        if not self.hidden_weight >= 0:
            raise ValueError(f"hidden_weight must not be negative, found {self.hidden_weight!r}")
        if self.start is None:
            object.__setattr__(self, "start", "signs" if self.variant == "paper" else "weights")

    @property
    def needs_data(self) -> bool:
        return self.trains

    @property
    def trains(self) -> bool:
        return self.block_steps > 0 or self.steps > 0

    @property
    def needs_teacher(self) -> bool:
        return self.steps > 0

    def calibration(self, recipe: Calibration) -> Calibration:
        return recipe.resized(self.samples, self.length) if self.trains else recipe

    def resolve(self, model: nn.Module) -> OneBit:
        step = super().resolve(model)
        if self.block_steps:
            prefix, _ = decoder_layers(model)
            if outside := [name for name in step.targets(model) if not name.startswith(f"{prefix}.")]:
                raise ValueError(
                    f"block_steps trains inside decoder layers, but these linear layers lie outside {prefix}: "
                    f"{outside}. Add them to modules_to_not_convert, or use steps alone"
                )
        return step

    def empty(self, linear: nn.Module) -> SignLinear:
        out_features, in_features = linear_shape(linear)
        return SignLinear(
            in_features,
            out_features,
            linear.bias is not None,
            post_norm=self.variant == "paper",
            activation_bits=self.activation_bits,
            scale_dtype=SCALE_DTYPES[self.scale_dtype],
            transposed=type(linear) is not nn.Linear,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        scale_out, scale_in = svid(weight)
        return {"weight": pack_signs(weight < 0), "weight_in": scale_in, "weight_out": scale_out}

    def apply(self, model: nn.Module, tokens: Tensor | None = None, *, teacher=None, journal=None) -> StepReport:
        if not self.trains:
            return super().apply(model, tokens)
        begun = time.perf_counter()
        dense = self.targets(model)
        for name, linear in dense.items():
            check_weight(name, linear.weight)
        held, notes, tables = LatentModel(model, dense, self.latent), [], {}
        journal = {stage: None if journal is None else Path(journal) / stage for stage in ("blocks", "all")}
        try:
            if self.block_steps:
                tables["blocks"] = self._train_blocks(held, tokens, journal["blocks"], notes)
            else:
                held.hold_latent()
            if self.steps:
                tables["training"] = self._train_all(held, tokens, teacher, journal["all"], notes)
                held.hold_packed()
        except BaseException:
            held.restore()
            raise
        finally:
            held.restore_flags()
        rows = [layer_row(name, model.get_submodule(name), linear_weight(dense[name]).detach()) for name in dense]
        return StepReport(self.to_dict(), time.perf_counter() - begun, rows, notes, tables)

    def latent(self, name: str, linear: nn.Module, *unused: Any) -> LatentSignLinear:
        """The layer that trains in the place of `linear`; see `LatentModel`."""
        weight = linear_weight(linear).detach().float()
        return LatentSignLinear(self.empty(linear), first_latents(weight, self.start), *svid(weight), linear.bias)

    def _train_blocks(self, held: LatentModel, tokens, journal, notes: list[str]) -> list[dict[str, Any]]:
        """The block-wise stage; layers stay in training if all are trained together afterwards."""
        reports = list(
            train_blocks(
                held.model,
                tokens,
                held.hold_latent,
                lambda block: None if self.steps else held.hold_packed(block),
                steps=self.block_steps,
                learning_rate=self.block_learning_rate,
                **self._settings(held.model),
                journal=journal,
                settings=self.to_dict(),
                description="OneBit, layer",
            )
        )
        notes.append(outcome(reports))
        return [dataclasses.asdict(report) for report in reports]

    def _train_all(self, held: LatentModel, tokens, teacher, journal, notes: list[str]) -> list[dict[str, Any]]:
        """All layers together, as in the paper."""
        held.model.requires_grad_(False)
        for module in held.model.modules():
            if isinstance(module, LatentSignLinear):
                module.requires_grad_(True)
        report = fit(
            held.model,
            tokens,
            SignDistillation(teacher, self.hidden_weight),
            steps=self.steps,
            learning_rate=self.learning_rate,
            activation_checkpointing=self.activation_checkpointing,
            **self._settings(held.model),
            journal=journal,
            description="OneBit",
        )
        notes.append(f"trained all layers together: {report.outcome()}")
        return report.history

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        """What both stages hand to `fit`."""
        names = (
            *("batch_size", "micro_batch_size", "warmup_steps", "weight_decay", "max_grad_norm"),
            *("held_out", "evaluate_every", "patience", "seed"),
        )
        settings = {name: getattr(self, name) for name in names}
        return settings | {"mixed_precision": usual_precision(model.dtype, model.device)}


def svid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The best vectors a, b for W ~ sign(W) ∘ (a bᵀ), as scales of the outputs and of the inputs.

    Power iteration for the largest singular pair of |W| from its column sums, which are positive, so that it cannot
    miss it. The singular value is shared evenly, ||a|| = ||b||.

    Args:
        weight: (out, in), fp32.

    Returns:
        a (out,) and b (in,), fp32, without negative entries; zeros for a matrix of zeros.
    """
    magnitude = weight.abs()
    largest = magnitude.max()
    if largest == 0:
        return magnitude.new_zeros(len(weight)), magnitude.new_zeros(weight.shape[1])
    magnitude /= largest
    right = F.normalize(magnitude.sum(0), dim=0)
    for _ in range(MOST_ITERATIONS):
        previous, right = right, F.normalize((magnitude @ right) @ magnitude, dim=0)
        if (right - previous).norm() <= TOLERANCE:
            break
    left = magnitude @ right  # of length σ₁, and for this vector the best whether the iteration has ended or not
    root = left.norm().sqrt()
    return left / root * largest.sqrt(), right * root * largest.sqrt()
