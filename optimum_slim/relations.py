"""Distillation with attention relations: logits, and how a late layer relates its queries, keys and values.

With few bits per weight the student's hidden states are not the teacher's, but what attention makes of them can be
alike. MiniLM (arXiv 2012.15828) compares relations instead of states: for X one of the queries, keys or values of a
layer, cut into heads of width d,

    R = softmax(X Xᵀ / sqrt(d))        loss = mean over heads and tokens of KL(R_teacher || R_student)

BitDistill (arXiv 2510.13998) adds the sum over queries, keys and values of one late layer to the distillation of the
logits, and found several layers to be worse than one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .losses import Distillation, unwrapped
from .walk import decoder_layers


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, eq=False)
class RelationDistillation:
    """Logits distillation plus `relation_weight` times the relation loss of one layer; a loss for `fit`.

    Args:
        teacher, temperature, kl_weight: see `Distillation`.
        relation_weight (`float`): of the relations of queries, keys and values together.
        layer (`int`): 0-based, the same in student and teacher.
        heads (`int`): into which queries, keys and values are cut, which must divide their widths; relations need not
            follow the model's own heads.

    Raises:
        ValueError: as `Distillation`; when called, a layer that does not exist or has no modules `q_proj`, `k_proj`
            and `v_proj`, or heads that do not divide their widths.
    """

    teacher: nn.Module
    temperature: float = 1.0
    kl_weight: float = 1.0
    relation_weight: float = 1.0
    layer: int = 0
    heads: int = 1

    def __post_init__(self):
        self._logits()

    def _logits(self) -> Distillation:
        return Distillation(self.teacher, self.temperature, self.kl_weight)

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss on `input_ids`, int64 (batch, length) on the student's device, as an fp32 scalar."""
        with projections(self.teacher, self.layer) as taught, projections(model, self.layer) as learned:
            loss = self._logits()(model, input_ids)
        losses = [relation_loss(learned[name], taught[name], self.heads).to(loss.device) for name in PROJECTIONS]
        return loss + self.relation_weight * torch.stack(losses).sum()


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Mean over heads and tokens of KL(R_teacher || R_student), an fp32 scalar.

    Args:
        student, teacher: (batch, length, width), where the widths may differ.
        heads: divides both widths.
    """
    taught, learned = (log_relations(states, heads) for states in (teacher.detach().to(student.device), student))
    return torch.sum(taught.exp() * (taught - learned), -1).mean()


def log_relations(states: Tensor, heads: int) -> Tensor:
    """log R, fp32 (batch, heads, length, length), of states (batch, length, width)."""
    if states.shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide a width of {states.shape[-1]}; choose heads that do")
    states = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    return (states @ states.transpose(2, 3) * states.shape[-1] ** -0.5).log_softmax(-1)


@contextmanager
def projections(model: nn.Module, layer: int) -> Iterator[dict[str, Tensor]]:
    """Collect what the query, key and value projections of a decoder layer put out while the context lasts."""
    name, stack = decoder_layers(unwrapped(model))
    if not 0 <= layer < len(stack):
        raise ValueError(f"relations of layer {layer} are asked for, but {name} has layers 0 to {len(stack) - 1}")
    modules = {key.rpartition(".")[2]: module for key, module in stack[layer].named_modules()}
    if missing := [key for key in PROJECTIONS if key not in modules]:
        raise ValueError(
            f"{name}.{layer} has no {' or '.join(missing)}: its attention projects otherwise, so its relations cannot "
            "be taken; use relation_weight=0"
        )
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for key in PROJECTIONS:
            handle = modules[key].register_forward_hook(partial(_keep, found, key))
            hooks.callback(handle.remove)
        yield found


def _keep(found: dict[str, Tensor], key: str, module: nn.Module, args: tuple, output: Any) -> None:
    found[key] = output
