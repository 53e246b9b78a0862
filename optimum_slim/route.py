"""Forward passes of a model that run some of its decoder layers.

What lies around the layers (embeddings, masks, positions, the final norm, the head) differs between architectures and
is the model's own forward pass here: layers that are left out hand the hidden states through. A pass may begin with
hidden states of its own, and keep those behind a layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .block import calling, states_of
from .walk import decoder_layers


class Route:
    """Inside, each forward pass of `model` runs the decoder layers last asked for; at first all.

    `tuples` tells whether the layers return their states in a tuple. Unless given, it is found when one runs; where
    the first pass leaves out a layer, that one runs for it.
    """

    def __init__(self, model: nn.Module, tuples: bool | None = None):
        self.model, self.tuples = model, tuples
        self.stack = decoder_layers(model)[1]
        self.kept: Tensor | None = None
        self.run(range(len(self.stack)))

    def run(self, layers: range, *, states: Tensor | None = None, keep: int | None = None, head: bool = True) -> None:
        """Set what the next passes run.

        Args:
            layers: the layers.
            states: (batch, length, hidden), what enters the first of them, in place of the embeddings.
            keep: a layer behind which the states are kept in `kept`.
            head: whether the output head runs; without it, the logits mean nothing.
        """
        self.layers, self.states, self.keep, self.head, self.kept = layers, states, keep, head, None
        self._handed: Tensor | None = None

    def __enter__(self) -> Route:
        self._patches = ExitStack()
        for index, layer in enumerate(self.stack):
            self._patches.enter_context(calling(layer, partial(self._layer, index, layer.forward)))
        head = self.model.get_output_embeddings()
        if head is not None:
            self._patches.enter_context(calling(head, partial(self._head, head.forward)))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patches.close()
        self.run(range(len(self.stack)))

    def _layer(self, index: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            states, args = args[0], args[1:]
        else:
            states = kwargs.pop("hidden_states")
        if index == 0:
            states = states if self.states is None else self.states
        elif self._handed is not None and states is not self._handed:
            raise ValueError(
                f"{type(self.model).__name__} changes the hidden states between its decoder layers, so they cannot "
                "run apart from one another"
            )
        if index in self.layers:
            output = own(states, *args, **kwargs)
            self.tuples, self._handed = isinstance(output, tuple), None
            states = states_of(output)
        else:
            if self.tuples is None:
                self.tuples = isinstance(own(states, *args, **kwargs), tuple)
            self._handed = states
            output = (states,) if self.tuples else states
        if index == self.keep:
            self.kept = states
        return output

    def _head(self, own: Any, states: Tensor) -> Tensor:
        return own(states) if self.head else states[..., :1]


def exit_logits(model: nn.Module, input_ids: Tensor, states: Tensor, tuples: bool | None = None) -> Tensor:
    """The logits (batch, length, vocabulary) of hidden states (batch, length, hidden) through the model's own end.

    Args:
        input_ids: int64 (batch, length), those the states belong to.
        tuples: whether the model's decoder layers return tuples, if that is known.
    """
    with Route(model, tuples) as route, _unhooked([model.get_decoder(), *route.stack]):
        route.run(range(0), states=states)
        return model(input_ids=input_ids, use_cache=False).logits


@contextmanager
def _unhooked(modules: list[nn.Module]) -> Iterator[None]:
    """Call modules without what is hooked to them, FSDP2's gathering of layers that do not run above all."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in modules for kind in kinds]
    try:
        for module, kind, _ in kept:
            setattr(module, kind, OrderedDict())
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)
