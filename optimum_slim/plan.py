"""What a recipe would do to a model, from its config alone: no weight is read and nothing is written."""

from dataclasses import dataclass, field

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SlimConfig
from .packed import linear_shape, model_bytes
from .report import megabytes, show
from .step import LinearStep, matches


WORK_COPIES = 3  # fp32 copies of one weight while it is packed: the weight, its codes, and the error


@dataclass
class Plan:
    """What each step would touch.

    Args:
        touched: (step, layer name, shape (out, in), stored bits per weight).
        dense: (name, shape, why it stays dense), for every linear layer and embedding.
        bytes_before, bytes_after: of all weights, dense and slimmed.
        peak_memory: estimate for the run; `peak_memory_of` says what it adds up.
    """

    touched: list[tuple[str, str, tuple[int, ...], float]] = field(default_factory=list)
    dense: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    peak_memory: int = 0
    peak_memory_of: str = ""

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
        ratio = self.bytes_after / max(self.bytes_before, 1)
        return [
            table,
            f"weights {megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)} ({ratio:.2f}x)",
            f"peak memory about {megabytes(self.peak_memory)}: {self.peak_memory_of}",
        ]


def plan(model: nn.Module, config: SlimConfig) -> Plan:
    """Lay the recipe of `config` out on `model`, which must be on the meta device and is changed.

    Raises:
        ValueError: the recipe cannot work on this model, as it would in the run itself.
    """
    result = Plan(bytes_before=model_bytes(model))
    asked = {pattern for step in config.steps for pattern in getattr(step, "modules_to_not_convert", None) or ()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    head = model.get_output_embeddings()
    largest = 0
    for step in config.steps:
        step = step.resolve(model)
        if isinstance(step, LinearStep):
            for name, linear in step.targets(model).items():
                packed = step.empty(linear)
                shape = linear_shape(linear)
                largest = max(largest, shape[0] * shape[1])
                result.touched.append((step.name, name, shape, packed.stored_bits() / (shape[0] * shape[1])))
        step.skeleton(model)
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D, nn.Embedding):
            continue
        why = "embedding" if isinstance(module, nn.Embedding) else "no step packs it"
        why = "asked for by modules_to_not_convert" if matches(name, asked) else why
        why = "output head" if module is head else why
        why = f"{why}, tied" if name in tied else why
        shape = tuple(module.weight.shape) if isinstance(module, nn.Embedding) else linear_shape(module)
        result.dense.append((name, shape, why))
    result.bytes_after = model_bytes(model)
    _estimate_memory(result, model, config, largest)
    return result


def _estimate_memory(result: Plan, model: nn.Module, config: SlimConfig, largest: int) -> None:
    work = WORK_COPIES * 4 * largest
    if not any(step.needs_data for step in config.steps):
        result.peak_memory = result.bytes_after + work
        result.peak_memory_of = "packed weights and the work on one layer; the files are read tensor by tensor"
        return
    text = model.config.get_text_config()
    widest = max((shape[1] for _, _, shape, _ in result.touched), default=0)
    tokens = config.calibration.samples * config.calibration.length
    element = torch.tensor([], dtype=getattr(model, "dtype", torch.float32)).element_size()
    activations = 2 * tokens * text.hidden_size * element
    result.peak_memory = result.bytes_before + activations + 2 * 4 * widest**2 + work
    result.peak_memory_of = (
        f"dense weights, hidden states of {tokens:,} calibration tokens, Gram matrices and the work on one layer"
    )
