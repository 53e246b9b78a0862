"""What a recipe would do to a model, from its config alone: no weight is read and nothing is written."""

from dataclasses import dataclass, field

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .config import SlimConfig
from .evaluate import logical_parameters
from .flops import Flops, flops_per_token
from .fourbit import stored_bits_per_weight
from .packed import linear_shape, model_bytes
from .report import megabytes, show
from .states import STATES_LIMIT
from .step import STEPS, LinearStep, Step, matches
from .walk import decoder_layers


WORK_COPIES = 3  # fp32 copies of one weight while it is packed: the weight, its codes, and the error


@dataclass
class Plan:
    """What each step would touch.

    Args:
        steps: (step, what it does to the model as a whole), for the steps that do not pack layer by layer.
        touched: (step, layer name, shape (out, in), stored bits per weight).
        dense: (name, shape, why it stays dense), for every linear layer and embedding.
        parameters_before, parameters_after: logical weights, tied ones once.
        bytes_before, bytes_after: of all weights, dense and slimmed.
        flops_before, flops_after: operations per token.
        nominal_bytes: what is often quoted for a recipe that ends in 4 or 8 bits: so many bits for every parameter;
            `nominal_bits` is their number, `None` for other recipes.
        quantized_bytes: what the layers that this last quantization reaches take as stored.
        peak_memory: estimate for the run; `peak_memory_of` says what it adds up.
        notes: what was assumed.
    """

    steps: list[tuple[str, str]] = field(default_factory=list)
    touched: list[tuple[str, str, tuple[int, ...], float]] = field(default_factory=list)
    dense: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    flops_before: Flops | None = None
    flops_after: Flops | None = None
    nominal_bits: int | None = None
    nominal_bytes: int = 0
    quantized_bytes: int = 0
    peak_memory: int = 0
    peak_memory_of: str = ""
    notes: list[str] = field(default_factory=list)

    def show(self, console: Console | None = None) -> None:
        """Print the plan, layers of the same shape and fate together."""
        show(self._parts, console)

    def _parts(self, style: box.Box) -> list:
        groups: dict[tuple, list[str]] = {}
        for step, name, shape, bits in self.touched:
            groups.setdefault((f"{step}, {bits:.3f} bits per weight", shape), []).append(name)
        for name, shape, why in self.dense:
            groups.setdefault((f"dense: {why}", shape), []).append(name)
        table = Table("what happens", "layers", "shape", "first of them", box=style)
        for (fate, shape), names in groups.items():
            table.add_row(fate, str(len(names)), "x".join(map(str, shape)), names[0])
        return [
            *(f"{step}: {what}" for step, what in self.steps),
            table,
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} "
            f"({_ratio(self.parameters_after, self.parameters_before)})",
            f"weights {megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)} "
            f"({_ratio(self.bytes_after, self.bytes_before)})",
            *self._quantized(),
            *self._flops(),
            f"peak memory about {megabytes(self.peak_memory)}: {self.peak_memory_of}",
            *self.notes,
        ]

    def _quantized(self) -> list[str]:
        if self.nominal_bits is None:
            return []
        rest = self.bytes_after - self.quantized_bytes
        return [
            f"nominal memory {megabytes(self.nominal_bytes)}: {self.nominal_bits} bits for each of the parameters",
            f"stored memory {megabytes(self.bytes_after)}: {megabytes(self.quantized_bytes)} in the quantized layers, "
            f"scales included, and {megabytes(rest)} in what stays dense (embeddings, output head, norms, biases)",
        ]

    def _flops(self) -> list[str]:
        before, after = self.flops_before, self.flops_after
        if before is None or after is None:
            return []
        experts = f", {after.experts}" if after.experts else ""
        lines = [
            f"FLOPs per token {before.products:.3g} -> {after.products:.3g} "
            f"({_ratio(after.products, before.products)}): 2 per weight of every matrix product, output head "
            f"included{experts}"
        ]
        if after.attention is None or before.attention is None:
            return [
                *lines,
                "attention over the context is left out: the config does not say the widths of its heads",
            ]
        where = f"attention over a full context of {after.context:,} tokens"
        return [*lines, f"{where} adds {before.attention:.3g} -> {after.attention:.3g}"]


def plan(model: nn.Module, config: SlimConfig, *, streamed: bool = False) -> Plan:
    """Lay the recipe of `config` out on `model`, which must be on the meta device and is changed.

    Args:
        streamed: the run reads, packs and writes one decoder layer at a time.

    Raises:
        ValueError: the recipe cannot work on this model, as it would in the run itself.
    """
    result = Plan(
        parameters_before=logical_parameters(model),
        bytes_before=model_bytes(model),
        flops_before=flops_per_token(model),
    )
    skeleton, layer = _skeleton_and_layer(model) if streamed else (0, 0)
    asked = {pattern for step in config.steps for pattern in getattr(step, "modules_to_not_convert", None) or ()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    largest = 0
    for step in config.steps:
        step = step.resolve(model)
        if isinstance(step, LinearStep):
            for name, linear in step.targets(model).items():
                packed = step.for_layer(name).empty(linear)
                shape = linear_shape(linear)
                largest = max(largest, shape[0] * shape[1])
                result.touched.append((step.name, name, shape, packed.stored_bits() / (shape[0] * shape[1])))
            step.sketch(model)
        else:
            result.steps.append((step.name, _sketched(step, model)))
    head = model.get_output_embeddings()
    result.parameters_after = logical_parameters(model)
    result.bytes_after = unquantized = model_bytes(model)
    result.flops_after = flops_per_token(model)
    quantized = _quantize(result, model, config.then) if config.then is not None else set()
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D, nn.Embedding) or name in quantized:
            continue
        why = "embedding" if isinstance(module, nn.Embedding) else "no step packs it"
        why = "asked for by modules_to_not_convert" if matches(name, asked) else why
        why = "output head" if module is head else why
        why = f"{why}, tied" if name in tied else why
        shape = tuple(module.weight.shape) if isinstance(module, nn.Embedding) else linear_shape(module)
        result.dense.append((name, shape, why))
    _estimate_memory(result, model, config, largest, unquantized)
    if streamed:
        _estimate_streamed(result, model, config, largest, skeleton, layer)
    return result


