"""`SlimQuantizer`: what Transformers calls while it loads, saves and dequantizes a model.

Loading with `quantization_config=SlimConfig(...)`: leading steps that need no data pack each tensor as it arrives, so
that a dense copy of the model never exists; the rest of the recipe runs on the loaded model. Loading a slim
checkpoint: the recorded recipe builds the packed skeleton on the meta device, and tensors load by name.
"""

import dataclasses
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .config import SlimConfig, from_stock_bitnet
from .memory import release_free_memory
from .methods.bitnet import check_stock_shapes, is_online
from .methods.depth import Depth
from .packed import PackedLinear, check_packed, model_bytes
from .recipe import record, run_steps
from .step import LinearStep, Step, StepReport, layer_row
from .surgery import from_checkpoint_names, to_checkpoint_names
from .walk import decoder_layers


class PackOnLoad(ConversionOps):
    """Turns one dense weight of the checkpoint into the packed tensors of its layer."""

    def __init__(self, quantizer: "SlimQuantizer"):
        self.quantizer = quantizer

    def convert(self, input_dict, model=None, **kwargs):
        state = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            module_name = name.removesuffix(".weight")
            packed = self.quantizer.pack(module_name, model.get_submodule(module_name), weight)
            state |= {f"{module_name}.{key}": nn.Parameter(t, requires_grad=False) for key, t in packed.items()}
        return state


class SlimQuantizer(HfQuantizer):
    """The `quant_method: slim` of Transformers; users meet it only as `model.hf_quantizer`."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = False
    is_compileable = True
    serialized_names = {  # noqa: RUF012
        "weight": [
            "weight",
            *("weight_scale", "weight_offset"),  # ternary, binary
            *("weight_values", "weight_rows", "weight_zero"),  # sparse
            *("weight_salient", "weight_columns"),  # binary
            *("weight_in", "weight_out", "weight_norm"),  # signs, and the norm inside a trained layer
        ]
    }
    quantized_element_size = 0.25

    def __init__(self, quantization_config: SlimConfig, **kwargs):
        super().__init__(quantization_config.with_steps(quantization_config.steps), **kwargs)
        stock = self.quantization_config.stock
        if stock is not None and is_online(stock):
            self.pre_quantized = False
        self.done: list[Step] = []
        self.reports: list[StepReport] = []
        self.packing: dict[str, tuple[int, str]] = {}
        self.kept: tuple[int, ...] | None = None
        self.error: Exception | None = None
        self.bytes_before = 0

    def is_serializable(self):
        return True

    def param_element_size(self, model, param_name, param):
        """Bytes per element for `device_map="auto"`; Transformers below 5.21 asks only this."""
        if self.param_needs_quantization(model, param_name):
            return self.quantized_element_size
        return param.element_size()

    def validate_environment(self, *args, device_map=None, **kwargs):
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and not self.pre_quantized:
            raise ValueError(
                "a model cannot be slimmed while part of it is offloaded to disk; slim and save it first "
                "(optimum-cli slim run), then load the result with this device_map"
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        if config.stock is not None:
            config.steps = (_with_stock_skips(config, model),)
        if self.pre_quantized:
            for step in config.steps:
                step.skeleton(model)
            check_checkpoint(model, checkpoint_files)
            return
        self.bytes_before = model_bytes(model)
        if any(step.needs_data for step in config.steps):
            config.calibration.check()
        for number, step in enumerate(config.steps):
            if self._cuts_on_load(step, config.steps[number + 1 :]):
                self._cut_on_load(model, step.resolve(model))
            elif self._packs_on_load(step, config.steps[number + 1 :]):
                self._pack_on_load(model, step if config.stock is not None else step.resolve(model))
            else:
                step.resolve(model)  # what cannot work is refused before the weights are read
                break
        if self.kept is not None:
            self._name_as_in_checkpoint(model)

    def _cuts_on_load(self, step: Step, later) -> bool:
        """Whether the step drops layers that are known now and that no later step learns from."""
        calibration = self.quantization_config.calibration
        learns = any(s.needs_teacher or (s.needs_data and s.calibration(calibration).source == "model") for s in later)
        return isinstance(step, Depth) and not step.needs_data and not learns

    def _packs_on_load(self, step: Step, later) -> bool:
        """Whether the step packs tensor by tensor, and no later step needs the model as it was."""
        taught = any(s.needs_teacher for s in later)
        return isinstance(step, LinearStep) and step.packed and not step.needs_data and not taught

    def _cut_on_load(self, model, step: Depth) -> None:
        kept = self.kept or tuple(range(len(decoder_layers(model)[1])))
        self.reports.append(step.apply(model))
        self.done.append(step)
        self.kept = tuple(layer for index, layer in enumerate(kept) if index not in step.layers)

    def _name_as_in_checkpoint(self, model) -> None:
        """Give the kept layers the names they have in the checkpoint, so that the dropped ones are never read."""
        names = {id(module): name for name, module in model.named_modules()}
        to_checkpoint_names(model, self.kept)
        renamed = {names[id(module)]: name for name, module in model.named_modules()}
        self.packing = {renamed[name]: entry for name, entry in self.packing.items()}

    def _pack_on_load(self, model, step: LinearStep) -> None:
        dtypes = {name: linear.weight.dtype for name, linear in step.targets(model).items()}
        step.skeleton(model)
        for name, dtype in dtypes.items():
            model.get_submodule(name).placeholder(dtype)
            self.packing[name] = len(self.done), name
        self.done.append(step)
        self.reports.append(StepReport(step.to_dict(), 0.0, notes=step.notes()))

    def param_needs_quantization(self, model, param_name, **kwargs):
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and name in self.packing

    def get_quantize_ops(self):
        return PackOnLoad(self)

    def pack(self, name: str, module: PackedLinear, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pack one weight that has just been read.

        Transformers turns an error raised here into a long load report of its own, so the first error is kept and
        raised, alone and as it was, once the weights are through; the tensors after it pass unpacked as zeros.
        """
        start, (index, final_name) = time.perf_counter(), self.packing[name]
        weight = weight.T if module.transposed else weight
        try:
            if self.error is None:
                module.load_packed(self.done[index].pack(final_name, weight))
                self.reports[index].layers.append(layer_row(final_name, module, weight))
                release_free_memory()
                self.reports[index].seconds += time.perf_counter() - start
                return {key: getattr(module, key).data for key in module.packed_tensors()}
        except (ValueError, TypeError) as error:
            self.error = error
        return {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in module.packed_tensors().items()}

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.error is not None:
            raise self.error
        if self.kept is not None:
            from_checkpoint_names(model, self.kept)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                _check_loaded(name, module)
        if self.pre_quantized:
            return
        config = self.quantization_config
        packed_on_load, self.packing = bool(self.packing), {}
        self.pre_quantized = True
        if not packed_on_load:
            self.remove_quantization_config(model)
            _forget_quantization(model)
        recorded, reports = run_steps(model, config.steps[len(self.done) :], config)
        record(model, config.with_steps([*self.done, *recorded]), [*self.reports, *reports], self.bytes_before)

    def get_state_dict_and_metadata(self, model):
        if self.quantization_config.save_format == "bitnet":
            check_stock_shapes(model)
        return None, {}

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained writes its name
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        for module in packed.values():  # before the first one is changed
            module.check_plain()
        for name, module in packed.items():
            model.set_submodule(name, module.to_linear(dtype))
        _forget_quantization(model)
        return model


