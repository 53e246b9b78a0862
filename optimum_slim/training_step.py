"""Steps that train a model with one call of `fit`: how its weights are trained, whatever the loss.

In full, by LoRA or QLoRA through PEFT, or the norms only. Adapters are merged into the 16-bit weights at the end (for
QLoRA as well: its 4-bit base exists during training only), or stay (`merge=False`).

Weights that a sparse step dropped stay dropped. Adapters on sparse layers are masked, in training as in the merge
(`sparse_training.py`), `"full"` trains the kept values, and the layers end as they came: packed ones with the same
index byte for byte, ordinary ones (`packed=False`) with zeros in the same places. Layers of codes (`bits`) train on
weights rounded to their grid, so that the loss that chooses the best state is that of what is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from .calibration import Calibration
from .fit_report import FitReport
from .fourbit import as_4bit, finish, nf4, remove_adapters
from .packed import linear_shape
from .sparse import SparseLinear
from .sparse_training import is_sparse, sparse_stand_ins, trained_values
from .step import Step
from .student import (
    add_adapters,
    differentiable,
    feed_forward_layers,
    merge_delta,
    own_tensors,
    put_back_unused,
    require_peft,
)
from .train import usual_precision


METHODS = ("lora", "qlora", "full", "norms")


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Step):
    """A step that trains the model it finds; its own fields say by which loss.

    Args:
        method (`str`): `"lora"`, `"qlora"` (LoRA on a 4-bit base, not for sparse layers), `"full"` (of sparse layers
            the kept values, not with `bits`) or `"norms"`.
        rank, alpha, dropout: of the adapters; `alpha` is `rank` by default. On sparse layers dropout makes a step
            about 1.5 times as long.
        target_modules (`str` or `tuple[str]`): what gets adapters: `"ffn"` for the feed-forward layers,
            `"all-linear"`, or names as PEFT takes them.
        steps (`int`): optimizer steps.
        batch_size (`int`): sequences per optimizer step; `micro_batch_size` of them go through the model at once.
        learning_rate, warmup_steps, weight_decay, max_grad_norm: AdamW under a cosine with linear warm-up, of at most
            a fifth of the steps.
        samples, length (`int`, *optional*): of the training data; by default those of the recipe's calibration.
        held_out (`float`): share of the samples that is kept apart; the best state on it is what is kept.
        evaluate_every, patience: steps between evaluations, and how many without progress end the training.
        activation_checkpointing (`bool`): less memory for more time.
        merge (`bool`): merge the adapters into the weights, or leave them in the model as a PEFT adapter.
        quantization (`dict`, *optional*): arguments of the `BitsAndBytesConfig` of `"qlora"`; by default nf4 with
            double quantization.
        seed (`int`): of adapters, data order and dropout.

    Raises:
        `ImportError`: PEFT (or bitsandbytes) is missing.
        `ValueError`: fields out of range, no layer to adapt, a loss that is not finite.
    """

    method: str = "lora"
    rank: int = 64
    alpha: int | None = None
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "ffn"
    steps: int = 100
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    samples: int | None = None
    length: int | None = None
    held_out: float = 0.05
    evaluate_every: int = 50
    patience: int | None = None
    activation_checkpointing: bool = False
    merge: bool = True
    quantization: dict[str, Any] | None = None
    seed: int = 0

    needs_data: ClassVar[bool] = True
    before_packing: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, found {self.method!r}")
        for name in ("rank", "steps", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, found {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate!r}")
        if not self.merge and self.method not in ("lora", "qlora"):
            raise ValueError(f"method={self.method!r} trains the weights themselves, so there is no adapter to keep")
        if self.quantization is not None and self.method != "qlora":
            raise ValueError(f"quantization is for method='qlora', found method={self.method!r}")

    def calibration(self, recipe: Calibration) -> Calibration:
        return recipe.resized(self.samples, self.length)

    def check_sparse(self, *, packed: bool, bits: int | None) -> None:
        """Raise a `ValueError` unless layers with dropped weights can be trained in this way.

        Args:
            packed: whether they are stored without the dropped weights, or are ordinary ones with zeros.
            bits: of their kept weights, or `None` for 16 or 32.
        """
        if self.method == "qlora":
            raise ValueError(
                "method='qlora' trains on a 4-bit copy, in which dropped weights of sparse layers are weights like "
                "others; use method='lora', which keeps the mask"
            )
        if self.method == "full" and bits is not None:
            raise ValueError(
                f"method='full' trains weights, and the kept weights of these layers are codes of {bits} bits; use "
                "method='lora', or prune with bits=None"
            )
        if not self.merge and not packed:
            raise ValueError(
                "merge=False would leave an adapter on ordinary layers with zeros, where PEFT knows no mask; use "
                "merge=True, or packed=True in the step that prunes"
            )

    def check_model(self, model: nn.Module) -> list[nn.Module]:
        """The sparse layers of a model. Raises a `ValueError` if they cannot be trained in this way."""
        sparse = [module for module in model.modules() if isinstance(module, SparseLinear) or is_sparse(module)]
        for module in sparse if self.method in ("qlora", "full") else ():
            self.check_sparse(packed=isinstance(module, SparseLinear), bits=getattr(module, "bits", None))
        return sparse

    def fit_settings(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What `fit` is told about a model of this dtype."""
        same = ("steps", "learning_rate", "batch_size", "micro_batch_size", "warmup_steps", "weight_decay", "seed")
        same += ("max_grad_norm", "held_out", "evaluate_every", "patience", "activation_checkpointing")
        return {name: getattr(self, name) for name in same} | {"mixed_precision": usual_precision(dtype, device)}

    def train(
        self, model: nn.Module, train: Callable[[torch.dtype], FitReport]
    ) -> tuple[list[dict[str, Any]], FitReport]:
        """Make `model` ready, call `train` with the dtype it was in, and leave in it what was trained.

        Returns:
            A row for each layer or parameter trained, and what `train` returned.
        """
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        by_method = self._train_adapters if self.method in ("lora", "qlora") else self._train_weights
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            try:
                return by_method(model, train)
            finally:
                if not getattr(model, "_hf_peft_config_loaded", False):
                    for name, parameter in model.named_parameters():
                        parameter.requires_grad_(flags[name])

    def _train_weights(self, model: nn.Module, train: Callable) -> tuple[list[dict[str, Any]], FitReport]:
        """Train all weights, or the norms', in fp32 copies that then take the dtype the weights had."""
        full = self.method == "full"
        with contextlib.ExitStack() as stack:
            if full:
                stack.enter_context(sparse_stand_ins(model))
                stack.enter_context(trained_values(model))
            names = [
                f"{name}.{key}" if name else key
                for name, module in model.named_modules()
                for key, parameter in module.named_parameters(recurse=False)
                if (full and parameter.is_floating_point()) or "norm" in type(module).__name__.lower()
            ]
            dtype = model.dtype
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            model.requires_grad_(False)
            own_tensors(model, names, dict.fromkeys(names, torch.float32), trained=True)
            try:
                report = train(dtype)
            finally:
                own_tensors(model, names, dtypes, trained=False)
            shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        return [{"name": name, "shape": shapes[name]} for name in names if name in shapes], report

    def _train_adapters(self, model: nn.Module, train: Callable) -> tuple[list[dict[str, Any]], FitReport]:
        require_peft()
        dtype, targets = model.dtype, self._targets(model)
        base = sparse_stand_ins(model)
        if self.method == "qlora":
            config = self._quantization(dtype)
            if self.merge:
                base = as_4bit(model, config)
            else:
                finish(model, config)
                base = differentiable(model)
        with base as originals:
            settings = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
            adapted = add_adapters(model, targets, **settings, rounded=self.merge)
            kept = False
            try:
                if self.method == "lora" and put_back_unused(model, originals, adapted):
                    self.check_sparse(packed=False, bits=None)
                rows = [{"name": name, "shape": list(linear_shape(layer.get_base_layer()))} for name, layer in adapted]
                report = train(dtype)
                kept = not self.merge
                for name, layer in adapted if self.merge else ():
                    linear = originals.get(name) if self.method == "qlora" else None
                    merge_delta(linear or layer.get_base_layer(), layer.get_delta_weight("default"))
            finally:
                if not kept:
                    remove_adapters(model)
        return rows, report

    def _quantization(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        if self.quantization is not None:
            return BitsAndBytesConfig(**self.quantization)
        return nf4(dtype)

    def _targets(self, model: nn.Module) -> str | list[str]:
        if self.target_modules != "ffn":
            return self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        names = feed_forward_layers(model)
        if not names:
            raise ValueError(
                f"found no feed-forward layer of nn.Linear in {type(model).__name__} (experts fused into 3-D "
                "parameters take no LoRA); pass target_modules='all-linear' or names, or method='norms'"
            )
        return names
