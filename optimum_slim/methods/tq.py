"""TQ1_0 and TQ2_0, the ternary blocks of llama.cpp (ggml-org/llama.cpp pull request 8151).

Every 256 columns of a row share a scale, their largest magnitude, and each weight becomes the nearest of three values:

    d = max |W|        T = round(W / d), in {-1, 0, 1}        W ~ d * T

That keeps a weight which is ternary already, such as those of BitNet and TriLM models, and ruins any other, which is
refused here unless forced. `load_gguf` records this step for files whose blocks differ in scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._kernels import pack_ternary
from ..packed import TernaryLinear, linear_shape
from ..step import LinearStep, register
from .bitnet import MAX_ENERGY_LOST


@register("tq", paper="TQ1_0 and TQ2_0 of llama.cpp (ggml-org/llama.cpp pull request 8151)")
@dataclass(frozen=True, kw_only=True)
class TQ(LinearStep):
    """Ternary weights with the scales of llama.cpp's blocks.

    Args:
        group_size (`int`): input columns that share a scale within a row.
        activation_bits (`8` or `None`): int8 activations per token and group, as llama.cpp multiplies, or activations
            left as they are.
        force (`bool`): pack a model that is not ternary already, for experiments.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.

    Raises:
        `ValueError`: the model is not ternary and `force` is not set.
    """

    group_size: int = 256
    activation_bits: int | None = 8
    force: bool = False

    def __post_init__(self):
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"group_size must be an integer of at least 1, found {self.group_size!r}")
        if self.activation_bits not in (8, None):
            raise ValueError(f"activation_bits must be 8 or None, found {self.activation_bits!r}")

    def empty(self, linear: nn.Module) -> TernaryLinear:
        out_features, in_features = linear_shape(linear)
        return TernaryLinear(
            in_features,
            out_features,
            linear.bias is not None,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            scale_dtype=torch.float16,
            transposed=type(linear) is not nn.Linear,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        columns = weight.shape[1]
        size = min(self.group_size, columns)
        groups = F.pad(weight, (0, -columns % size)).unflatten(1, (-1, size))
        scale = groups.abs().amax(2).to(torch.float16)
        codes = (groups / scale.float().clamp(min=1e-30)[..., None]).round().clamp(-1, 1)
        lost = torch.linalg.vector_norm(groups - scale.float()[..., None] * codes)
        if not self.force and (energy := float(lost / torch.linalg.vector_norm(groups).clamp(min=1e-30)) ** 2) > (
            MAX_ENERGY_LOST
        ):
            raise ValueError(
                f"rounding to the largest magnitude of {size} columns loses {energy:.0%} of the weight's energy, so "
                "this model is not ternary. Use PT2LLM, which ternarizes ordinary models with calibration data, or "
                "pass TQ(force=True) to pack it all the same."
            )
        return {"weight": pack_ternary(codes.flatten(1)[:, :columns].to(torch.int8)), "weight_scale": scale}
