"""Visiting a model's decoder layers one at a time, each with its real inputs.

Calibrated compression works layer by layer: measure what enters a linear layer, compress it, go on. The inputs must be
those the model really produces, and a later layer should be measured behind the layers already slimmed, because that
is what it will see in use:

    for block in walk(model, tokens):
        for group in block.gram_groups({name: ... the linear layers of block.layer ...}):
            ... replace the modules group.names; the next group and the next block see the replacements ...

How the inputs are made exact without knowing any architecture: the model's own decoder runs once with every layer
replaced by a recorder that keeps its arguments and hands the hidden states through. That costs one embedding lookup
and gives each layer its own masks and rotary embeddings (they differ from layer to layer in Gemma or with sliding
windows). From there on each layer is called with those arguments and the hidden states of the layer before it.

With `reference=True` a second stream of hidden states follows, those of the model as it was, so that a layer can be
fitted to what it should have received (asymmetric calibration, GPTAQ, arXiv 2504.02692).

Memory: the hidden states of all samples, kept on the CPU in the model's dtype (twice with a reference stream), and
whatever the consumer keeps.
Nothing is hooked or patched between two steps of the iteration, so stopping early or failing leaves the model as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .memory import shared_copy
from .packed import linear_shape


AHEAD_LIMIT = 512 * 2**20  # bytes of a layer's reference inputs that are kept to run the original layer only once


class _StopForward(Exception):
    """Ends a layer's forward pass once the wanted input has been seen."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the stack of decoder layers.

    Args:
        model: A Transformers model with a decoder.

    Returns:
        The qualified name of the stack in `model` (such as `"model.layers"`) and the stack itself.

    Raises:
        ValueError: no `ModuleList` of the decoder has as many members as the config has layers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ValueError(
            f"No decoder layers found: {type(model).__name__} is not a Transformers model with a decoder. "
            "Pass a model loaded with AutoModelForCausalLM."
        )
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder()
    inside = [*decoder.children(), *decoder.modules()] if decoder is not None else []
    for child in inside:
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return next(name for name, module in model.named_modules() if module is child), child
    raise ValueError(
        f"No decoder layers found in {type(model).__name__}: expected model.get_decoder() to hold a ModuleList of "
        f"config.num_hidden_layers = {count} members. Pass a model loaded with AutoModelForCausalLM."
    )


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

    @property
    def layer(self) -> nn.Module:
        """The decoder layer as it is now, edits included."""
        return self.stack[self.index]

    def outputs(self) -> Iterator[Tensor]:
        """Run the layer, as it is now, on one batch after the other: (batch, length, hidden) each, on the CPU."""
        for batch in range(len(self.inputs)):
            yield _states(self._run(batch)).to("cpu")

    def advance(self) -> None:
        """Let the hidden states pass through the layer as it is now, the reference stream through the original."""
        if not self.advanced:
            for batch, output in enumerate(self.outputs()):
                self.inputs[batch] = output
        if self.references is not None and not self.ahead:
            for batch in range(len(self.references)):
                self.references[batch] = _states(self._run(batch, original=True)).to("cpu")

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
        groups, unseen = self._groups(modules)
        if unseen and not accept_unseen:
            raise ValueError(
                f"No calibration token reached {', '.join(sorted(unseen))} in {self.name}. "
                "Use more calibration samples, or leave these modules out with modules_to_not_convert."
            )
        if self.references is not None and not self.ahead:
            self._look_ahead({names[0]: modules[names[0]] for names in groups})
        for together in [groups] if not sequential else [[names] for names in groups]:
            yield from self._measured(modules, together)
        for name, module in unseen.items():
            yield Group([name], torch.zeros((linear_shape(module)[1],) * 2, device=_device(module)), 0)

    def square_means(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """The mean of x² over the tokens that enter each module, fp32 (in,); modules no token reached are left out.

        The hidden states pass through the layer at the same time, so it must not be edited afterwards.
        """
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(modules, 0)

        def accumulate(name: str, x: Tensor) -> None:
            squares = x.reshape(-1, x.shape[-1]).float().square()
            sums[name] = sums.get(name, 0) + squares.sum(0)
            counts[name] += len(squares)

        with input_hooks(modules, accumulate):
            for batch in range(len(self.inputs)):
                self.inputs[batch] = _states(self._run(batch)).to("cpu")
        self.advanced = True
        return {name: total / counts[name] for name, total in sums.items() if counts[name]}

    def _run(self, batch: int, *, original: bool = False) -> Any:
        """Call the layer on one batch, in evaluation mode and without an autograd graph."""
        args, kwargs = self.arguments[batch]
        layer, states = (self.original, self.references) if original else (self.layer, self.inputs)
        states = states[batch].to(_device(layer))
        self.batch_tokens = states.shape[:-1].numel()
        with torch.no_grad(), evaluating(layer):
            return layer(states, *args, **kwargs)

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
                self.references[batch] = _states(self._run(batch, original=True)).to("cpu")
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


def walk(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    batch_size: int = 8,
    reference: bool = False,
    visiting: Callable[[int], AbstractContextManager] = nullcontext,
) -> Iterator[Block]:
    """Visit the decoder layers in order, each with its real inputs and behind the already edited layers.

    Args:
        model: A Transformers decoder model.
        tokens: Token ids, int64 (samples, length).
        batch_size: Samples per forward pass.
        reference: Follow the hidden states of the unslimmed model as well.
        visiting: Makes the context in which the layer of this index is visited; it ends once the hidden states have
            passed through the edited layer. If it has a method `states`, that makes the empty sequences in which the
            hidden states are kept, else they are lists.

    Returns:
        An iterator of blocks. Edit `block.layer` (or replace it in the stack) before asking for the next block.

    Raises:
        ValueError: the model has no stack of decoder layers, changes the hidden states between them, or `tokens` is
            not a non-empty matrix.
    """
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"Expected token ids of shape (samples, length), got {tuple(tokens.shape)}.")
    decoder_layers(model)
    return _walk(model, tokens.split(batch_size), reference, visiting)


