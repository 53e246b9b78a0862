"""Packing the decoder layers of a skeleton one after the other, each finished one written to a run folder.

`LayerPacking` is what a walk visits the layers with: called with an index, it makes the context in which the dense
weights of that layer are in memory. The step packs the layer in there, and before the hidden states pass through it,
it is written; when the context ends, its parameters are back on the meta device. A layer that an earlier run has
finished is loaded in its packed form at that same point, so that the layers behind it see what they would have seen.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .memory import release_free_memory, shared_copy
from .skeleton import fill, stored_name, to_meta
from .states import HiddenStates
from .step import LinearStep, StepReport, step_from_dict
from .walk import decoder_layers
from .weights import WeightFiles


class LayerPacking:
    """Packs `model`, a skeleton, into the folder of `run`.

    Args:
        model: what `load_skeleton` made.
        files: its dense weights.
        run: where finished layers go.
        states_limit: bytes of hidden states to keep in memory.
    """

    def __init__(self, model, files: WeightFiles, run: Checkpoint, states_limit: int):
        self.model, self.files, self.run, self.states_limit = model, files, run, states_limit
        self.prefix, self.stack = decoder_layers(model)

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        layer, name = self.stack[index], f"{self.prefix}.{index}"
        dense = list(layer.modules())
        for key, parameter in list(layer.named_parameters()):
            if parameter.is_meta:
                stored = stored_name(self.model, f"{name}.{key}", self.files)
                fill(layer, {key: self.files.read(stored, parameter.dtype)})
        try:
            yield
        finally:
            to_meta(dense)  # also those that were replaced, which others may still refer to
            to_meta(self.stack[index].modules())
            release_free_memory()

    def states(self) -> HiddenStates:
        """An empty sequence for hidden states."""
        return HiddenStates(self.run.path, self.states_limit)

    def prepare(self, step: LinearStep, tokens: Tensor | None) -> None:
        """Let a resolved step decide on the data what it must, and find out what the result will look like."""
        self.tokens, self.names = tokens, list(step.targets(self.model))
        if step.needs_data:
            allocated = self.run.allocation()
            if allocated is None:
                self.run.keep_allocation(allocated := step.allocate(self.model, tokens, self).to_dict())
            step = step_from_dict(allocated)
        self.step = step
        self.template = shared_copy(self.model)
        step.skeleton(self.template)
        self.template.eval()

    def pack(self) -> StepReport:
        """Pack what is not packed yet; then all layers are in the run folder and, packed, on the meta device."""
        done = self.run.finished()
        missing = [index for index in range(len(self.stack)) if index not in done]
        outside = [] if self.step.needs_data else self._pack_outside()
        if missing:
            packing = self._calibrated(done) if self.step.needs_data else self._alone(missing)
            start = time.perf_counter()
            for index, rows in packing:
                if index in done:
                    self._load(index)
                else:
                    seconds = time.perf_counter() - start
                    self.run.keep(index, self._tensors(index), rows, seconds)
                    done[index] = {"rows": rows, "seconds": seconds}
                start = time.perf_counter()
                if index == missing[-1] < len(self.stack) - 1:
                    break
            packing.close()
        for index in range(len(self.stack)):
            self._take_shape(index)
        layers = [row for index in sorted(done) for row in done[index]["rows"]]
        if outside:
            order = {name: number for number, name in enumerate(self.names)}
            layers = sorted([*outside, *layers], key=lambda row: order[row["name"]])
        seconds = sum(entry["seconds"] for entry in done.values())
        return StepReport(self.step.to_dict(), seconds, layers, self.step.notes())

    def _calibrated(self, done: dict[int, Any]) -> Iterator[tuple[int, list[dict]]]:
        """Let the step visit the layers with their inputs; of those that are done it packs nothing."""
        finished = tuple(f"{self.prefix}.{index}." for index in done)
        left = [name for name in self.names if not name.startswith(finished)]
        yield from enumerate(self.step.visit(self.model, self.tokens, left, self))

    def _alone(self, missing: list[int]) -> Iterator[tuple[int, list[dict]]]:
        """Pack layers for which no data are needed."""
        for index in missing:
            with self(index):
                names = [name for name in self.names if name.startswith(f"{self.prefix}.{index}.")]
                yield index, [self.step.replace(self.model, name) for name in names]

    def _pack_outside(self) -> list[dict]:
        """Pack the linear layers outside the decoder layers, in memory as they are."""
        return [self.step.replace(self.model, n) for n in self.names if not n.startswith(f"{self.prefix}.")]

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """What a checkpoint holds of a layer that is in memory."""
        tensors = self.stack[index].state_dict(prefix=f"{self.prefix}.{index}.")
        for name in self.model._keys_to_ignore_on_save or ():
            tensors.pop(name, None)
        return tensors

    def _take_shape(self, index: int) -> None:
        """Give a layer the modules that its packed form has, on the meta device."""
        for name in self.names:
            if name.startswith(f"{self.prefix}.{index}."):
                self.model.set_submodule(name, self.template.get_submodule(name))

    def _load(self, index: int) -> None:
        """Put the packed form of a finished layer in place of the dense one."""
        self._take_shape(index)
        parameters = {name for name, _ in self.stack[index].named_parameters()}
        stem = f"{self.prefix}.{index}."
        tensors = {name.removeprefix(stem): tensor for name, tensor in self.run.read(index).items()}
        fill(self.stack[index], {name: tensor for name, tensor in tensors.items() if name in parameters})
