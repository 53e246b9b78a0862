"""What the launchers of all Triton kernels share: which GPUs they serve, and the sum over splits of K."""

import warnings
from functools import cache

import torch
import triton
from torch import Tensor

from .triton_kernels import sum_splits_kernel


DECODE_TOKENS = 16
"""Up to this many tokens the weight's bytes are what costs time, above it the arithmetic."""

_BLOCK_SUM = 1024


def allocate_parts(out: Tensor, tokens: int, outs: int, splits: int) -> Tensor:
    """Where the splits of K write: `out` itself if there is one, else fp32 of shape (splits, tokens, outs)."""
    return out if splits == 1 else out.new_empty(splits, tokens, outs, dtype=torch.float32)


def sum_parts(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = the sum of `parts` (+ bias), unless `parts` is `out`: a single split has added the bias itself."""
    if parts is out:
        return
    splits, tokens, outs = parts.shape
    size = tokens * outs
    sum_splits_kernel[(triton.cdiv(size, _BLOCK_SUM),)](
        parts, bias, out, size, outs, splits, BLOCK=_BLOCK_SUM, num_warps=4, enable_fp_fusion=True
    )


def speaks_ptx(x: Tensor) -> bool:
    """Whether the kernels of `x` run on an NVIDIA GPU."""
    return x.is_cuda and torch.version.hip is None


@cache
def before_ampere(device: torch.device) -> bool:
    """Whether the GPU is too old for the kernels; the first time this warns."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return False
    name = torch.cuda.get_device_name(device)
    warnings.warn(
        f"The kernels of optimum_slim need an NVIDIA GPU of compute capability 8.0 or newer; {name} is older. Using "
        "plain PyTorch instead, which is slow.",
        stacklevel=4,
    )
    return True
