"""How much each expert of a mixture matters, and each neuron inside it.

    experts   mean over the tokens routed to an expert of ||w f(x)||, its output times its routing weight; 0 for one
              that no token reached. Minitron's authors' code (Model-Optimizer) and REAP (arXiv 2510.13999) do that
    neurons   what enters the down projection of the one wide layer that all experts make up together: w a_i(x), the
              activation times the routing weight, and 0 for tokens that go elsewhere

So the mean over the tokens of a sample is one over all of them: a token that does not reach an expert is a token for
which its neurons are silent, a sample that sends it little counts little, and one that sends it nothing is no special
case. Within an expert, which is where neurons are ranked, that differs from the mean over routed tokens by the share
of each sample that was routed.

Transformers keeps experts as 3-D parameters and computes them in one function (eager, batched or grouped), so that no
module sees what enters a down projection. It is computed again from what the experts' module receives, by the flags
that Transformers sets on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from .importance import Aggregate


def has_known_parts(module: nn.Module) -> bool:
    """Whether this module of fused experts says how they compute (`use_experts_implementation` of Transformers)."""
    gated = getattr(module, "has_gate", None)
    ready = hasattr(module, "_apply_gate") if gated else hasattr(module, "act_fn")
    return ready and gated is not None and hasattr(module, "gate_up_proj" if gated else "up_proj")


class ExpertScores:
    """Scores of the experts of one layer, from any number of batches, summed in fp32.

    Args:
        module: fused experts, (hidden states, indices, weights) to hidden states.
        neurons: for each expert, where activations (samples, tokens, width) are added up.
        length: tokens of a sample.
        width: name of the neurons' scores.
    """

    def __init__(self, module: nn.Module, neurons: list[Aggregate], length: int, width: str):
        self.module, self.neurons, self.length, self.width = module, neurons, length, width
        self.norms, self.tokens = torch.zeros(len(neurons)), torch.zeros(len(neurons))
        self.understood = True

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor, output: Tensor) -> None:
        """Look at one batch.

        Args:
            hidden, output: what enters and leaves the module, (..., hidden) for samples of `length` tokens.
            index, weights: of each token's experts, (..., experts per token).
        """
        hidden, index, weights = (tensor.flatten(0, -2) for tensor in (hidden, index, weights))
        total = torch.zeros_like(hidden, dtype=torch.float32)
        self.norms, self.tokens = self.norms.to(hidden.device), self.tokens.to(hidden.device)
        for expert, aggregate in enumerate(self.neurons):
            token, place = (index == expert).nonzero(as_tuple=True)
            weight = weights[token, place, None].float()
            inner = self._inner(hidden[token], expert)
            outer = self._project(inner, "down_proj", expert)
            if getattr(self.module, "has_post_expert_norm", False):
                outer = self.module.post_expert_norm(outer)
            outer = outer.float() * weight
            total.index_add_(0, token, outer)
            entering = inner.new_zeros(len(hidden), inner.shape[1], dtype=torch.float32)
            aggregate.add(entering.index_add_(0, token, inner.float() * weight).unflatten(0, (-1, self.length)))
            self.norms[expert] += outer.norm(dim=1).sum()
            self.tokens[expert] += len(token)
        off = (total - output.flatten(0, -2).float()).norm()
        self.understood &= bool(off <= 0.05 * total.norm())

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, without the module."""
        return vars(self) | {"module": None, "norms": self.norms.cpu(), "tokens": self.tokens.cpu()}

    def __add__(self, other: ExpertScores) -> ExpertScores:
        """What both have seen, on the CPU."""
        neurons = [mine + theirs for mine, theirs in zip(self.neurons, other.neurons, strict=True)]
        total = ExpertScores(self.module, neurons, self.length, self.width)
        total.norms, total.tokens = self.norms.cpu() + other.norms.cpu(), self.tokens.cpu() + other.tokens.cpu()
        total.understood = self.understood and other.understood
        return total

    def scores(self) -> dict[str, Tensor]:
        """`"experts"`, (experts,), and the neurons', (experts, width); nothing if the module computes otherwise."""
        if not self.understood:
            return {}
        neurons = torch.stack([aggregate.score() for aggregate in self.neurons])
        return {"experts": self.norms / self.tokens.clamp(min=1), self.width: neurons}

    def _inner(self, states: Tensor, expert: int) -> Tensor:
        """What enters the down projection, (tokens, width)."""
        if self.module.has_gate:
            return self.module._apply_gate(self._project(states, "gate_up_proj", expert))
        return self.module.act_fn(self._project(states, "up_proj", expert))

    def _project(self, states: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self.module, name)[expert]
        bias = getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else None
        return nn.functional.linear(states, weight.T if self.module.is_transposed else weight, bias)
