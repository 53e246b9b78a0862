"""A pruned model made ready for training, and what it was before, ordinary or packed, again afterwards.

Nothing here writes into a tensor that the model came with: the teacher may hold the same one.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .packed import PackedLinear
from .sparse import SparseLinear
from .sparse_training import set_weight
from .walk import decoder_layers


NOT_FEED_FORWARD = ("attn", "attention", "router")


def feed_forward_layers(model: nn.Module) -> list[str]:
    """Qualified names of the linear layers in decoder layers that belong to neither attention nor a router."""
    prefix, stack = decoder_layers(model)
    return [
        f"{prefix}.{name}"
        for name, module in stack.named_modules()
        if (type(module) in (nn.Linear, Conv1D) or isinstance(module, PackedLinear))
        and not any(part in name.lower() for part in NOT_FEED_FORWARD)
        and name.rpartition(".")[2] != "gate"
    ]


def seams(student: nn.Module, teacher: nn.Module) -> list[tuple[int, int]]:
    """Where the student misses layers of the teacher, as pairs of layers whose outputs should agree.

    The student's layers are recognised by the parameter tensors they share with the teacher's. If the teacher's
    layers a to b are missing, the pair is (the student's layer before them, b).
    """
    ours, theirs = decoder_layers(student)[1], decoder_layers(teacher)[1]
    owner = {id(parameter): index for index, layer in enumerate(theirs) for parameter in layer.parameters()}
    kept = [next((owner[id(p)] for p in layer.parameters() if id(p) in owner), None) for layer in ours]
    if None in kept:
        raise ValueError(
            "hidden_weight cannot tell which layers were removed, because this model has weights of its own; pass "
            "hidden_layers='ends', or pairs of layers"
        )
    following = pairwise([*kept, len(theirs)])
    return [(index, after - 1) for index, (layer, after) in enumerate(following) if after != layer + 1]


def ends(student: nn.Module, teacher: nn.Module) -> list[tuple[int, int]]:
    """Minitron's pairs for a student of far fewer layers: the embeddings, and the layer two before the last.

    Raises:
        ValueError: fewer than three layers.
    """
    layers = [len(decoder_layers(model)[1]) for model in (student, teacher)]
    if min(layers) < 3:
        raise ValueError(f"hidden_layers='ends' needs models of at least 3 layers, found {min(layers)}")
    return [(-1, -1), (layers[0] - 3, layers[1] - 3)]


def require_peft() -> None:
    """Raise an `ImportError` with the line that installs PEFT, if it is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"healing with adapters needs PEFT ({error}); pip install optimum-slim[peft]") from error


def add_adapters(
    model: nn.Module, targets: str | list[str], *, rank: int, alpha: int | None, dropout: float, rounded: bool
) -> list[tuple[str, nn.Module]]:
    """Put LoRA layers, with fp32 weights, into `model`; returns them by the name of the layer they wrap.

    With `rounded`, those over sparse layers of codes multiply by the rounded weights that a merge gives.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model.add_adapter(config)
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for _, layer in adapted:
        if isinstance(layer.get_base_layer(), SparseLinear):
            layer.rounded = rounded
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return adapted


def put_back_unused(model: nn.Module, originals: dict[str, nn.Module], adapted: list[tuple[str, nn.Module]]) -> bool:
    """Undo the stand-ins (`sparse_stand_ins`) that got no adapter, frozen; returns whether others are left."""
    for name in originals.keys() - {name for name, _ in adapted}:
        model.set_submodule(name, originals.pop(name).requires_grad_(False))
    return bool(originals)


@torch.no_grad()
def merge_delta(linear: nn.Module, delta: Tensor) -> None:
    """Add `delta`, of the weight's shape, in fp32; the weight becomes a new tensor in its old dtype.

    A sparse layer takes a masked delta (out, in) into its kept values, rounded to its grid if it has one.
    """
    if isinstance(linear, SparseLinear):
        set_weight(linear, linear.dense().add_(delta.float()))
        return
    weight = linear.weight
    merged = (weight.float() + delta.to(weight.device).float()).to(weight.dtype)
    linear.weight = nn.Parameter(merged, weight.requires_grad)


@torch.no_grad()
def own_tensors(model: nn.Module, names: list[str], dtypes: dict[str, torch.dtype], *, trained: bool) -> None:
    """Give `model` tensors of its own for the named parameters, in the given dtypes; tied ones stay tied."""
    own: dict[int, nn.Parameter] = {}
    for name in names:
        module, _, key = name.rpartition(".")
        owner = model.get_submodule(module)
        old = getattr(owner, key)
        if id(old) not in own:
            dtype = dtypes.get(name, old.dtype)
            own[id(old)] = nn.Parameter(old.detach().to(dtype, copy=True), trained)
        setattr(owner, key, own[id(old)])


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[dict]:
    """Keep bitsandbytes from repacking its layers on an evaluation, after which they would pass no gradient back."""
    layers = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    try:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
        yield {}
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
