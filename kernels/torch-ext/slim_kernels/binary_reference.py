"""Linear layers of two bits per weight in plain PyTorch: the ground truth every fast kernel is tested against.

Post-training binarization (BiLLM, https://arxiv.org/abs/2402.04291; ARB-LLM, https://arxiv.org/abs/2410.03129) gives
every weight a sign and one more bit. In most columns that bit picks one of two magnitudes; in the few *salient* ones,
which matter most, it is the sign of a second binarization, of what the first one left over. ``weight`` is uint8 of
shape (out, 2, P) with ``P = ceil(in / 8)``, and ``salient``, uint8 (P,), says which columns are salient:

    weight[n, 0]     signs s           bit      7     6     5     4     3     2     1     0
    weight[n, 1]     second bits t     column  k+7   k+6   k+5   k+4   k+3   k+2   k+1    k
    salient          1 = salient                                        (bits past the last column are 0)

A sign bit of 1 means minus. With ``g = k // group_size``, ``c = columns`` (ones if it is None) and ``offset`` (zeros
if it is None):

    k not salient    W[n, k] = offset[n, g, t] + scale[n, g, t] * c[t, k] * s
    k salient        W[n, k] = offset[n, g, 2] + scale[n, g, 2] * c[0, k] * s + scale[n, g, 3] * c[1, k] * s2

where s2 is the sign that the second bit stands for. Every weight takes two bits, whichever columns are salient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import FLOATS
from .sign_reference import signs, unpack_signs


def binary_dense(
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense matrix of shape (out, in_features), in fp32 in the order written above, then rounded to `dtype`."""
    sign = signs(weight[:, 0], in_features)
    second = unpack_signs(weight[:, 1], in_features)
    is_salient = unpack_signs(salient, in_features)
    group = torch.arange(in_features, device=weight.device) // group_size
    small, large, first, left = (scale[:, :, i].float()[:, group] for i in range(4))
    magnitude = torch.where(second, large, small)
    if columns is not None:
        factors = columns.float()
        magnitude *= torch.where(second, factors[1], factors[0])
        first, left = first * factors[0], left * factors[1]
    dense = torch.where(is_salient, first, magnitude) * sign
    if offset is not None:
        middle = [offset[:, :, i].float()[:, group] for i in range(3)]
        dense += torch.where(is_salient, middle[2], torch.where(second, middle[1], middle[0]))
    return torch.where(is_salient, dense + torch.where(second, -left, left), dense).to(dtype)


def binary_linear_reference(
    x: Tensor,
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """``x @ W.T + bias`` in fp32, rounded once to the dtype of `x`.

    Args:
        x: activations (..., in), fp32, bf16 or fp16.
        weight: two planes of bits, uint8 (out, 2, ceil(in / 8)).
        salient: uint8 (ceil(in / 8),).
        scale: (out, ceil(in / group_size), 4), fp32, bf16 or fp16.
        offset: (out, ceil(in / group_size), 3), or None.
        columns: (2, in), or None.
        bias: (out,), or None.
        group_size: columns that share a scale, a multiple of 8 or at least `in`.

    Returns:
        Tensor (..., out) in the dtype of `x`.
    """
    dense = binary_dense(weight, salient, scale, offset, columns, x.shape[-1], group_size)
    return F.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def binary_linear_dx_reference(
    dy: Tensor,
    weight: Tensor,
    salient: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    columns: Tensor | None,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient with respect to the input: ``dy @ W`` of shape (..., in_features) for `dy` of shape (..., out)."""
    dense = binary_dense(weight, salient, scale, offset, columns, in_features, group_size)
    return (dy.float() @ dense).to(dy.dtype)


def check_binary_arguments(
    in_features: int,
    dtype: torch.dtype,
    weight: tuple[tuple[int, ...], torch.dtype],
    salient: tuple[tuple[int, ...], torch.dtype],
    scale: tuple[tuple[int, ...], torch.dtype],
    offset: tuple[tuple[int, ...], torch.dtype] | None,
    columns: tuple[tuple[int, ...], torch.dtype] | None,
    bias: tuple[tuple[int, ...], torch.dtype] | None,
    group_size: int,
) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape or number, and say what was expected.

    Each tensor is given by its (shape, dtype).
    """
    for name, found in {"weight": weight, "salient": salient}.items():
        if found[1] != torch.uint8:
            raise TypeError(f"binary_linear got {name} of {found[1]}; pack it to uint8 with pack_signs.")
    floats = {"x": ((), dtype), "scale": scale, "offset": offset, "columns": columns, "bias": bias}
    for name, found in floats.items():
        if found is not None and found[1] not in FLOATS:
            raise TypeError(f"binary_linear got {name} of {found[1]}; it takes float32, bfloat16 or float16.")
    if group_size < 1 or (group_size % 8 and group_size < in_features):
        raise ValueError(
            f"binary_linear got {group_size=} for {in_features} inputs; it must be a multiple of 8, or at least the "
            "number of inputs."
        )
    outs = weight[0][0] if weight[0] else 0
    size, groups = -(-in_features // 8), -(-in_features // group_size)
    expected = {
        "weight": (weight, (outs, 2, size)),
        "salient": (salient, (size,)),
        "scale": (scale, (outs, groups, 4)),
        "offset": (offset, (outs, groups, 3)),
        "columns": (columns, (2, in_features)),
        "bias": (bias, (outs,)),
    }
    for name, (found, shape) in expected.items():
        if found is not None and tuple(found[0]) != shape:
            raise ValueError(
                f"binary_linear got {name} of shape {tuple(found[0])}; for {in_features} inputs, {outs} outputs and "
                f"groups of {group_size} it must be {shape}."
            )
