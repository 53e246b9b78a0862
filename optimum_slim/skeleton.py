"""A model without the weights of its decoder layers, for models that are larger than the memory.

`load_skeleton` lets Transformers load a checkpoint as always (names, dtypes, tied weights, buffers that no checkpoint
holds, the generation config), but hides the parameters of the decoder layers from it. They stay on the meta device
and are never read:

    embeddings | decoder layer 0 ... N-1 | final norm | head
    in memory  |  parameters on meta,    | in memory  | in memory
               |  buffers in memory      |            |

The place to hide them is the moment before the weights load, which Transformers offers to quantizers only; so this
module registers one, and takes its marks off the model again.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .surgery import _Patterns
from .walk import decoder_layers
from .weights import DTYPES, WeightFiles


METHOD = "slim-skeleton"


class CannotStream(ValueError):
    """Why a checkpoint cannot be read one decoder layer at a time."""


class SkeletonConfig(QuantizationConfigMixin):
    """Asks for a model whose decoder layers stay on the meta device; used by `load_skeleton` only."""

    def __init__(self, files: WeightFiles | None = None, **kwargs):
        self.quant_method = METHOD
        self.files = files

    def to_dict(self):
        return {"quant_method": self.quant_method}

    def __deepcopy__(self, memo):
        return SkeletonConfig(self.files)


class SkeletonQuantizer(HfQuantizer):
    """Hides the decoder layers' parameters while Transformers loads the rest."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self):
        return True

    def param_needs_quantization(self, model, param_name, **kwargs):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        prefix, stack = _stack(model)
        check_layers(model, self.quantization_config.files)
        self.hidden = [
            (module, key, parameter)
            for module in stack.modules()
            for key, parameter in module.named_parameters(recurse=False)
        ]
        for module, key, parameter in self.hidden:
            del module._parameters[key]
            module.__dict__[key] = parameter  # for initialization code, which does nothing to a meta tensor
        stem = re.escape(prefix.removeprefix(f"{model.base_model_prefix}."))  # a base model's checkpoint lacks it
        unread = rf"(^|\.){stem}\.\d+\."
        model._keys_to_ignore_on_load_unexpected = _Patterns(model._keys_to_ignore_on_load_unexpected, unread)

    def _process_model_after_weight_loading(self, model, **kwargs):
        model._keys_to_ignore_on_load_unexpected = model._keys_to_ignore_on_load_unexpected.original
        for module, key, parameter in self.hidden:
            del module.__dict__[key]
            module._parameters[key] = parameter
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)


def load_skeleton(source: str | Path, files: WeightFiles, *, dtype="auto", trust_remote_code: bool = False):
    """A model with everything in memory but the parameters of its decoder layers, which are on the meta device.

    Args:
        source: Hub id or local folder.
        files: its weight files.
        dtype: as for `from_pretrained`.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CannotStream: the checkpoint does not hold the layers' tensors as the model does; says why.
    """
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        quantization_config=SkeletonConfig(files),
        trust_remote_code=trust_remote_code or None,
    )
    if used := [c for c in getattr(model, "_weight_conversions", None) or () if isinstance(c, WeightConverter)]:
        raise CannotStream(f"Transformers converts its tensors while loading ({', '.join(used[0].target_patterns)})")
    for tensor in [*model.parameters(), *model.buffers()]:  # out of the mapped files into memory of their own
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()
    return model


def check_layers(model: PreTrainedModel, files: WeightFiles) -> None:
    """Raise `CannotStream` unless each parameter of the decoder layers is one tensor of the same name and shape."""
    prefix, stack = _stack(model)
    names = dict(stack.named_parameters(prefix=prefix, remove_duplicate=False))
    if len({id(parameter) for parameter in names.values()}) < len(names):
        raise CannotStream("its decoder layers share parameters")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if shared := sorted(names.keys() & {key for pair in tied.items() for key in pair}):
        raise CannotStream(f"its decoder layers have tied weights ({shared[0]})")
    wide = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in names.items():
        place = files.tensors.get(stored_name(model, name, files))
        if place is None:
            raise CannotStream(f"its files hold no tensor {name}, so Transformers makes it from others")
        if place.shape != tuple(parameter.shape):
            raise CannotStream(f"{name} is {place.shape} in its files and {tuple(parameter.shape)} in the model")
        if place.dtype not in DTYPES:
            raise CannotStream(f"{name} is stored as {place.dtype}")
        if any(re.search(rf"\b{re.escape(part)}\b", name) for part in wide):
            raise CannotStream(f"{name} is kept in another dtype than the model")


def stored_name(model: PreTrainedModel, name: str, files: WeightFiles) -> str:
    """The name of parameter `name` in the files, which lack the base model's prefix if that was saved alone."""
    return name if name in files.tensors else name.removeprefix(f"{model.base_model_prefix}.")


def to_meta(modules: Iterable[nn.Module]) -> None:
    """Give the memory of the modules' own parameters back; buffers, small and not in all checkpoints, stay."""
    for module in modules:
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[key] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def fill(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in place of the parameters of the same names."""
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        module = layer.get_submodule(owner)
        module._parameters[key] = nn.Parameter(tensor, requires_grad=module._parameters[key].requires_grad)


def _stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    try:
        return decoder_layers(model)
    except ValueError as error:
        raise CannotStream("no stack of decoder layers was found in it") from error


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(SkeletonQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(SkeletonConfig)
