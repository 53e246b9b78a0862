"""The hidden-state term of a distillation: which states are compared, how, and between models of different widths.

Minitron (https://arxiv.org/abs/2407.14679, Section 3) compares states of student and teacher behind one linear map
from the student's width to the teacher's, shared by all of them and trained along, and weighs the term so that it
equals the one on logits at every step. It finds that worth doing only where many layers were removed, and then best
with the embeddings and the output of a layer near the end.

The map lives in the student as its submodule `hidden_projection` while it is trained (`projected`), so that whatever
trains, shards or records the student's parameters does so with the map. It starts as the least-squares map of the
student's embedding table onto the teacher's: for channels that were kept that is the identity, and for those that were
removed the best linear guess.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .walk import decoder_layers


DISTANCES = ("relative", "cosine")
EMBEDDINGS = -1  # as a layer: what enters the first one
PROJECTION = "hidden_projection"


def hidden_distance(student: nn.Module, ours: Tensor, theirs: Tensor, kind: str) -> Tensor:
    """How far hidden states of the student (batch, length, d') are from those of the teacher (batch, length, d).

    "relative" is the mean over tokens of ||teacher - student||² / ||teacher||², "cosine" that of 1 - cos. Different
    widths go through the student's `hidden_projection` first.

    Raises:
        ValueError: different widths, and the student has no projection.
    """
    theirs, ours = theirs.to(ours.device).float(), ours.float()
    projection = getattr(student, PROJECTION, None)
    if projection is not None:
        ours = projection(ours.to(projection.weight.dtype)).float()
    if ours.shape != theirs.shape:
        raise ValueError(
            f"student and teacher have hidden states of different shapes at a seam, {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}; train inside `projected(student, teacher)`, or set hidden_weight=0"
        )
    if kind == "cosine":
        return (1 - nn.functional.cosine_similarity(ours, theirs, dim=-1)).clamp(min=0).mean()
    lost, norm = (states.square().sum(-1) for states in (theirs - ours, theirs))
    return (lost / norm.clamp(min=torch.finfo(torch.float32).tiny)).mean()


@contextmanager
def projected(student: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Inside, a student of another width has a trainable fp32 map to the teacher's, `hidden_projection`."""
    tables = [model.get_input_embeddings().weight for model in (student, teacher)]
    if tables[0].shape[1] == tables[1].shape[1]:
        yield
        return
    with torch.no_grad():
        ours, theirs = (table.cpu().double() for table in tables)
        projection = nn.Linear(ours.shape[1], theirs.shape[1], bias=False, device=tables[0].device)
        solution = torch.linalg.lstsq(
            ours.T @ ours, ours.T @ theirs, driver="gelsd"
        ).solution  # some channels are dead
        projection.weight.copy_(solution.T)
    setattr(student, PROJECTION, projection)
    try:
        yield
    finally:
        delattr(student, PROJECTION)


@contextmanager
def outputs(model: nn.Module, layers: Sequence[int], whose: str) -> Iterator[dict[int, Tensor]]:
    """Collect what the given decoder layers of `model` put out while the context lasts; -1 are the embeddings.

    Raises:
        ValueError: a layer that does not exist; `whose` tells of which model.
    """
    found: dict[int, Tensor] = {}
    handles = []
    try:
        if layers:
            _, stack = decoder_layers(model)
            if wrong := [layer for layer in layers if not EMBEDDINGS <= layer < len(stack)]:
                raise ValueError(
                    f"seams name {whose} layer {wrong[0]}, but its layers are 0 to {len(stack) - 1} (and -1 for the "
                    "embeddings)"
                )
            for layer in set(layers):
                if layer == EMBEDDINGS:
                    handles.append(stack[0].register_forward_pre_hook(partial(_keep_input, found), with_kwargs=True))
                else:
                    handles.append(stack[layer].register_forward_hook(partial(_keep_output, found, layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep_input(found: dict[int, Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    found[EMBEDDINGS] = args[0] if args else kwargs["hidden_states"]


def _keep_output(found: dict[int, Tensor], layer: int, module: nn.Module, args: tuple, output: Any) -> None:
    found[layer] = output[0] if isinstance(output, tuple) else output
