"""BitNet b1.58 ("The Era of 1-bit LLMs", arXiv 2402.17764): ternary weights, 8-bit activations (W1.58A8).

Each weight matrix becomes codes in {-1, 0, 1} times one scale, the mean of its absolute values:

    gamma = mean |W|        T = clamp(round(W / gamma), -1, 1)        y = gamma * (T x_hat)

where x_hat is the input rounded to int8 by the largest absolute value of each token. A model must be *trained* this
way: rounding an ordinary model so gives garbage, and is refused here unless forced. For ordinary models use `PT2LLM`.

The codes have the byte layout of Transformers' own `bitnet` checkpoints, so such checkpoints load into our packed
layers, and ours save into that format, without moving a bit. There, `weight_scale` has two conventions:
`linear_class="bitlinear"` stores 1/gamma and divides, `"autobitlinear"` stores gamma and multiplies.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._kernels import pack_ternary
from ..packed import TernaryLinear, linear_shape
from ..step import LinearStep, register


LINEAR_CLASSES = ("bitlinear", "autobitlinear")

# A weight trained for ternary leaves next to nothing behind; Gaussian weights leave 26 % of their energy.
MAX_ENERGY_LOST = 0.02


@register("bitnet", paper="The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits (arXiv 2402.17764)")
@dataclass(frozen=True, kw_only=True)
class BitNet(LinearStep):
    """Absmean ternary weights with one scale per matrix (BitNet b1.58).

    Args:
        activation_bits (`8` or `None`): int8 activations per token as in the paper, or activations left as they are.
        linear_class (`str`): how `weight_scale` is stored, by the names of Transformers' bitnet format: `"bitlinear"`
            (1/gamma) or `"autobitlinear"` (gamma).
        force (`bool`): pack a model that was not trained for ternary weights, for experiments and benchmarks.
        modules_to_not_convert (`tuple[str]`, *optional*): see `LinearStep`.

    Raises:
        `ValueError`: the model was not trained for ternary weights and `force` is not set.
    """

    activation_bits: int | None = 8
    linear_class: str = "bitlinear"
    force: bool = False

    def __post_init__(self):
        if self.activation_bits not in (8, None):
            raise ValueError(f"activation_bits must be 8 or None, found {self.activation_bits!r}")
        if self.linear_class not in LINEAR_CLASSES:
            raise ValueError(f"linear_class must be one of {LINEAR_CLASSES}, found {self.linear_class!r}")

    def resolve(self, model: nn.Module) -> "BitNet":
        step = super().resolve(model)
        trained = getattr(model.config, "model_type", None) == "bitnet"
        return dataclasses.replace(step, force=True) if trained else step

    def empty(self, linear: nn.Module) -> TernaryLinear:
        out_features, in_features = linear_shape(linear)
        return TernaryLinear(
            in_features,
            out_features,
            linear.bias is not None,
            activation_bits=self.activation_bits,
            reciprocal_scale=self.linear_class == "bitlinear",
            transposed=type(linear) is not nn.Linear,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def compress(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        codes, gamma = ternarize(weight)
        if not self.force and (lost := energy_lost(weight, codes, gamma)) > MAX_ENERGY_LOST:
            raise ValueError(
                f"absmean rounding loses {lost:.0%} of the weight's energy, so this model was not trained for ternary "
                "weights and would produce garbage. Use PT2LLM, which ternarizes ordinary models with calibration "
                "data, or pass BitNet(force=True) to pack it all the same."
            )
        scale = gamma.reciprocal() if self.linear_class == "bitlinear" else gamma
        return {"weight": pack_ternary(codes), "weight_scale": scale.reshape(1)}

    def for_stock_checkpoint(self, stock: dict[str, Any]) -> "BitNet":
        """This step as it must be to read a checkpoint with the stock `bitnet` configuration `stock`."""
        if stock.get("use_rms_norm"):
            raise ValueError(
                "this bitnet checkpoint has a norm inside each BitLinear (use_rms_norm), which packed layers do not "
                "hold; load it with Transformers' own bitnet quantizer, without SlimConfig"
            )
        return dataclasses.replace(
            self,
            linear_class=stock.get("linear_class") or "bitlinear",
            force=self.force or is_online(stock),
        )


def is_online(stock: dict[str, Any]) -> bool:
    """Whether a stock `bitnet` configuration means dense latent weights, ternarized in each forward."""
    return stock.get("linear_class") == "autobitlinear" and stock.get("quantization_mode") == "online"


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of weight's shape and the fp32 scale gamma, a scalar tensor.

    b1.58: gamma = mean |W|, T = clamp(round(W / gamma), -1, 1), round half to even (Training Tips, Eq. 1 to 3). A
    matrix that is ternary already (all non-zero magnitudes equal) keeps its codes and magnitude: absmean would
    shrink the scale by the share of non-zeros.
    """
    magnitude = weight.abs()
    largest = magnitude.max()
    if largest > 0 and all(bool(((row == largest) | (row == 0)).all()) for row in magnitude):
        return weight.sign().to(torch.int8), largest
    gamma = magnitude.mean().clamp(min=1e-5)
    return torch.div(weight, gamma, out=magnitude).round_().clamp_(-1, 1).to(torch.int8), gamma


def energy_lost(weight: Tensor, codes: Tensor, gamma: Tensor) -> float:
    """||W - gamma T||² / ||W||²."""
    lost = torch.linalg.vector_norm(weight - gamma * codes) / torch.linalg.vector_norm(weight).clamp(min=1e-30)
    return float(lost) ** 2


def stock_bitnet_config(steps) -> dict[str, Any]:
    """The `quantization_config` of Transformers' own bitnet format for a model packed by one `BitNet` step.

    Raises:
        `ValueError`: the recipe cannot be expressed in that format.
    """
    if len(steps) != 1 or not isinstance(steps[0], BitNet):
        raise ValueError(
            f"save_format='bitnet' holds one scale per matrix, as BitNet makes them; the recipe is "
            f"{[step.name for step in steps]}. Use save_format='slim', or model.dequantize() for a dense checkpoint."
        )
    step = steps[0]
    if step.activation_bits != 8:
        raise ValueError(
            "Transformers' bitnet format always rounds activations to 8 bits, so a weight-only model would compute "
            "something else there; use BitNet(activation_bits=8) or save_format='slim'"
        )
    return {
        "quant_method": "bitnet",
        "linear_class": step.linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": list(step.modules_to_not_convert or ()),
    }


def check_stock_shapes(model: nn.Module) -> None:
    """Raise a `ValueError` if a packed layer has a shape that the stock `bitnet` format cannot hold."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear) and (module.out_features % 4 or module.transposed):
            raise ValueError(
                f"{name} has {module.out_features} output rows{' in a Conv1D' if module.transposed else ''}; "
                "Transformers' bitnet format needs an nn.Linear with a multiple of 4. Use save_format='slim'."
            )
