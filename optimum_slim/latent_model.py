"""A model in training for few bits: latent layers in the place of its linear ones, then packed layers.

Nothing here writes into a tensor that the model came with, so that a teacher may share them and `restore` can put
everything back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .block import Block, evaluating, input_hooks
from .latent import LatentLinear, Share
from .student import own_tensors


LAST = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj")  # last linear layers of attention and feed-forward parts
SAMPLES = 8  # from which a norm learns the size of its inputs

Replace = Callable[[str, nn.Module, Share, Tensor | None, dict[str, Tensor] | None], LatentLinear]


def is_last(name: str) -> bool:
    """Whether a linear layer is the last one of attention or of the feed-forward part, by its name."""
    return name.rpartition(".")[2] in LAST


class LatentModel:
    """What a training run changes in a model, and what was there before.

    Args:
        model: with dense linear layers.
        dense: those to train, by name.
        latent: `latent(name, linear, share, norm, start)` makes the layer that trains in the place of `linear`; `norm`
            is where the weights of its norm start and `start` a packed state to start from, or `None`.
    """

    def __init__(self, model: nn.Module, dense: dict[str, nn.Module], latent: Replace):
        self.model, self.dense, self.latent = model, dense, latent
        self.share = Share()
        self.typical: dict[str, Tensor] = {}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.norms = {
            f"{name}.{key}": parameter
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for key, parameter in module.named_parameters(recurse=False)
        }

    def measure_inputs(self, tokens: Tensor) -> None:
        """Let layers with norms start them at the median root mean square of their inputs, so that most tokens pass
        almost as they are.

        Args:
            tokens: int64 (samples, length).
        """

        def receive(name: str, x: Tensor) -> None:
            typical = x.float().square().mean(-1).sqrt().median()
            self.typical[name] = typical.expand(x.shape[-1])

        named = {name: linear for name, linear in self.dense.items() if is_last(name)}
        with torch.no_grad(), evaluating(self.model), input_hooks(named, receive):
            self.model(input_ids=tokens[:SAMPLES].to(self.model.device), use_cache=False)

    def hold_latent(self, block: Block | None = None, start: Callable | None = None) -> None:
        """Put layers in training in the place of dense ones, all or those of one decoder layer.

        Args:
            start: `start(name, linear, gram)` gives the packed state to start from; it needs `block`, in which the
                inputs of each layer are measured behind the layers replaced before it.
        """
        inside = self._inside(block)
        if start is None:
            for name, linear in inside.items():
                self._replace(name, linear, None)
            return
        for group in block.gram_groups(inside):
            for name in group.names:
                self._replace(name, inside[name], start(name, inside[name], group.gram))

    def hold_packed(self, block: Block | None = None) -> None:
        """Put packed layers in the place of those in training, all or those of one decoder layer."""
        for name in self._inside(block):
            self.model.set_submodule(name, self.model.get_submodule(name).packed())

    @contextmanager
    def training_all(self) -> Iterator[None]:
        """Inside, latent layers and norms require gradients and nothing else does; the norms are fp32 then."""
        self.model.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, LatentLinear):
                module.requires_grad_(True)
                if module.bias is not None:
                    module.bias.requires_grad_(False)
        dtypes = {name: parameter.dtype for name, parameter in self.norms.items()}
        own_tensors(self.model, [*self.norms], dict.fromkeys(self.norms, torch.float32), trained=True)
        yield
        own_tensors(self.model, [*self.norms], dtypes, trained=False)

    def restore(self) -> None:
        """Put the dense layers and the norms back as they were."""
        for name, value in (self.dense | self.norms).items():
            owner, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(owner), key, value)

    def restore_flags(self) -> None:
        """Let parameters require gradients as they did, new ones none."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.flags.get(name, False) and parameter.is_floating_point())

    def _inside(self, block: Block | None) -> dict[str, nn.Module]:
        return {name: m for name, m in self.dense.items() if block is None or name.startswith(f"{block.name}.")}

    def _replace(self, name: str, linear: nn.Module, start: dict[str, Tensor] | None) -> None:
        latent = self.latent(name, linear, self.share, self.typical.get(name), start)
        self.model.set_submodule(name, latent.train(linear.training))
