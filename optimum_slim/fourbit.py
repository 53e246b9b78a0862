"""Quantizing a model in memory with bitsandbytes, for good or for the time of a training run.

Transformers quantizes with bitsandbytes only while it reads a checkpoint from disk. A model that has just been pruned
or healed is in memory already, so this module swaps its dense linear layers for bitsandbytes layers one by one:

    finish(model, config)               # for good: what from_pretrained(..., quantization_config=config) would give
    with as_4bit(model, config):        # for QLoRA: train adapters on the 4-bit base, then get the 16-bit layers back
        ...

Four bits a weight (nf4 or fp4; QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): the weight, row by row,
is cut into blocks of 64, and each block b keeps its largest absolute value a_b and for each weight the index i of the
nearest of 16 levels q, so that w ≈ a_b q_i. With double quantization the a_b, less their mean, are in turn stored in 8
bits with one fp32 scale for 256 of them. Eight bits (LLM.int8(), Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339): integers in [-127, 127] with one fp32 scale for each row.

Which layers are swapped, and into which bytes, is decided by Transformers' own code, called layer by layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .memory import release_free_memory
from .step import check_weight, matches


logger = logging.getLogger(__name__)

BLOCK_SIZE = 64  # weights that share one absolute maximum
STATISTICS_BLOCK_SIZE = 256  # absolute maxima that share one scale under double quantization


def finish(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Quantize `model` in place and leave it as `from_pretrained(..., quantization_config=config)` would.

    It saves, reloads, trains with PEFT and dequantizes like any bitsandbytes model, with no need of this package. Each
    dense weight is freed once its layer is quantized, so the two models never exist side by side. `config` stays with
    the model as `model.config.quantization_config`.

    Args:
        model (`PreTrainedModel`): dense, in fp16, bf16 or fp32, on the device where it is to be quantized.
        config (`BitsAndBytesConfig`): with `load_in_4bit` or `load_in_8bit`. As in Transformers, output head and tied
            weights stay dense unless `llm_int8_skip_modules` is given, which then names all that stays dense.

    Raises:
        `ImportError`: bitsandbytes is not installed.
        `TypeError`, `ValueError`: a model or config that cannot work, said before anything is changed.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"this model is quantized already ({getattr(model, 'quantization_method', 'unknown method')}); "
            "call model.dequantize() first or load it dense"
        )
    quantizer = _quantizer(model, config)
    dense = _dense_linears(model, _patterns(model, config))
    _warn_about_experts(model)
    for settings in (model.config, *(getattr(model.config, key, None) for key in model.config.sub_configs)):
        if settings is not None:
            settings.dtype = model.dtype
    quantizer.preprocess_model(model=model, device_map=getattr(model, "hf_device_map", None))
    for name in list(dense):
        _fill(model, name, dense.pop(name), quantizer)
        release_free_memory()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's 4 bits, nf4 with double quantization, computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def swap_linears(
    model: PreTrainedModel, config: BitsAndBytesConfig, modules_to_not_convert: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Put bitsandbytes layers in place of the dense linear layers, to be undone by `restore_linears`.

    The config and flags of the model stay as they are. The dense layers stay in memory, where the caller holds them.

    Args:
        model (`PreTrainedModel`): dense, in fp16, bf16 or fp32.
        config (`BitsAndBytesConfig`): as for `finish`.
        modules_to_not_convert: further modules that stay dense, by (part of) their dotted name or by shell pattern.

    Returns:
        The replaced modules by qualified name.

    Raises:
        `ImportError`, `TypeError`, `ValueError`: as for `finish`, with the model unchanged.
    """
    from transformers.integrations import replace_with_bnb_linear

    quantizer = _quantizer(model, config)
    left_out = [name for name, _ in model.named_modules() if matches(name, modules_to_not_convert)]
    patterns = _patterns(model, config) + left_out
    originals = _dense_linears(model, patterns)
    try:
        replace_with_bnb_linear(model, modules_to_not_convert=patterns, quantization_config=config)
        for name, linear in originals.items():
            _fill(model, name, linear, quantizer)
            # On CPUs with AVX512-BF16, bitsandbytes repacks a layer on its first evaluation into a form that passes
            # no gradient back, so that training after an evaluation would go wrong without a word.
            model.get_submodule(name).support_avx512bf16_for_cpu = False
    except BaseException:
        restore_linears(model, originals)
        raise
    return originals


def restore_linears(model: PreTrainedModel, originals: dict[str, nn.Module]) -> None:
    """Put the modules returned by `swap_linears` back, on the device and in the training mode of their stand-ins."""
    for name, module in originals.items():
        stand_in = model.get_submodule(name)
        device = next(stand_in.parameters()).device
        if device.type != "meta":
            module.to(device)
        model.set_submodule(name, module.train(stand_in.training))


@contextmanager
def as_4bit(
    model: PreTrainedModel, config: BitsAndBytesConfig, modules_to_not_convert: Sequence[str] = ()
) -> Iterator[dict[str, nn.Module]]:
    """Hold `model` quantized inside a `with` block, as PEFT needs it for QLoRA, and dense again after it.

    On leaving, also through an error, the dense layers are back as they were, adapters that are still in the model are
    removed, and the other parameters have the dtype and `requires_grad` they had. Read what the adapters learned
    inside the block:

        with as_4bit(model, config):
            tuner = LoraModel(model, lora_config, "heal")
            ...
            deltas = {name: module.get_delta_weight("heal") for name, module in model.named_modules() if ...}

    Args:
        model, config, modules_to_not_convert: as for `swap_linears`.

    Yields:
        The dense modules by qualified name.

    Raises:
        `ImportError`, `TypeError`, `ValueError`: as for `finish`, with the model unchanged.
    """
    originals = swap_linears(model, config, modules_to_not_convert)
    flag = "is_loaded_in_4bit" if config.load_in_4bit else "is_loaded_in_8bit"
    before = vars(model).get(flag)
    swapped = tuple(f"{name}." for name in originals)
    others = [(p, p.dtype, p.requires_grad) for n, p in model.named_parameters() if not n.startswith(swapped)]
    try:
        setattr(model, flag, True)
        yield originals
    finally:
        remove_adapters(model)
        restore_linears(model, originals)
        for parameter, dtype, requires_grad in others:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)
        if before is None:
            delattr(model, flag)
        else:
            setattr(model, flag, before)