def _forget_quantization(model) -> None:
    """Take the mark off the configs by which Transformers knows a quantized model."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.__dict__.pop("_is_quantized", None)


def _with_stock_skips(config: SlimConfig, model) -> Step:
    """The step with the linear layers that a stock `bitnet` checkpoint leaves dense, found as Transformers does."""
    patterns = HfQuantizer.get_modules_to_not_convert(
        model, config.stock.get("modules_to_not_convert"), model._keep_in_fp32_modules
    )
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    dense = tuple(sorted(name for name in linears if not should_convert_module(name, patterns)))
    return dataclasses.replace(config.steps[0], modules_to_not_convert=dense)


def check_checkpoint(model, checkpoint_files) -> None:
    """Compare the packed tensors in the files with the skeleton before anything is loaded.

    Raises:
        `ValueError`: a file is truncated, or a packed tensor is missing or has another shape or dtype than the
            recorded recipe gives it. (Transformers below 5.23 would load a wrong shape without a word.)
    """
    found = {}
    for file in checkpoint_files or ():
        if Path(file).suffix != ".safetensors":
            return
        try:
            with safe_open(file, framework="pt") as handle:
                found |= {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); download or save the model again") from error
    prefix = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        if found and isinstance(module, PackedLinear):
            for key, (shape, dtype) in module.packed_tensors().items():
                full = f"{name}.{key}"
                tensor = found.get(full) or found.get(full.removeprefix(prefix)) or found.get(prefix + full)
                if tensor is None:
                    raise ValueError(f"the checkpoint holds no {full}, which its recorded recipe asks for")
                if tuple(tensor.get_shape()) != tuple(shape) or (tensor.get_dtype() == "U8") != (dtype == torch.uint8):
                    raise ValueError(
                        f"{full} is {tensor.get_dtype()} {tuple(tensor.get_shape())} in the checkpoint where its "
                        f"recorded recipe needs {dtype} {tuple(shape)}; config.json and weights do not belong together"
                    )


def _check_loaded(name: str, module: PackedLinear) -> None:
    for key, (shape, dtype) in module.packed_tensors().items():
        parameter = getattr(module, key)
        parameter.requires_grad_(False)
        if parameter.device.type == "meta":
            continue
        check_packed(f"{name}.{key}", parameter, shape, dtype)
        if not getattr(parameter, "_is_hf_initialized", False):
            raise ValueError(f"{name}.{key} is missing from the checkpoint")
    if module.weight.device.type != "meta":
        try:
            module.validate()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _load_stock_bitnet() -> None:
    """Let `SlimConfig("bitnet")` be passed for a checkpoint of Transformers' own `bitnet` format.

    Transformers refuses a configuration of another class than the checkpoint's; there is no hook to say that this
    one reads it.
    """
    merge = AutoHfQuantizer.merge_quantization_configs

    def merge_quantization_configs(cls, quantization_config, quantization_config_from_args):
        saved, asked = quantization_config, quantization_config_from_args
        saved = saved if isinstance(saved, dict) else saved.to_dict()
        if isinstance(asked, SlimConfig) and saved.get("quant_method") == "bitnet":
            return from_stock_bitnet(saved, asked)
        return merge(quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)


if "slim" not in AUTO_QUANTIZER_MAPPING:
    register_quantizer("slim")(SlimQuantizer)
    _load_stock_bitnet()
