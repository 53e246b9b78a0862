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
fitted to what it should have received. What is measured in a layer is in block.py.

Memory: the hidden states of all samples, kept on the CPU in the model's dtype (twice with a reference stream), and
whatever the consumer keeps.
Nothing is hooked or patched between two steps of the iteration, so stopping early or failing leaves the model as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import Block, calling, evaluating
from .memory import shared_copy


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
def entering(stack: nn.ModuleList, index: int, states: Tensor) -> Iterator[None]:
    """Let the decoder begin with layer `index`, at least 1, and these hidden states (batch, length, hidden).

    With the number of layers as `index`, they go straight to what comes behind the stack.
    """
    hook = stack[index - 1].register_forward_hook(
        lambda layer, args, output: (states,) if isinstance(output, tuple) else states
    )
    try:
        with skipping(stack[:index]):
            yield
    finally:
        hook.remove()


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

    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(calling(layer, partial(forward, layer.forward)))
        yield


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
