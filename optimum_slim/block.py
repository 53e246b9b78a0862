"""One decoder layer with its real inputs, and what is measured of them.

A layer is fitted to the second moments of what enters each of its linear layers: H, the mean of x xᵀ. Modules with one
common input are measured once. With a reference stream, the input r that the unslimmed model has there for the same
token is followed as well, and the mean of r xᵀ is measured with H (asymmetric calibration, GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .packed import linear_shape


AHEAD_LIMIT = 512 * 2**20  # bytes of a layer's reference inputs that are kept to run the original layer only once
REPLAY_LIMIT = 512 * 2**20  # bytes of outputs of a layer's finished children that are kept to run them only once


class _StopForward(Exception):
    """Ends a layer's forward pass once the wanted input has been seen."""


@dataclass
class Group:
    """Modules with one common input x, and its second moments over the calibration tokens.

    `gram` is the mean of x x^T over `tokens` tokens, fp32 (in, in). `cross` is the mean of r x^T, where r is the input
    that the unslimmed model has there for the same token; `None` without a reference stream.
    """

    names: list[str]
    gram: Tensor
    tokens: int
    cross: Tensor | None = None


@dataclass
class _Finished:
    """A child of the layer whose linear layers are all in place, and what it gave for each batch."""

    parameters: list[nn.Parameter]
    versions: list[int]
    outputs: dict[int, Any] = field(default_factory=dict)

    def still_holds(self, child: nn.Module) -> bool:
        now = list(child.parameters())
        same = len(now) == len(self.parameters) and all(a is b for a, b in zip(now, self.parameters, strict=True))
        return same and [p._version for p in now] == self.versions

    def run(self, forward: Callable, batch: int, *args: Any, **kwargs: Any) -> Any:
        if batch not in self.outputs:
            self.outputs[batch] = forward(*args, **kwargs)
        return self.outputs[batch]


