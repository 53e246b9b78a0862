"""LoRA on packed layers, for PEFT: what it takes to merge an adapter into weights that are not there.

PEFT's own LoRA layer trains, saves and loads over a `PackedLinear`, which is an `nn.Linear` to it. Merging is what
it cannot do, since it adds the adapter to `weight`, and there are only packed bytes. `PackedLoraLinear` merges into a
dense copy instead and keeps the packed layer aside:

    W_merged = dense(packed) + scaling * B A        unmerge: the packed layer, bit for bit

Over a `SparseLinear` a dense delta would bring back what was dropped. `SparseLoraLinear` trains and merges a masked
one (`sparse_training.py`), and what it merges into is sparse and packed as before:

    W_merged = W + scaling * M ∘ (B A)              the same index, byte for byte; new values, rounded once

Importing this module imports PEFT; `optimum_slim.adapters` does so once PEFT itself has been imported.
"""

import dataclasses
import logging

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

from .memory import shared_copy
from .packed import PackedLinear
from .sparse import SparseLinear
from .sparse_training import MaskedDelta, product, set_weight
from .step import LinearStep


logger = logging.getLogger(__name__)

DATA_FREE_STARTS = ("gaussian", "eva")  # values of init_lora_weights that never read the base weight


class PackedLoraLinear(Linear):
    """PEFT's LoRA layer over a `PackedLinear`. By the "Linear" in its name PEFT finds it for "all-linear".

    Raises:
        `ValueError`: the adapter's configuration needs dense base weights (DoRA, PiSSA, OLoRA, LoftQ and the like).
    """

    def update_layer(self, adapter_name, *args, config, **kwargs):
        check_plain_lora(config)
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        base = self.get_base_layer()
        self.fan_in_fan_out = getattr(base, "transposed", self.fan_in_fan_out)  # the delta has the dense layer's shape

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply from a dense fp32 copy that holds the adapter, until `unmerge`."""
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        if not self.merged:
            packed = self.base_layer
            self.__dict__["packed"] = packed  # not a submodule: it stays out of the state dict while merged
            self.base_layer = packed.to_linear(torch.float32).requires_grad_(False)
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            if not self.merged:
                self._restore()

    def unmerge(self) -> None:
        """Go back to the packed layer, bit for bit."""
        if self.merged:
            self.merged_adapters.clear()
            self._restore()

    def _restore(self) -> None:
        device = self.base_layer.weight.device
        self.base_layer = self.__dict__.pop("packed").to(device)

    def forward(self, x, *args, **kwargs):
        if self.merged and not self.disable_adapters:
            return super().forward(x.to(self.base_layer.weight.dtype), *args, **kwargs).to(x.dtype)
        return super().forward(x, *args, **kwargs)


class SparseLoraLinear(PackedLoraLinear):
    """PEFT's LoRA layer over a `SparseLinear`, which changes kept weights only and merges into a `SparseLinear`.

    All adapters without dropout are one product with the base layer. Dropout acts on what the adapter sees and not on
    what the base layer sees, so in training each adapter with dropout is a product of its own.

    Attributes:
        rounded (`bool`): with `bits`, train on the rounded weights that a merge gives (`sparse_training.py`).
        lost: with `bits`, once merged: ||Q - W'||² and ||W' - W||², what rounding lost of what the adapters changed.
    """

    rounded = False
    lost = (0.0, 0.0)

    def update_layer(self, adapter_name, *args, config, **kwargs):
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        self.fan_in_fan_out = False  # the delta is (out, in), whichever way round the dense layer had it

    def get_delta_weight(self, adapter) -> Tensor:
        return super().get_delta_weight(adapter).masked_fill(~self.base_layer.mask(), 0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply from a sparse layer that holds the adapter, until `unmerge`; NaNs are refused in any case."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        packed, names = self.__dict__.get("packed", self.base_layer), [*self.merged_adapters, *names]
        weight, merged = self.exact_weight(packed, names), shared_copy(packed)
        set_weight(merged, weight)
        if any(self.lora_bias[name] for name in names):
            if packed.bias is None:
                raise RuntimeError("an adapter with lora_bias=True cannot be merged into a layer without bias")
            merged.bias = nn.Parameter(self._bias(packed, names).detach().to(packed.bias.dtype), requires_grad=False)
        if packed.bits is not None:
            self.lost = tuple(float((weight - of.dense()).square().sum()) for of in (merged, packed))
        self.__dict__["packed"], self.base_layer, self.merged_adapters = packed, merged, names

    def exact_weight(self, layer: SparseLinear, names: list[str]) -> Tensor:
        """The weight of `layer` with these adapters before it is rounded, fp32 (out, in)."""
        return layer.dense().add_(sum(self.get_delta_weight(name).detach().float() for name in names))

    def forward(self, x, *args, **kwargs):
        if self.merged or self.disable_adapters or kwargs.get("adapter_names") is not None:
            return Linear.forward(self, x, *args, **kwargs)  # a merged layer is sparse: no dense one's dtype to match
        self._check_forward_args(x, *args, **kwargs)
        return self._adapted(x, [name for name in self.active_adapters if name in self.lora_A])

    def _mixed_batch_forward(self, x, *args, adapter_names: list[str], **kwargs):
        y = self.base_layer(x)
        for name in set(adapter_names) & set(self.lora_A):
            rows = [row for row, asked in enumerate(adapter_names) if asked == name]
            y[rows] = self._adapted(x[rows], [name]).to(y.dtype)
        return y

    def _adapted(self, x: Tensor, names: list[str]) -> Tensor:
        dropping = [n for n in names if self.training and getattr(self.lora_dropout[n], "p", 0) > 0]
        plain, y = [n for n in names if n not in dropping], None
        if plain:
            y = self._product(x, plain)
            if (bias := self._bias(self.base_layer, plain)) is not None:
                y = y + bias.to(y.dtype)
        else:
            y = self.base_layer(x)
        for name in dropping:
            change = self._product(self.lora_dropout[name](x), [name], base=False)
            y = y + (change + self._lora_bias(name) if self.lora_bias[name] else change).to(y.dtype)
        return y

    def _product(self, x: Tensor, names: list[str], base: bool = True) -> Tensor:
        factors = [layer[name].weight for name in names for layer in (self.lora_A, self.lora_B)]
        scales = tuple(self.scaling[name] for name in names)
        return product(x, MaskedDelta(self.base_layer, scales, base, self.rounded), *factors)

    def _bias(self, layer: SparseLinear, names: list[str]) -> Tensor | None:
        found = [self._lora_bias(name) for name in names if self.lora_bias[name]]
        return sum(found) + (0 if layer.bias is None else layer.bias) if found else layer.bias

    def _lora_bias(self, name: str) -> Tensor:
        return self.lora_B[name].bias * self.scaling[name]


class PackedLoraModel(LoraModel):
    """PEFT's `LoraModel`, the same for every layer that is not packed."""

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, PackedLinear):
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if kwargs.pop("parameter_name", None) is not None:
            raise ValueError(
                "target_parameters names the weight of a packed layer, which is bytes; name the layer in "
                "target_modules, or call model.dequantize() first"
            )
        kind = SparseLoraLinear if isinstance(base, SparseLinear) else PackedLoraLinear
        return kind(target, adapter_name, config=lora_config, **kwargs)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, PackedLoraLinear)}
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        merged = [name for name in layers if not isinstance(model.get_submodule(name), PackedLinear)]
        if merged and hasattr(model, "get_input_embeddings"):
            become_dense(model, merged)
        warn_of_rounding([layer for layer in layers.values() if isinstance(layer, SparseLoraLinear) and layer.merged])
        return model


