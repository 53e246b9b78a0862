"""Training of signs: a latent matrix whose sign is used, and OneBit's loss against a teacher.

A sign has no useful gradient, so a real number stands behind each one during training (`LatentSignLinear`). The layer
multiplies by sign(L), and the optimizer moves L by a gradient that pretends the sign to be smooth: from G, that of the
sign matrix, OneBit's code (arXiv 2402.11295) makes

    dL = G * (1.001 - tanh²(L))

L starts small, so that signs can turn: at 0.01 * sign(W) in OneBit's code, or in proportion to W with 0.01 as its mean
magnitude. The second start remembers how much of a weight there was: the signs of small weights turn first, while from
the first one those of the largest, whose turning costs most, turn just as easily.

The scales are rounded to the dtype in which they will be stored in every forward pass, and the gradient passes as if
they were not. What is trained is therefore what is kept: the packed layer gives the outputs of the latent one, but for
the order in which sums are rounded (in fp32 about 1e-6 of the largest output; in 16 bits their own rounding).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._kernels import pack_signs
from ._kernels.reference import quantize_activations
from .block import evaluating
from .losses import token_loss
from .sign import SignLinear, normalized
from .sparse_training import product


LATENT = 0.01  # mean magnitude at which latents start
STARTS = ("weights", "signs")


@dataclass(frozen=True)
class Signs:
    """The signs -1 and 1 of a latent matrix, that of 0 being 1, as `product` multiplies by them."""

    def weight(self, latent: Tensor) -> Tensor:
        return torch.where(latent < 0, -1.0, 1.0)

    def gradients(self, gradient: Tensor, latent: Tensor) -> list[Tensor]:
        """OneBit's gradient of the latents from that of the signs."""
        return [gradient * (1.001 - latent.tanh().square())]


class LatentSignLinear(nn.Module):
    """A `SignLinear` in training: latents for its signs, and its scales and bias in fp32.

    Args:
        layout: the packed layer to become, on the meta device.
        latents: fp32 (out, in), see `first_latents`.
        scale_out, scale_in: (out,) and (in,), the first scales.
        bias: (out,) or `None`; a copy in fp32 is trained.
    """

    def __init__(
        self, layout: SignLinear, latents: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None = None
    ):
        super().__init__()
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.__dict__["layout"] = layout  # no submodule: its tensors are none of this layer's
        self.weight = nn.Parameter(latents)
        self.weight_in = nn.Parameter(scale_in.detach().float().clone())
        self.weight_out = nn.Parameter(scale_out.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), computed in the dtype of `x`, or that of autocast where it is on."""
        inputs = x * self._stored(self.weight_in)
        if self.layout.activation_bits:
            inputs = inputs + (quantize_activations(inputs, self.in_features) - inputs).detach()
        sums = product(inputs.to(x.dtype), Signs(), self.weight)
        y = sums * self._stored(self.weight_out)
        if self.layout.post_norm:
            y = normalized(y, self.bias)
        elif self.bias is not None:
            y = y + self.bias
        return y.to(sums.dtype)

    def _stored(self, scale: Tensor) -> Tensor:
        """The scale as it will be stored, with the gradient of the fp32 one."""
        return scale + (scale.to(self.layout.scale_dtype).float() - scale).detach()

    @torch.no_grad()
    def packed(self) -> SignLinear:
        """The packed layer that does what this one does."""
        layout, dtype = self.layout, self.layout.scale_dtype
        scales = {"weight_in": self.weight_in.to(dtype), "weight_out": self.weight_out.to(dtype)}
        layout.load_packed({"weight": pack_signs(self.weight < 0)} | scales)
        if self.bias is not None:
            layout.bias = nn.Parameter(self.bias.detach().to(layout.bias.dtype, copy=True))
        return layout.train(self.training)


def first_latents(weight: Tensor, start: str) -> Tensor:
    """The latents with which training starts, a new fp32 tensor (out, in) with the signs of `weight`.

    Args:
        weight: (out, in).
        start: `"weights"`, in proportion to them, or `"signs"`, all of one magnitude.
    """
    signs = torch.where(weight < 0, -LATENT, LATENT)
    if start == "signs":
        return signs
    magnitude = weight.float().abs()
    return signs * magnitude / magnitude.mean().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class SignDistillation:
    """OneBit's loss for `fit`: imitate the teacher's predictions and the directions of its hidden states.

        loss = mean over tokens of KL(teacher || student)
             + hidden_weight * sum over hidden states i of mean over tokens of ||t_i / ||t_i|| - s_i / ||s_i|| ||²

    where i goes over the embeddings' output and the outputs of all decoder layers but the last. No text is predicted
    (there is no language-modelling loss). The authors' code sums the divergence over the tokens of a sample and
    multiplies it by 0.01; at their length of 2048 that is this loss with `hidden_weight` 1 / 20.48, times 20.48.

    Args:
        teacher (`PreTrainedModel`): a causal language model with the student's vocabulary; it runs in evaluation mode
            without gradients.
        hidden_weight (`float`): 0 leaves the second term out.

    Raises:
        ValueError: when called: the two models have other vocabularies, or, with `hidden_weight`, another number or
            width of hidden states.
    """

    teacher: nn.Module
    hidden_weight: float = 1.0

    def __call__(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """The loss on `input_ids`, int64 (batch, length) on the student's device, as an fp32 scalar."""
        asked = {"use_cache": False, "output_hidden_states": bool(self.hidden_weight)}
        with torch.no_grad(), evaluating(self.teacher):
            taught = self.teacher(input_ids=input_ids.to(next(self.teacher.parameters()).device), **asked)
        learned = model(input_ids=input_ids, **asked)
        loss = token_loss(learned.logits, input_ids, taught.logits.to(learned.logits.device))
        if not self.hidden_weight:
            return loss
        ours, theirs = learned.hidden_states, taught.hidden_states
        if len(ours) != len(theirs) or ours[0].shape != theirs[0].shape:
            raise ValueError(
                f"student and teacher have {len(ours)} and {len(theirs)} hidden states of shapes "
                f"{tuple(ours[0].shape)} and {tuple(theirs[0].shape)}, which cannot be compared; set hidden_weight=0"
            )
        return loss + self.hidden_weight * sum(map(direction_distance, ours[:-1], theirs[:-1]))


def direction_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of the squared distance between (batch, length, hidden) vectors scaled to length 1."""
    student, teacher = (F.normalize(states.float(), dim=-1) for states in (student, teacher.to(student.device)))
    return (teacher - student).square().sum(-1).mean()
