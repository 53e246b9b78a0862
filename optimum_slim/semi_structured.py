"""2:4 layers on the sparse tensor cores of NVIDIA GPUs, for many tokens at a time.

A `SparseLinear` with 2 of every 4 weights saves memory, and time where reading weights is what costs: at few tokens.
At many tokens arithmetic costs, and only the sparse tensor cores (compute capability 8.0 and newer) do half of it.
`to_semi_structured` hands the 2:4 layers of a model over to PyTorch's `torch.sparse.to_sparse_semi_structured`.

Use it for prefill or large batches, under CUDA graphs or `torch.compile(mode="reduce-overhead")`, and nowhere else:
cuSPARSELt, the backend that works on an H100, spends about 600 us per call on the host, many times what a layer takes
at few tokens (4096 x 4096, one token, called eagerly: 673 us against 31 for the dense layer; 8192 tokens: 941 against
348; PyTorch 2.11). The CUTLASS backend has no such cost and refuses GPUs other than 8.x. What a CUDA graph leaves
of it was not measured yet (`python benchmarks/gpu_check.py --part sparse` does), so time your model before you rely on
it. The weights then take 9/16 of the dense bytes, and are not to be saved.
"""

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from .sparse import SparseLinear


BACKENDS = {"cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT, "CUTLASS": SparseSemiStructuredTensorCUTLASS}


def to_semi_structured(model: nn.Module) -> int:
    """Turn every 2:4 `SparseLinear` with float values into an `nn.Linear` on the sparse tensor cores, in place.

    Each takes the dtype of its values. The others (other patterns, codes) stay as they are. The result is for
    inference: see the module's docstring for when it is faster, and when much slower.

    Returns:
        The number of layers turned.

    Raises:
        RuntimeError: no NVIDIA GPU of compute capability 8.0 or newer, or no backend that multiplies on it.
        ValueError: the model has no such layer, or one is not on the GPU, in fp32, or of a shape that the backend does
            not take; then nothing was changed.
    """
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, SparseLinear) and m.keep == 2 and not m.bits
    }
    if not layers:
        raise ValueError(
            "to_semi_structured found no 2:4 layer with float values. Prune to '2:4' without bits first, for instance "
            "slim(model, [SparseGPT('2:4')])."
        )
    if not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError(
            "to_semi_structured needs an NVIDIA GPU of compute capability 8.0 or newer, and PyTorch finds none. Leave "
            "the model as it is: its 2:4 layers work everywhere."
        )
    for name, layer in layers.items():
        _check_placement(name, layer)
    first = next(iter(layers.values()))
    backend = working_backend(first.value_dtype, first.weight.device)
    for name, layer in layers.items():
        _check_shape(name, layer, backend)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _semi_structured_linear(layer, backend))
    return len(layers)


def working_backend(dtype: torch.dtype, device: torch.device | str = "cuda") -> str:
    """The first of `BACKENDS` with which a product in `dtype` runs on `device`, found by making one."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"to_semi_structured takes float16 or bfloat16 values; found {dtype}. Convert the model first."
        )
    weight = torch.tensor([1, 0, 1, 0], dtype=dtype, device=device).repeat(128, 32)
    x = torch.ones(128, 128, dtype=dtype, device=device)
    refused = []
    for name, backend in BACKENDS.items():
        try:
            if torch.equal(nn.functional.linear(x, backend.from_dense(weight)), nn.functional.linear(x, weight)):
                return name
            refused.append(f"{name}: wrong result")
        except (RuntimeError, NotImplementedError) as error:
            refused.append(f"{name}: {error}".splitlines()[0])
    raise RuntimeError(
        f"no backend of torch.sparse.to_sparse_semi_structured works on {torch.cuda.get_device_name()}: "
        f"{'; '.join(refused)}. Leave the model as it is: its 2:4 layers work everywhere."
    )


def _check_placement(name: str, layer: SparseLinear) -> None:
    if layer.value_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"to_semi_structured takes float16 or bfloat16 values; {name} has {layer.value_dtype}. Prune the model in "
            "one of those."
        )
    if not layer.weight.is_cuda:
        raise ValueError(f"{name} is on {layer.weight.device}; move the model to the GPU before to_semi_structured.")


def _check_shape(name: str, layer: SparseLinear, backend: str) -> None:
    limits = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS[layer.value_dtype]
    if layer.out_features % limits.sparse_min_rows or layer.in_features % limits.sparse_min_cols:
        raise ValueError(
            f"{name} has shape ({layer.out_features}, {layer.in_features}); {backend} takes multiples of "
            f"({limits.sparse_min_rows}, {limits.sparse_min_cols}) only. Leave this model as it is."
        )


def _semi_structured_linear(layer: SparseLinear, backend: str) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(semi_structured(layer.dense(layer.value_dtype), backend), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(layer.value_dtype), requires_grad=False)
    return linear


def semi_structured(dense: Tensor, backend: str) -> Tensor:
    """The 2:4 matrix `dense` as `torch.sparse.to_sparse_semi_structured` stores it, by the named backend."""
    return BACKENDS[backend].from_dense(dense.contiguous())