def _sketched(step: Step, model: nn.Module) -> str:
    """Change the model as `step` would, and say which of its decoder layers are gone."""
    layers = list(decoder_layers(model)[1])
    step.sketch(model)
    kept = {id(layer) for layer in decoder_layers(model)[1]}
    dropped = [index for index, layer in enumerate(layers) if id(layer) not in kept]
    if not dropped:
        return "changes values, not sizes"
    count = f"drops {len(dropped)} of {len(layers)} decoder layers"
    if step.needs_data:
        metric = getattr(step, "metric", None)
        return f"{count}; which ones is chosen on the calibration data{f' by {metric}' if metric else ''}"
    return f"{count}: {_ranges(dropped)}"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs written out by their ends, as in "3, 5 to 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _quantize(result: Plan, model: nn.Module, then) -> set[str]:
    """Account for the quantization that ends the recipe; returns the names of the layers it reaches."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, then.llm_int8_skip_modules, model._keep_in_fp32_modules)
    name = f"bitsandbytes {then.bnb_4bit_quant_type}" if then.load_in_4bit else "bitsandbytes int8"
    names, stored = set(), 0.0
    for module_name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(module_name, skipped):
            shape, weight = linear_shape(module), module.weight
            bits = stored_bits_per_weight(then, shape[1], shape[0])
            result.touched.append((name, module_name, shape, bits))
            result.bytes_after -= weight.numel() * weight.element_size()
            stored += weight.numel() * bits / 8
            names.add(module_name)
    if fused := sum(parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in model.parameters()):
        result.notes.append(
            f"{fused} fused 3-D expert parameters stay dense: bitsandbytes quantizes linear layers only"
        )
    result.nominal_bits = 4 if then.load_in_4bit else 8
    result.nominal_bytes = result.parameters_after * result.nominal_bits // 8
    result.quantized_bytes = round(stored)
    result.bytes_after += result.quantized_bytes
    return names


def _estimate_memory(result: Plan, model: nn.Module, config: SlimConfig, largest: int, unquantized: int) -> None:
    work = WORK_COPIES * 4 * largest
    packs = "packed weights and the work on one layer" if largest else "the weights that are kept"
    if not any(step.needs_data for step in config.steps):
        result.peak_memory = unquantized + work
        dense = ", dense until all are read" if config.then is not None else ""
        result.peak_memory_of = f"{packs}{dense}; the files are read tensor by tensor"
        return
    row = model.config.get_text_config().hidden_size * torch.empty(0, dtype=model.dtype).element_size()
    tokens = config.calibration.samples * config.calibration.length
    if any(isinstance(step, LinearStep) and step.needs_data for step in config.steps):
        widest = max((shape[1] for step, _, shape, _ in result.touched if step in STEPS), default=0)
        result.peak_memory = result.bytes_before + 2 * tokens * row + 2 * 4 * widest**2 + work
        result.peak_memory_of = (
            f"dense weights, hidden states of {tokens:,} calibration tokens, Gram matrices and the work on one layer"
        )
    else:
        result.peak_memory = result.bytes_before
        result.peak_memory_of = "dense weights; the activations of a batch of calibration samples come on top"
    if any(step.trains for step in config.steps):
        result.notes.append(
            "training adds what it trains in fp32, gradients and optimizer state for it, and the activations of a "
            "batch; these are not in the peak memory"
        )


def _skeleton_and_layer(model: nn.Module) -> tuple[int, int]:
    """Bytes of what lies outside the decoder layers, and of the largest decoder layer."""
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(model)[1]]
    return model_bytes(model) - sum(layers), max(layers)


def _estimate_streamed(result: Plan, model, config: SlimConfig, largest: int, skeleton: int, layer: int) -> None:
    (step,) = config.steps
    result.peak_memory = skeleton + 2 * layer + WORK_COPIES * 4 * largest
    what = "the work on one linear layer; decoder layers are read, packed and written one at a time"
    if step.needs_data:
        row = model.config.get_text_config().hidden_size * torch.empty(0, dtype=model.dtype).element_size()
        tokens = config.calibration.samples * config.calibration.length
        widest = max((shape[1] for _, _, shape, _ in result.touched), default=0)
        streams = 2 if step.asymmetric else 1
        result.peak_memory += streams * (min(tokens * row, STATES_LIMIT) + 4 * widest**2)
        what = (
            f"hidden states of {tokens:,} calibration tokens (beyond {megabytes(streams * STATES_LIMIT)} in a file), "
            f"Gram matrices and {what}"
        )
    result.peak_memory_of = f"embeddings and head, two decoder layers, {what}"
    if step.needs_data and isinstance(config.calibration.source, str) and config.calibration.source == "model":
        result.notes.append(
            "drawing the samples from the model itself maps all its files; those pages make room when memory is short"
        )


def _ratio(after: int, before: int) -> str:
    return f"{after / max(before, 1):.2f}x"
