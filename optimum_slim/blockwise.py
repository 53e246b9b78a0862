"""Block-wise training: one decoder layer after the other learns to put out what it did before it was quantized.

Training a quantized model end to end needs its latent weights, their gradients and the optimizer's moments, 16 bytes a
weight, for all layers at once. EfficientQAT (arXiv 2407.11062) first trains each decoder layer by itself. With x the
hidden states behind the layers slimmed so far, r those of the unslimmed model, f the layer as it was and g the one in
training, the error is counted per token and relative, so that the few tokens with huge activations do not rule it:

    mean over tokens of ||g(x) - f(r)||² / ||f(r)||²

    for report in train_blocks(model, tokens, prepare, finish, steps=200, learning_rate=1e-3):
        print(report.name, report.before, report.after)

`prepare(block)` replaces modules of `block.layer`; every parameter of the layer that then requires gradients is
trained (all others are frozen by then). `finish(block)` puts what is to stay in their place, usually packed layers.
Each layer is an ordinary call of `fit`: some batches are held out, and the layer ends with the parameters that did
best on them, those it started with included.

Memory: the model, what training needs for one layer, and the hidden states of all samples twice, on the CPU.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import cut_batch, draw
from .block import Block, device_of, evaluating, states_of
from .journal import Journal, identity_of
from .train import fit
from .walk import decoder_layers, walk


@dataclass
class BlockReport:
    """What was done to one decoder layer.

    Args:
        index, name: of the layer in the model.
        before, after: its relative error on the held-out batches (without any, on the last ones trained on) as
            `prepare` left it and with the parameters kept.
        finished: that of the layer as `finish` left it.
        steps, best_step: optimizer steps run, and the one whose parameters were kept; 0 is the start.
        seconds: wall-clock time, 0 for a layer taken from the journal.
        resumed: whether the layer was taken from the journal.
    """

    index: int
    name: str
    before: float
    after: float
    finished: float
    steps: int
    best_step: int
    seconds: float
    resumed: bool = False


def train_blocks(
    model: nn.Module,
    tokens: Tensor,
    prepare: Callable[[Block], None],
    finish: Callable[[Block], None],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    warmup_steps: int = 100,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    held_out: float = 0.05,
    evaluate_every: int = 50,
    patience: int | None = None,
    mixed_precision: str | None = None,
    seed: int = 0,
    journal: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    description: str = "block",
) -> Iterator[BlockReport]:
    """Train the decoder layers of `model` one by one, in place; later layers see what the earlier ones have become.

    The work is done while the reports are asked for: after each one the model is whole, with the layers so far
    finished and the others as they were.

    Args:
        model: a Transformers decoder model, in memory.
        tokens: int64 (samples, length).
        prepare: edits `block.layer`; parameters that require gradients afterwards are trained and should be fp32; a
            layer without any is left as it is. It must not write into tensors that the model came with if something
            else holds them (a teacher), and has to do the same when a killed run goes on.
        finish: turns the trained layer into what is to stay.
        steps: optimizer steps for each layer, at most.
        batch_size: samples per optimizer step.
        micro_batch_size: samples that go through the layer at once; which samples do so together is fixed. Default:
            `batch_size`.
        learning_rate, warmup_steps, weight_decay, max_grad_norm, evaluate_every, patience, mixed_precision, seed: as
            for `fit`.
        held_out: share of the micro-batches never trained on, the same ones for all layers; 0 keeps none.
        journal: folder that keeps every finished layer, so that the same call goes on after a kill and ends with the
            same bits; the caller removes it when its own work is done.
        settings: names and values that `prepare` and `finish` depend on; a journal written with others is refused.
        description: for the progress bars.

    Returns:
        An iterator with a `BlockReport` for each layer.

    Raises:
        ValueError: settings that cannot work, the journal of another run, or more than one process.
        FloatingPointError: an error or gradient is NaN or infinite. The layers before are finished then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("train_blocks works in one process; start it without accelerate launch or torchrun")
    micro, accumulation = cut_batch(batch_size, micro_batch_size, 1)
    batches = -(-len(tokens) // micro)
    if held_out and batches < 2:
        raise ValueError(
            f"{len(tokens)} samples make one micro-batch of {micro}, and another one must be held out; pass more "
            "samples, a smaller micro_batch_size, or held_out=0"
        )
    options = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": accumulation,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "held_out": held_out,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "mixed_precision": mixed_precision,
        "seed": seed,
    }
    held, order = draw(batches, held_out, steps, accumulation, seed)
    measured = (held if len(held) else order[-1].unique()).tolist()
    run = None
    if journal is not None:
        identity = options | {"micro_batch_size": micro, "settings": settings} | identity_of(model, tokens)
        run = [Journal(Path(journal) / f"block-{i:05d}", identity) for i in range(len(decoder_layers(model)[1]))]
    return _train(model, walk(model, tokens, batch_size=micro), prepare, finish, options, measured, run, description)