def become_dense(model, merged: list[str]) -> None:
    """Give merged layers the model's dtype, and make the model one that saves and reloads with them.

    Without sparse layers, what no adapter was on is unpacked too, so that the model is an ordinary one. With sparse
    layers, which stay packed, the recorded recipe leaves the merged layers dense from now on.
    """
    dtype = model.get_input_embeddings().weight.dtype
    for name in merged:
        model.get_submodule(name).to(dtype)
    if getattr(model, "quantization_method", None) != "slim":
        return
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        model.dequantize(dtype)
        return
    config = model.config.quantization_config
    steps = [_leaving_dense(step, merged) if isinstance(step, LinearStep) else step for step in config.steps]
    model.hf_quantizer = AutoHfQuantizer.from_config(config.with_steps(steps), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config


def _leaving_dense(step: LinearStep, names: list[str]) -> LinearStep:
    dense = tuple(sorted({*(step.modules_to_not_convert or ()), *names}))
    return dataclasses.replace(step, modules_to_not_convert=dense)


def warn_of_rounding(layers: list[SparseLoraLinear]) -> None:
    """Say how much of what adapters changed was lost where they were merged into layers of codes."""
    lost, changed = (sum(layer.lost[index] for layer in layers) for index in (0, 1))
    if changed:
        logger.warning(
            "merged into %d layers whose weights lie on a grid of few bits: rounding to it took back %.0f%% of what "
            "the adapters had changed (||Q - W'||² / ||W' - W||²). Heal trains on rounded weights instead; or prune "
            "with bits=None before training adapters.",
            sum(layer.lost[1] > 0 for layer in layers),
            100 * lost / changed,
        )


def check_plain_lora(config) -> None:
    """Raise a `ValueError` unless the LoRA configuration works without the dense weight of the layer below."""
    asked = [f"init_lora_weights={config.init_lora_weights!r}"] if _reads_weights(config.init_lora_weights) else []
    for field in dataclasses.fields(config):
        if field.metadata.get("is_lora_variant") and getattr(config, field.name):
            asked.append(f"{field.name}={getattr(config, field.name)!r}")
    if asked:
        raise ValueError(
            f"packed layers take plain LoRA, but the adapter asks for {', '.join(asked)}; leave it out, or call "
            "model.dequantize() first to train over dense weights"
        )


def _reads_weights(start) -> bool:
    return isinstance(start, str) and start not in DATA_FREE_STARTS


def refuse_other_merges() -> None:
    """Let every tuner of PEFT but ours refuse to merge into packed bytes, which some would do without a word."""
    check = BaseTuner._check_merge_allowed

    def _check_merge_allowed(self):
        check(self)
        for name, module in self.model.named_modules():
            packed = isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLinear)
            if packed and not isinstance(module, PackedLoraLinear):
                raise ValueError(
                    f"{name} is packed, and {type(self).__name__} cannot merge into it; save the adapter, load the "
                    "model again, call model.dequantize() and load the adapter onto it to merge it there"
                )

    BaseTuner._check_merge_allowed = _check_merge_allowed


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = PackedLoraModel
refuse_other_merges()