def _walk(model, batches, reference: bool, visiting) -> Iterator[Block]:
    name, stack = decoder_layers(model)
    states = getattr(visiting, "states", list)
    hidden, references = states(), None
    with visiting(0):
        arguments = _capture(model, stack, batches, hidden)
    if reference:
        references = states()
        references.extend(hidden)
    for index in range(len(stack)):
        with visiting(index):
            original = shared_copy(stack[index]) if reference else None
            kept = [batch[index] for batch in arguments]
            block = Block(index, f"{name}.{index}", stack, hidden, kept, references, original)
            yield block
            if index + 1 < len(stack):
                block.advance()


def _capture(
    model: PreTrainedModel, stack: nn.ModuleList, batches: tuple[Tensor, ...], hidden: MutableSequence[Tensor]
) -> list[list[tuple[tuple, dict]]]:
    """Each layer's arguments for each batch; the hidden states entering the first layer are added to `hidden`."""
    arguments = []
    kept: list[Tensor] = []  # masks and rotary embeddings, which most batches have in common
    decoder = model.get_decoder()
    device = model.get_input_embeddings().weight.device
    for batch in batches:
        recorded: list[tuple[Tensor, tuple, dict]] = []
        with torch.no_grad(), evaluating(decoder), _recording(stack, recorded):
            decoder(input_ids=batch.to(device), use_cache=False)
        if len(recorded) != len(stack) or any(states is not recorded[0][0] for states, _, _ in recorded):
            raise ValueError(
                f"{type(model).__name__} does not pass the hidden states straight from one decoder layer to the next, "
                "so its layers cannot be visited one at a time. Use a step that needs no calibration data."
            )
        hidden.append(recorded[0][0].to("cpu"))
        arguments.append(_shared([(args, kwargs) for _, args, kwargs in recorded], kept, {}))
    return arguments


@contextmanager
def skipping(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let decoder layers hand the hidden states through unchanged, as if they were not in the model."""
    with _handing_through(layers, lambda states, args, kwargs: None):
        yield


@contextmanager
def _recording(stack: nn.ModuleList, recorded: list[tuple[Tensor, tuple, dict]]) -> Iterator[None]:
    """Let every layer record its arguments and hand the hidden states through."""
    with _handing_through(stack, lambda *arguments: recorded.append(arguments)):
        yield


@contextmanager
def _handing_through(layers: Iterable[nn.Module], receive: Any) -> Iterator[None]:
    """Replace the forward of each layer by one that calls `receive` and returns the hidden states."""
    layers, returns_tuple = list(layers), []

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not returns_tuple:
            returns_tuple.append(isinstance(original(*args, **kwargs), tuple))
        if args:
            states, args = args[0], args[1:]
        else:
            states = kwargs.pop("hidden_states")
        receive(states, args, kwargs)
        return (states,) if returns_tuple[0] else states

    own = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(forward, layer.forward)
        yield
    finally:
        for layer, original in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if original is not None:
                layer.forward = original


def _shared(value: Any, kept: list[Tensor], known: dict[int, Tensor]) -> Any:
    """The same nested value with each tensor replaced by an equal one already in `kept`, if there is one."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = next((tensor for tensor in kept if _equal(tensor, value)), value)
            if known[id(value)] is value:
                kept.append(value)
        return known[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_shared(item, kept, known) for item in value)
    return {key: _shared(item, kept, known) for key, item in value.items()} if type(value) is dict else value


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


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
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode again afterwards."""
    training = [child for child in module.modules() if child.training]
    try:
        module.eval()
        yield
    finally:
        for child in training:
            child.training = True


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
