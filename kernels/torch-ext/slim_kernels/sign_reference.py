"""Linear layers of signs in plain PyTorch: the ground truth every fast kernel is tested against.

A weight is one bit, 1 for minus (as the sign bit of a float), so eight fit a byte of ``weight``, uint8 of shape
(out, ceil(in / 8)). Bit ``k % 8`` of byte ``k // 8`` belongs to column ``k``:

    bit      7     6     5     4     3     2     1     0
    column  k+7   k+6   k+5   k+4   k+3   k+2   k+1    k          (bits past the last column are 0)

The dense matrix is ``W[n, k] = scale_out[n] * S[n, k] * scale_in[k]`` with S of -1 and 1: one number per output and,
if ``scale_in`` is given, one per input, as in OneBit (https://arxiv.org/abs/2402.11295). A ``scale_out`` of shape (1,)
serves the whole tensor, as in 1-bit BitNet (https://arxiv.org/abs/2310.11453). The inputs are scaled first, the sums
afterwards, so that in between there are only additions and subtractions:

    y = ((x * scale_in) @ S.T) * scale_out + bias

With ``activation_bits=8`` each vector ``x * scale_in`` is rounded to int8 by its largest magnitude before the sums, as
in `reference.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import FLOATS, quantize_activations


_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_signs(minus: Tensor) -> Tensor:
    """Pack a bool mask (..., in), true where the sign is minus, into uint8 (..., ceil(in / 8))."""
    if minus.dtype != torch.bool:
        raise TypeError(f"pack_signs got {minus.dtype}; it takes a bool mask that is true where the sign is minus.")
    octets = F.pad(minus.to(torch.uint8), (0, -minus.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (octets * octets.new_tensor(_POWERS)).sum(-1, dtype=torch.uint8)


def unpack_signs(weight: Tensor, columns: int) -> Tensor:
    """Undo `pack_signs`: uint8 (..., ceil(columns / 8)) to bool (..., columns), true where the sign is minus."""
    return (weight[..., None] & weight.new_tensor(_POWERS)).ne(0).flatten(-2)[..., :columns]


def sign_dense(
    weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Dense matrix of shape (out, columns): ``scale_out * S * scale_in``, computed in fp32 and rounded to `dtype`."""
    dense = signs(weight, columns) * scale_out.float()[:, None]
    return (dense if scale_in is None else dense * scale_in.float()).to(dtype)


def sign_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale_in: Tensor | None,
    scale_out: Tensor,
    bias: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """``((x * scale_in) @ S.T) * scale_out + bias`` in fp32, rounded once to the dtype of `x`.

    Args:
        x: activations (..., in), fp32, bf16 or fp16.
        weight: packed signs, uint8 (out, ceil(in / 8)).
        scale_in: (in,), fp32, bf16 or fp16, or None.
        scale_out: (out,), or (1,) for the whole tensor; fp32, bf16 or fp16.
        bias: (out,), or None.
        activation_bits: 8 rounds ``x * scale_in`` to int8 per token, 0 leaves it alone.

    Returns:
        Tensor (..., out) in the dtype of `x`.
    """
    columns = x.shape[-1]
    inputs = x.float() if scale_in is None else x.float() * scale_in.float()
    if activation_bits == 8 and x.numel():
        inputs = quantize_activations(inputs, columns)
    y = F.linear(inputs, signs(weight, columns)) * scale_out.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def sign_linear_dx_reference(
    dy: Tensor, weight: Tensor, scale_in: Tensor | None, scale_out: Tensor, columns: int
) -> Tensor:
    """Gradient with respect to the input: ``dy @ W`` of shape (..., columns) for `dy` of shape (..., out)."""
    dx = (dy.float() * scale_out.float()) @ signs(weight, columns)
    return (dx if scale_in is None else dx * scale_in.float()).to(dy.dtype)


def check_sign_arguments(
    columns: int,
    dtype: torch.dtype,
    weight: tuple[tuple[int, ...], torch.dtype],
    scale_in: tuple[tuple[int, ...], torch.dtype] | None,
    scale_out: tuple[tuple[int, ...], torch.dtype],
    bias: tuple[tuple[int, ...], torch.dtype] | None,
    activation_bits: int,
) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape or number, and say what was expected.

    Each tensor is given by its (shape, dtype).
    """
    if weight[1] != torch.uint8:
        raise TypeError(f"sign_linear got a weight of {weight[1]}; pack it to uint8 with pack_signs.")
    floats = {"x": ((), dtype), "scale_in": scale_in, "scale_out": scale_out, "bias": bias}
    for name, found in floats.items():
        if found is not None and found[1] not in FLOATS:
            raise TypeError(f"sign_linear got {name} of {found[1]}; it takes float32, bfloat16 or float16.")
    if activation_bits not in (0, 8):
        raise ValueError(
            f"sign_linear got {activation_bits=}; it must be 8 (int8 activations) or 0 (activations as they are)."
        )
    outs = weight[0][0] if weight[0] else 0
    allowed = {
        "weight": (weight, [(outs, -(-columns // 8))]),
        "scale_in": (scale_in, [(columns,)]),
        "scale_out": (scale_out, [(1,), (outs,)]),
        "bias": (bias, [(outs,)]),
    }
    for name, (found, shapes) in allowed.items():
        if found is not None and tuple(found[0]) not in shapes:
            raise ValueError(
                f"sign_linear got {name} of shape {tuple(found[0])}; for {columns} inputs and {outs} outputs it must "
                f"be {' or '.join(map(str, shapes))}."
            )


def signs(weight: Tensor, columns: int) -> Tensor:
    """The signs of packed bits as fp32 of shape (..., columns): -1 for a bit of 1, else 1."""
    return 1 - 2 * unpack_signs(weight, columns).float()