@dataclass
class Block:
    """One decoder layer with the inputs it gets from the layers before it; valid until the next block is asked for.

    `index` is the layer's position, `name` its qualified name, `inputs` the hidden states entering it, one tensor
    (batch, length, hidden) per batch. With a reference stream, `references` are the hidden states that enter this
    layer in the unslimmed model, and `original` is the layer there.
    """

    index: int
    name: str
    stack: nn.ModuleList
    inputs: MutableSequence[Tensor]
    arguments: list[tuple[tuple, dict]]
    references: MutableSequence[Tensor] | None = None
    original: nn.Module | None = None
    batch_tokens: int = 0  # of the batch that was run last
    advanced: bool = False  # the hidden states are those behind the layer already
    ahead: list[dict[str, Tensor]] = field(default_factory=list)  # what enters modules of `original`, for each batch
    finished: dict[str, _Finished] = field(default_factory=dict)  # children of the layer, by name

    @property
    def layer(self) -> nn.Module:
        """The decoder layer as it is now, edits included."""
        return self.stack[self.index]

    def outputs(self) -> Iterator[Tensor]:
        """Run the layer, as it is now, on one batch after the other: (batch, length, hidden) each, on the CPU."""
        for batch in range(len(self.inputs)):
            yield states_of(self._run(batch)).to("cpu")

    def advance(self) -> None:
        """Let the hidden states pass through the layer as it is now, the reference stream through the original."""
        if not self.advanced:
            for batch, output in enumerate(self.outputs()):
                self.inputs[batch] = output
        if self.references is not None and not self.ahead:
            for batch in range(len(self.references)):
                self.references[batch] = states_of(self._run(batch, original=True)).to("cpu")

    def gram_groups(
        self, modules: dict[str, nn.Module], *, sequential: bool = True, accept_unseen: bool = False
    ) -> Iterator[Group]:
        """Measure the second moments of what enters the given modules of this layer.

        Modules with one common input (query, key and value; gate and up) form a group and share one matrix. Groups
        come in the order of execution.

        Args:
            modules: The modules to measure by name, each somewhere inside `layer`.
            sequential: Run the layer again before each group, so that what was replaced earlier in the layer is seen.
                Otherwise one pass serves all groups and their matrices are held together.
            accept_unseen: A module that saw no token (an expert no token was routed to) ends in a group of its own,
                with a Gram matrix of zeros.

        Raises:
            ValueError: a module saw no token.
        """
        if not modules:
            return
        self.finished.clear()
        groups, unseen = self._groups(modules)
        if unseen and not accept_unseen:
            raise ValueError(
                f"No calibration token reached {', '.join(sorted(unseen))} in {self.name}. "
                "Use more calibration samples, or leave these modules out with modules_to_not_convert."
            )
        if self.references is not None and not self.ahead:
            self._look_ahead({names[0]: modules[names[0]] for names in groups})
        waiting = set(modules)
        for together in [groups] if not sequential else [[names] for names in groups]:
            self._finish(set(modules) - waiting, waiting)
            yield from self._measured(modules, together)
            waiting.difference_update(*together)
        for name, module in unseen.items():
            yield Group([name], torch.zeros((linear_shape(module)[1],) * 2, device=device_of(module)), 0)

    def square_means(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """The mean of x² over the tokens that enter each module, fp32 (in,); modules no token reached are left out.

        The hidden states pass through the layer at the same time, so it must not be edited afterwards.
        """
        self.finished.clear()
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(modules, 0)

        def accumulate(name: str, x: Tensor) -> None:
            squares = x.reshape(-1, x.shape[-1]).float().square()
            sums[name] = sums.get(name, 0) + squares.sum(0)
            counts[name] += len(squares)

        with input_hooks(modules, accumulate):
            for batch in range(len(self.inputs)):
                self.inputs[batch] = states_of(self._run(batch)).to("cpu")
        self.advanced = True
        return {name: total / counts[name] for name, total in sums.items() if counts[name]}

    def _run(self, batch: int, *, original: bool = False) -> Any:
        """Call the layer on one batch, in evaluation mode and without an autograd graph."""
        args, kwargs = self.arguments[batch]
        layer, states = (self.original, self.references) if original else (self.layer, self.inputs)
        states = states[batch].to(device_of(layer))
        self.batch_tokens = states.shape[:-1].numel()
        with torch.no_grad(), evaluating(layer), nullcontext() if original else self._replaying(batch):
            return layer(states, *args, **kwargs)

    def _finish(self, measured: set[str], waiting: set[str]) -> None:
        """From here on run each child only once in which modules were measured and none is waiting for it.

        Modules are measured in the order in which they run, so that whatever its inputs come from is in place as well.
        """
        size = sum(states.numel() * states.element_size() for states in self.inputs)
        for name, child in self.layer.named_children():
            inside = (f"{name}.", f"{self.name}.{name}.")
            done, open_ = (any(module.startswith(inside) for module in names) for names in (measured, waiting))
            if done and not open_ and name not in self.finished and (len(self.finished) + 1) * size <= REPLAY_LIMIT:
                parameters = list(child.parameters())
                self.finished[name] = _Finished(parameters, [p._version for p in parameters])

    @contextmanager
    def _replaying(self, batch: int) -> Iterator[None]:
        """Let finished children give what they gave for this batch before, unless their weights changed since."""
        with ExitStack() as patches:
            for name, finished in self.finished.items():
                child = self.layer.get_submodule(name)
                if finished.still_holds(child):
                    patches.enter_context(calling(child, partial(finished.run, child.forward, batch)))
            yield

    def _groups(self, modules: dict[str, nn.Module]) -> tuple[list[list[str]], dict[str, nn.Module]]:
        """Names of modules by common input, in the order of their first call, and the modules never called."""
        groups: list[list[str]] = []
        missing = dict(modules)
        for batch in range(len(self.inputs)):
            seen: list[tuple[str, Tensor]] = []  # keeps the inputs alive, so that an address stands for one tensor
            with input_hooks(missing, lambda name, x, seen=seen: seen.append((name, x))):
                self._run(batch)
            found: dict[tuple, list[str]] = {}
            for name, x in seen:
                if x.numel() and missing.pop(name, None) is not None:
                    found.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype), []).append(name)
            groups += found.values()
            if not missing:
                break
        return groups, missing

    def _look_ahead(self, modules: dict[str, nn.Module]) -> None:
        """Run the original layer once and keep what enters all these modules, unless that is too much."""
        tokens = sum(states.shape[:-1].numel() for states in self.references)
        widths = sum(linear_shape(module)[1] for module in modules.values())
        if tokens * widths * self.references[0].element_size() > AHEAD_LIMIT:
            return
        originals = self._originals(modules)
        for batch in range(len(self.references)):
            entering: dict[str, Tensor] = {}
            with input_hooks(originals, entering.__setitem__):
                self.references[batch] = states_of(self._run(batch, original=True)).to("cpu")
            self.ahead.append(entering)

    def _originals(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: self.original.get_submodule(name.removeprefix(f"{self.name}.")) for name in names}

    def _measured(self, modules: dict[str, nn.Module], groups: list[list[str]]) -> list[Group]:
        """The groups with their moments, from one pass over the batches; a single group's pass ends at its input."""
        firsts = [names[0] for names in groups]
        grams: dict[str, Tensor] = {}
        crosses: dict[str, Tensor] = {}
        counts = dict.fromkeys(firsts, 0)
        expected: dict[str, Tensor] = {}  # the reference inputs of one batch

        def flat(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).float()

        def remember(name: str, x: Tensor) -> None:
            expected[name] = flat(x)
            if len(groups) == 1:
                raise _StopForward

        def accumulate(name: str, x: Tensor) -> None:
            x = flat(x)
            if name not in grams:
                grams[name] = x.new_zeros(x.shape[1], x.shape[1])
                if self.references is not None:
                    crosses[name] = torch.zeros_like(grams[name])
            grams[name].addmm_(x.T, x)
            if self.references is not None:
                crosses[name].addmm_(self._matching(expected.pop(name, None), x).T, x)
            counts[name] += x.shape[0]
            if len(groups) == 1:
                raise _StopForward

        originals = self._originals(firsts) if self.references is not None else {}
        for batch in range(len(self.inputs)):
            if self.ahead:
                expected = {name: flat(self.ahead[batch][name]) for name in firsts if name in self.ahead[batch]}
            elif self.references is not None:
                with suppress(_StopForward), input_hooks(originals, remember):
                    self._run(batch, original=True)
            with suppress(_StopForward), input_hooks({name: modules[name] for name in firsts}, accumulate):
                self._run(batch)
        return [
            Group(
                names,
                grams.pop(name).div_(counts[name]),
                counts[name],
                crosses[name].div_(counts[name]) if crosses else None,
            )
            for name, names in zip(firsts, groups, strict=True)
        ]

    def _matching(self, reference: Tensor | None, x: Tensor) -> Tensor:
        """The reference input of the same tokens, or `x` itself where only some tokens were routed to the module."""
        return reference if reference is not None and len(reference) == len(x) == self.batch_tokens else x


@contextmanager
def input_hooks(modules: dict[str, nn.Module], receive: Any) -> Iterator[None]:
    """Call `receive(name, input)` whenever one of the modules is about to run."""
    handles = []
    try:
        for name, module in modules.items():
            hook = partial(_hand_over, receive, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_over(receive: Any, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
    receive(name, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def calling(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let `forward` take the place of a module's own inside."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode again afterwards."""
    training = [child for child in module.modules() if child.training]
    try:
        module.eval()
        yield
    finally:
        for child in training:
            child.training = True


def states_of(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returned."""
    return output[0] if isinstance(output, tuple) else output


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter is; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
