"""LoRA on packed layers, for PEFT: what it takes to merge an adapter into weights that are not there.

PEFT's own LoRA layer trains, saves and loads over a `PackedLinear`, which is an `nn.Linear` to it. Merging is what
it cannot do, since it adds the adapter to `weight`, and there are only packed bytes. `PackedLoraLinear` merges into a
dense copy instead and keeps the packed layer aside:

    W_merged = dense(packed) + scaling * B A        unmerge: the packed layer, bit for bit

Importing this module imports PEFT; `optimum_slim.adapters` does so once PEFT itself has been imported.
"""

import dataclasses

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType
from torch import nn

from .packed import PackedLinear


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
        return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        names = [name for name, module in self.model.named_modules() if isinstance(module, PackedLoraLinear)]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        merged = [m for m in map(model.get_submodule, names) if not isinstance(m, PackedLinear)]
        if merged and hasattr(model, "get_input_embeddings"):
            become_dense(model, merged)
        return model


def become_dense(model, merged: list[nn.Module]) -> None:
    """Give merged layers the model's dtype and unpack what no adapter was on, so that the model is an ordinary one."""
    dtype = model.get_input_embeddings().weight.dtype
    for linear in merged:
        linear.to(dtype)
    if getattr(model, "quantization_method", None) == "slim":
        model.dequantize(dtype)


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