def outcome(reports: list[BlockReport]) -> str:
    """How the layers did together, in a line for a report."""
    before, after = (sum(getattr(r, key) for r in reports) / len(reports) for key in ("before", "after"))
    resumed = sum(report.resumed for report in reports)
    return (
        f"trained {len(reports)} decoder layers one by one: {sum(r.steps for r in reports)} steps, mean relative "
        f"error of their outputs {before:.4g} -> {after:.4g}"
        f"{f', {resumed} taken from the journal' if resumed else ''}"
    )


def relative_error(states: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||states - target||² / ||target||², of hidden states (..., hidden), as an fp32 scalar."""
    target = target.float()
    lost, norm = (x.square().sum(-1) for x in (states.float() - target, target))
    return (lost / norm.clamp(min=torch.finfo(torch.float32).tiny)).mean()


def _train(model, blocks, prepare, finish, options, measured, journals, description) -> Iterator[BlockReport]:
    targets: list[Tensor] = []
    for block in blocks:
        start = time.perf_counter()
        targets = targets or list(block.inputs)
        for batch, states in enumerate(targets):  # what the layer before put out, until it is this one's target
            targets[batch] = _run(block, batch, states)
        flags = {name: parameter.requires_grad for name, parameter in block.layer.named_parameters()}
        block.layer.requires_grad_(False)
        journal = journals[block.index] if journals else None
        entry = journal.read() if journal else None
        prepare(block)
        if entry is None:
            report = _fit(block, targets, measured, options, f"{description} {block.index}")
        else:
            report = BlockReport(**entry["report"] | {"resumed": True, "seconds": 0.0})
        finish(block)
        if entry is not None:
            block.layer.load_state_dict(entry["state"], assign=True)
        for name, parameter in block.layer.named_parameters():
            parameter.requires_grad_(flags.get(name, False) and parameter.is_floating_point())
        report.finished = _advance(block, targets, measured)
        if entry is None:
            report.seconds = time.perf_counter() - start
            if journal:
                journal.write({"state": block.layer.state_dict(), "report": dataclasses.asdict(report)})
        yield report


def _fit(
    block: Block, targets: list[Tensor], measured: list[int], options: dict[str, Any], description: str
) -> BlockReport:
    """Train the prepared layer of `block`; the samples that `fit` draws are the numbers of the micro-batches."""

    def block_error(layer: nn.Module, numbers: Tensor) -> Tensor:
        batch = int(numbers[0, 0])
        args, kwargs = block.arguments[batch]
        with evaluating(layer):  # without dropout
            states = states_of(layer(block.inputs[batch].to(numbers.device), *args, **kwargs))
        return relative_error(states, targets[batch].to(states.device))

    def error() -> float:
        errors = [relative_error(_run(block, batch, block.inputs[batch]), targets[batch]) for batch in measured]
        return float(torch.stack(errors).mean())

    if not any(parameter.requires_grad for parameter in block.layer.parameters()):
        return BlockReport(block.index, block.name, error(), error(), math.nan, 0, 0, 0.0)
    numbers = torch.arange(len(targets))[:, None].expand(-1, 2).contiguous()
    before = None if options["held_out"] else error()
    done = fit(block.layer, numbers, block_error, **options, micro_batch_size=1, description=description)
    after = done.held_out_after if before is None else error()
    before = done.held_out_before if before is None else before
    return BlockReport(block.index, block.name, before, after, math.nan, done.steps, done.best_step, 0.0)


def _advance(block: Block, targets: list[Tensor], measured: list[int]) -> float:
    """Let the hidden states pass through the finished layer; returns its mean error on the batches `measured`."""
    errors = []
    for batch, states in enumerate(block.inputs):
        block.inputs[batch] = _run(block, batch, states)
        if batch in measured:
            errors.append(relative_error(block.inputs[batch], targets[batch]))
    block.advanced = True
    return float(torch.stack(errors).mean())


def _run(block: Block, batch: int, states: Tensor) -> Tensor:
    """What the layer, as it is now, makes of hidden states of this batch; on the CPU."""
    args, kwargs = block.arguments[batch]
    with torch.no_grad(), evaluating(block.layer):
        return states_of(block.layer(states.to(device_of(block.layer)), *args, **kwargs)).to("cpu")