def stored_bits_per_weight(config: BitsAndBytesConfig, in_features: int, out_features: int) -> float:
    """Bits per weight that one quantized layer takes in a checkpoint, from the config alone.

    Counts the packed weights with their scales and lookup tables, which are all tensors of the layer except its bias
    and the note of about 100 bytes in which bitsandbytes keeps shape and dtype of a 4-bit weight.

    Args:
        config (`BitsAndBytesConfig`): with `load_in_4bit` or `load_in_8bit`; bitsandbytes need not be installed.
        in_features, out_features (`int`): size of the layer.

    Raises:
        `TypeError`, `ValueError`: not a config that quantizes.
    """
    _check_config(config)
    weights = in_features * out_features
    if config.load_in_8bit:
        return 8 + (32 * out_features + 8) / weights  # row scales, and a byte that names the layout
    item = config.bnb_4bit_quant_storage.itemsize
    packed = (weights + 1) // (2 * item) * 8 * item
    blocks = ceil(weights / BLOCK_SIZE)
    if config.bnb_4bit_use_double_quant:
        absmax = 8 * blocks + 32 * ceil(blocks / STATISTICS_BLOCK_SIZE) + 32 * 256
    else:
        absmax = 32 * blocks
    return (packed + absmax + 32 * 16) / weights


def _check_config(config: BitsAndBytesConfig) -> None:
    if not isinstance(config, BitsAndBytesConfig):
        raise TypeError(f"expected a transformers.BitsAndBytesConfig, found {type(config).__name__}")
    if config.quantization_method() is None:
        raise ValueError(
            f"this BitsAndBytesConfig quantizes nothing (load_in_4bit={config.load_in_4bit}, bnb_4bit_quant_type="
            f"{config.bnb_4bit_quant_type!r}); set load_in_4bit=True with bnb_4bit_quant_type 'nf4' or 'fp4', or "
            "load_in_8bit=True"
        )
    if config.load_in_8bit and config.llm_int8_has_fp16_weight:
        raise ValueError(
            "llm_int8_has_fp16_weight=True keeps the weights in 16 bits, and such a model cannot be saved and "
            "reloaded; leave it False"
        )


def _quantizer(model: PreTrainedModel, config: BitsAndBytesConfig) -> HfQuantizer:
    """Transformers' own quantizer for `config`, once all that could fail later has been checked."""
    _check_config(config)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"BitsAndBytesConfig needs bitsandbytes, which cannot be imported ({error}); "
            'pip install "optimum-slim[bnb]"'
        ) from error
    if getattr(model, "peft_config", None):
        raise ValueError("this model carries PEFT adapters; merge or unload them before it is quantized")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter).__name__ in ("Params4bit", "Int8Params"):
            raise ValueError(
                f"{name} holds quantized weights ({parameter.dtype}) already, and bitsandbytes quantizes dense ones; "
                "call model.dequantize() first or load the model dense"
            )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment(device_map=getattr(model, "hf_device_map", None))
    return quantizer


def _patterns(model: PreTrainedModel, config: BitsAndBytesConfig) -> list[str]:
    return HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)


def _dense_linears(model: PreTrainedModel, patterns: list[str]) -> dict[str, nn.Module]:
    """The linear layers that Transformers would convert, by name, checked to be fit for it."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, patterns)
    }
    if not linears:
        raise ValueError(
            f"found no linear layer to quantize in {type(model).__name__}; told to stay dense: {sorted(patterns)}"
        )
    ties = model.all_tied_weights_keys or {}
    tied = {key for pair in ties.items() for key in pair}
    for name, linear in linears.items():
        if f"{name}.weight" in tied:
            raise ValueError(
                f"{name} shares its weight with another module, and quantizing it would break the tie; "
                f"add {name!r} to llm_int8_skip_modules, which replaces the default list of dense modules"
            )
        if linear.weight.device.type == "meta":
            raise ValueError(f"{name} is offloaded or on the meta device; load the whole model to memory first")
        check_weight(name, linear.weight)
        if linear.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{name}.weight has dtype {linear.weight.dtype}; bitsandbytes takes fp16, bf16 or fp32")
    return linears


def _fill(model: PreTrainedModel, name: str, linear: nn.Module, quantizer: HfQuantizer) -> None:
    """Quantize the weight of `linear` into the empty bitsandbytes layer that stands at `name`."""
    layer, key = model.get_submodule(name), f"{name}.weight"
    operation = quantizer.get_quantize_ops()
    layer.weight = operation.convert({key: [linear.weight.detach()]}, model=model, full_layer_name=key)[key]
    if linear.bias is not None:
        # A copy, since bitsandbytes casts it to the compute dtype and training may change it.
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
    layer.train(linear.training)


def _warn_about_experts(model: PreTrainedModel) -> None:
    fused = [name for name, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1]
    if fused:
        logger.warning(
            "%d fused 3-D expert parameters (first: %s) stay in %s: bitsandbytes quantizes only linear layers.",
            len(fused),
            fused[0],
            model.dtype,
        )


def remove_adapters(model: PreTrainedModel) -> None:
    """Take PEFT layers out of the model without merging them."""
    if not getattr(model, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
