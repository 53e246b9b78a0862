"""Ternary linear layers in plain PyTorch: the ground truth every fast kernel is tested against.

A ternary weight takes three values, so four of them fit a byte. With ``P = ceil(out / 4)``, bits ``2i .. 2i+1`` of
``weight[r, k]`` hold the code ``T + 1`` of output row ``r + i * P`` (the packing of Transformers' BitNet checkpoints):

    bit       7 6   5 4   3 2   1 0
    row      r+3P  r+2P   r+P    r         codes 0, 1, 2 stand for -1, 0, +1; rows past the end hold code 1

The dense matrix is ``W[n, k] = scale[n, g] * T[n, k] + offset[n, g]`` with ``g = k // group_size``. A scale of shape
(1,) serves the whole tensor. With ``act_bits=8`` each activation vector (the part of it that shares a weight scale)
is rounded to int8 by its largest magnitude, as in BitNet b1.58 (https://arxiv.org/abs/2402.17764):

    s = 127 / max(|x|),    q = clamp(round(x * s), -128, 127),    y = W @ (q / s) + bias
"""

import torch
import torch.nn.functional as F
from torch import Tensor


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack values -1, 0, 1 of shape (out, in) into uint8 of shape (ceil(out / 4), in)."""
    if codes.dim() != 2:
        raise ValueError(f"pack_ternary got a tensor of shape {tuple(codes.shape)}; it expects (out, in).")
    planes = codes.to(torch.int8) + 1
    if planes.numel() and (planes.min() < 0 or planes.max() > 2):
        raise ValueError("pack_ternary got values outside -1, 0, 1; round the weight to ternary first.")
    rows = -(-codes.shape[0] // 4)
    planes = F.pad(planes.to(torch.uint8), (0, 0, 0, 4 * rows - codes.shape[0]), value=1).view(4, rows, -1)
    return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def unpack_ternary(weight: Tensor, out_features: int) -> Tensor:
    """Undo `pack_ternary`: uint8 (ceil(out / 4), in) to int8 (out, in) with values -1, 0, 1."""
    planes = torch.cat([weight >> shift & 3 for shift in (0, 2, 4, 6)])
    return planes[:out_features].to(torch.int8) - 1


def dequantize(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    out_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense matrix of shape (out, in): ``scale * T + offset``, computed in fp32 and rounded once to `dtype`."""
    dense = unpack_ternary(weight, out_features).float()
    if scale.dim() == 1:
        return (dense * scale.float()).to(dtype)
    columns = dense.shape[1]
    dense *= _per_column(scale, group_size, columns)
    if offset is not None:
        dense += _per_column(offset, group_size, columns)
    return dense.to(dtype)


def quantize_activations(x: Tensor, group_size: int) -> Tensor:
    """Round `x` to int8 per token and group of columns, and return the fp32 values the integers stand for."""
    columns = x.shape[-1]
    groups = -(-columns // group_size)
    padded = F.pad(x.float(), (0, groups * group_size - columns)).unflatten(-1, (groups, group_size))
    s = 127 / padded.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    quantized = (padded * s).round().clamp(-128, 127) / s
    return quantized.flatten(-2)[..., :columns]


def ternary_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    """``x @ W.T + bias`` in fp32, rounded once to the dtype of `x`.

    Args:
        x: activations (..., in), fp32, bf16 or fp16.
        weight: packed codes, uint8 (ceil(out / 4), in).
        scale: (1,) for the whole tensor, or (out, ceil(in / group_size)); fp32, bf16 or fp16.
        offset: same shape as a two-dimensional scale, or None.
        bias: (out,), or None.
        out_features: number of output rows (the packing pads it to a multiple of 4).
        group_size: columns that share a scale; ignored for a scale of shape (1,).
        act_bits: 8 rounds the activations to int8, 0 leaves them alone.

    Returns:
        Tensor (..., out) in the dtype of `x`.
    """
    columns = x.shape[-1]
    inputs = x.float()
    if act_bits == 8 and x.numel():
        inputs = quantize_activations(x, columns if scale.dim() == 1 else min(group_size, columns))
    dense = dequantize(weight, scale, offset, out_features, group_size)
    return F.linear(inputs, dense, None if bias is None else bias.float()).to(x.dtype)


def ternary_linear_dx_reference(
    dy: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int
) -> Tensor:
    """Gradient with respect to the input: ``dy @ W`` of shape (..., in) for `dy` of shape (..., out)."""
    dense = dequantize(weight, scale, offset, dy.shape[-1], group_size)
    return (dy.float() @ dense).to(dy.dtype)


def check_arguments(
    columns: int,
    dtype: torch.dtype,
    weight_shape: tuple[int, ...],
    weight_dtype: torch.dtype,
    scale_shape: tuple[int, ...],
    scale_dtype: torch.dtype,
    offset_shape: tuple[int, ...] | None,
    offset_dtype: torch.dtype | None,
    bias_shape: tuple[int, ...] | None,
    bias_dtype: torch.dtype | None,
    out_features: int,
    group_size: int,
    act_bits: int,
) -> None:
    """Raise TypeError for a wrong dtype, ValueError for a wrong shape or number, and say what was expected."""
    if weight_dtype != torch.uint8:
        raise TypeError(f"ternary_linear got a weight of {weight_dtype}; pack it to uint8 with pack_ternary.")
    for name, found in (("x", dtype), ("scale", scale_dtype), ("offset", offset_dtype), ("bias", bias_dtype)):
        if found is not None and found not in FLOATS:
            raise TypeError(f"ternary_linear got {name} of {found}; it takes float32, bfloat16 or float16.")
    if out_features < 1 or group_size < 1 or act_bits not in (0, 8):
        raise ValueError(
            f"ternary_linear got {out_features=}, {group_size=}, {act_bits=}; the first two must be at least 1 and "
            "act_bits 8 (int8 activations) or 0 (activations as they are)."
        )
    matrix = (out_features, -(-columns // group_size))
    allowed = {
        "weight": (weight_shape, [(-(-out_features // 4), columns)]),
        "scale": (scale_shape, [matrix] if offset_shape is not None else [(1,), matrix]),
        "offset": (offset_shape, [matrix]),
        "bias": (bias_shape, [(out_features,)]),
    }
    for name, (found, shapes) in allowed.items():
        if found is not None and tuple(found) not in shapes:
            raise ValueError(
                f"ternary_linear got {name} of shape {tuple(found)}; for {columns} inputs, {out_features} outputs and "
                f"groups of {group_size} it must be {' or '.join(map(str, shapes))}."
            )


def _per_column(values: Tensor, group_size: int, columns: int) -> Tensor:
    if values.shape[1] == 1:
        return values.float()
    return values.float().repeat_interleave(group_size, dim=1)[:, :columns]
