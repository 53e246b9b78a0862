"""LayerSkip's schedules (https://arxiv.org/abs/2404.16710, Section 4.1), functions of layer and step alone.

Of L layers, numbered from 0, layer l is skipped at step t of T with probability S(t) D(l) p_max, and the loss of its
exit weighs C(t, l) e(l) / sum of C(t, i) e(i) over all layers i:

    D(l) = exp(l ln 2 / (L - 1)) - 1                          from 0 to 1, the deeper the likelier
    S(t) = 1 ("constant"), or exp(t ln 2 / (T - 1)) - 1       from scratch ("exponential")
    e(l) = e_scale (0 + 1 + ... + l)                          below the last layer
    e(L - 1) = L - 1 + e_scale (0 + 1 + ... + (L - 2))        ("sum", the paper's)
    C(t, l) = 0 or 1                                          by the curriculum: which exits are trained at this step

The paper's e gives an exit at a quarter of the depth a twentieth of the last layer's weight. For runs too short for
that there are "linear", e(l) = e_scale l / (L - 1), and "uniform", e(l) = e_scale, with 1 for the last layer.
"""

import math


SCALES = ("sum", "linear", "uniform")
CURRICULA = ("rotational", "gradual", "none")
DROPOUT_SCHEDULES = ("constant", "exponential")


def dropout_share(part: float) -> float:
    """2^part - 1, with part in [0, 1]: D of l / (L - 1), and S of t / (T - 1)."""
    return math.exp(part * math.log(2)) - 1


def dropout_rates(layers: int, p_max: float, share: float = 1.0) -> list[float]:
    """The probability with which each layer is skipped, given S(t) as `share`."""
    return [share * p_max * dropout_share(layer / max(1, layers - 1)) for layer in range(layers)]


def exit_scales(layers: int, e_scale: float, kind: str = "sum") -> list[float]:
    """e(l) for each layer."""
    if kind == "uniform":
        return [e_scale] * (layers - 1) + [1.0]
    if kind == "linear":
        return [e_scale * layer / (layers - 1) for layer in range(layers - 1)] + [1.0]
    sums = [layer * (layer + 1) / 2 for layer in range(layers)]
    return [e_scale * total for total in sums[:-1]] + [layers - 1 + e_scale * (sums[-2] if layers > 1 else 0)]


def exits_trained(curriculum: str, layers: int, step: int, steps: int, rotation: int) -> list[bool]:
    """C(t, l) for each layer.

    "rotational" enables every `rotation`-th layer and shifts by one at each step; "gradual" begins with the last
    layer and adds the one before every T / 2L steps, all of them in half of the run; "none" enables all.
    """
    if curriculum == "rotational":
        return [layer % rotation == step % rotation for layer in range(layers)]
    if curriculum == "gradual":
        return [step >= (layers - 1 - layer) * steps / (2 * layers) for layer in range(layers)]
    return [True] * layers


def exit_weights(scales: list[float], trained: list[bool]) -> dict[int, float]:
    """The normalized weight of each exit that has one, by layer; the last layer's alone if no other has."""
    weighed = {layer: scale for layer, scale in enumerate(scales) if trained[layer] and scale > 0}
    total = sum(weighed.values())
    return {layer: scale / total for layer, scale in weighed.items()} or {len(scales) - 1: 1.0}
