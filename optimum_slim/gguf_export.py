"""Write a model as a GGUF file, for llama.cpp and everything that is built on it.

    export_gguf(model, "SmolLM2-TQ2_0.gguf", tokenizer=tokenizer)

Ternary layers keep their codes, two bits or less each, in blocks of llama.cpp (see gguf_blocks.py); everything else
keeps its dtype. What the blocks cannot hold as it is, such as groups that are no multiple of a block, is refused with
the error that a conversion would make, and with the types that do hold it. A type with 16 or 8 bits, asked for by
name, turns packed layers into dense ones.

llama.cpp rounds activations to int8, in blocks of 32 or 256, whenever it multiplies weights of less than 16 bits; so
its logits are close to this package's, not equal. Tensors are made and written one at a time.
"""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .card import base_model
from .gguf_blocks import BLOCKS, layer_blocks, misfit
from .gguf_model import architecture, gguf_name, metadata, rope_factors, row_order
from .gguf_tokenizer import tokenizer_metadata
from .packed import PackedLinear, TernaryLinear
from .saving import disk_full, is_disk_full
from .stock_bitnet import has_sub_norms, with_sub_norms


DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = (*BLOCKS, *DENSE.values(), "Q8_0")
EXACT = ("TQ2_0", "Q4_0")  # what a ternary layer becomes by default, the first that holds it
Q8_COLUMNS = 32


@dataclass(frozen=True)
class GgufFile:
    """What was written: the file, how many tensors of which type, and the bytes of the file."""

    path: Path
    types: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    @property
    def main_type(self) -> str:
        """The type of most matrices."""
        return main_type(self.types)


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file; `make` gives its bytes, uint8 (..., bytes of a row)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def export_gguf(
    model, path: str | Path, *, tokenizer=None, file_type: str | None = None, overwrite: bool = False
) -> GgufFile:
    """Write `model` as the GGUF file `path`, complete or not at all.

    Args:
        model: a Llama, Qwen2 or Qwen3 model, or a BitNet one with silu, dense or slimmed. A Llama whose packed layers
            normalize their inputs (SubLN) becomes llama.cpp's `bitnet`, which has no output head of its own.
        path: file to create.
        tokenizer: the model's fast tokenizer; without one the file takes token ids only.
        file_type: what matrices become. By default ternary layers become `"TQ2_0"` (2.06 bits a weight), or
            `"Q4_0"` (4.5 bits) where their width or groups need smaller blocks, and the rest keeps its dtype.
            `"TQ2_0"`, `"TQ1_0"` (1.69 bits), `"Q4_0"` and `"Q4_1"` (5 bits, holds offsets) are for ternary layers;
            `"F32"`, `"BF16"`, `"F16"` and `"Q8_0"` for all matrices, packed ones made dense.
        overwrite: replace an existing file, once the new one is complete.

    Returns:
        What was written. Codes are those of the layers; their scales are rounded to fp16 (relative change at most
        2^-11), as the format stores them.

    Raises:
        ImportError: the `gguf` package is missing.
        ValueError: a model, layer, tokenizer or type that the file cannot hold as it is; nothing is written.
        FileExistsError: `path` exists and `overwrite` is not set.
        OSError: the disk is full; nothing is left behind.
    """
    gguf = import_gguf()
    out = Path(path).expanduser().resolve()
    if out.is_dir() or (out.exists() and not overwrite):
        raise FileExistsError(f"{path} exists; choose another name, or ask for it to be overwritten")
    if file_type is not None and file_type not in FILE_TYPES:
        raise ValueError(f"file_type must be one of {', '.join(FILE_TYPES)}, found {file_type!r}")
    model = with_sub_norms(model) if has_sub_norms(model) else model
    kind = architecture(model)
    entries = list(_entries(model, kind, file_type))
    rows = model.get_input_embeddings().weight.shape[0]
    about = metadata(model.config) | tokenizer_metadata(tokenizer, rows)
    writer = gguf.GGUFWriter(None, kind)
    writer.add_name((base_model(model) or out.stem).rpartition("/")[2])
    types = Counter(entry.kind for entry in entries)
    writer.add_file_type(_file_type(gguf, types))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, (number, value) in about.items():
        getattr(writer, f"add_{number}")(key, value)
    size = sum(_add(gguf, writer, entry) for entry in entries)
    _write(writer, entries, out, size)
    return GgufFile(out, dict(types), out.stat().st_size)


def import_gguf():
    """The package `gguf`; raises an `ImportError` with its pip line if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError('GGUF files need the package gguf: pip install "optimum-slim[gguf]"') from error
    return gguf


def main_type(types: dict[str, int]) -> str:
    """The type of most matrices, by the count of each type."""
    matrices = {kind: count for kind, count in types.items() if kind != "F32"}
    return max(matrices, key=matrices.get) if matrices else "F32"


def relative_error(layer: TernaryLinear, kind: str) -> float | None:
    """||W' - W|| / ||W|| of the layer's weights rounded to type `kind`, `None` if its rows are not whole blocks."""
    from gguf import GGMLQuantizationType, quants

    dense, number = layer.dense().cpu(), GGMLQuantizationType[kind]
    if kind in BLOCKS and misfit(layer, kind) is None:
        data = layer_blocks(layer, kind).numpy()
    elif layer.in_features % (BLOCKS[kind].columns if kind in BLOCKS else Q8_COLUMNS if kind == "Q8_0" else 1):
        return None
    else:
        data = quants.quantize(dense.numpy(), number)
    rounded = torch.from_numpy(quants.dequantize(data, number).reshape(dense.shape))
    return float(torch.linalg.vector_norm(rounded - dense) / torch.linalg.vector_norm(dense).clamp(min=1e-30))


def _entries(model: nn.Module, kind: str, file_type: str | None) -> Iterator[_Entry]:
    """The tensors of the file in the order of the model, tied ones once."""
    if (factors := rope_factors(model.config)) is not None:
        yield _Entry("rope_freqs.weight", "F32", tuple(factors.shape), lambda: _dense(factors, "F32"))
    seen, ternary = set(), 0
    for module_name, module in model.named_modules():
        packed = isinstance(module, PackedLinear)
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}"
            if (packed and key.startswith("weight_")) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.is_meta:
                raise ValueError(f"{name} is not in memory; load the model without offloading to disk")
            target, rows = gguf_name(name, kind), row_order(name, model.config)
            if packed and key == "weight":
                ternary += isinstance(module, TernaryLinear)
                yield _packed_entry(target, name.removesuffix(".weight"), module, file_type, model.dtype, rows)
            else:
                yield _dense_entry(target, name, parameter, file_type, rows)
    if file_type in BLOCKS and not ternary:
        raise ValueError(f"file_type={file_type!r} is for ternary layers, and this model has none; pass F16 or Q8_0")


def _packed_entry(target: str, name: str, layer: PackedLinear, file_type: str | None, dtype, rows) -> _Entry:
    shape = (layer.out_features, layer.in_features)
    if getattr(layer, "post_norm", False):
        raise ValueError(f"{name} normalizes its outputs, which no layer of llama.cpp does; it cannot be exported")
    if isinstance(layer, TernaryLinear) and (file_type is None or file_type in BLOCKS):
        tried = EXACT if file_type is None else (file_type,)
        fits = next((kind for kind in tried if misfit(layer, kind) is None), None)
        if fits is None:
            raise ValueError(_refusal(name, layer, tried))
        return _Entry(target, fits, shape, lambda: layer_blocks(layer, fits, rows))
    kind = _dense_kind(DENSE[dtype], file_type, shape)
    return _Entry(target, kind, shape, lambda: _dense(layer.dense().cpu(), kind, rows, name))


def _dense_entry(target: str, name: str, parameter: nn.Parameter, file_type: str | None, rows) -> _Entry:
    if parameter.dtype not in DENSE or parameter.dim() > 2:
        raise ValueError(
            f"{name} is {parameter.dtype} of shape {tuple(parameter.shape)}, not an ordinary matrix; call "
            "model.dequantize() first"
        )
    matrix = parameter.dim() == 2
    kind = _dense_kind(DENSE[parameter.dtype], file_type, tuple(parameter.shape)) if matrix else "F32"
    return _Entry(target, kind, tuple(parameter.shape), lambda: _dense(parameter.detach().cpu(), kind, rows, name))


def _dense_kind(own: str, file_type: str | None, shape: tuple[int, ...]) -> str:
    """The type asked for, or that of the model where none was or where the rows are not whole blocks of it."""
    whole = file_type != "Q8_0" or shape[1] % Q8_COLUMNS == 0
    return file_type if file_type not in (None, *BLOCKS) and whole else own


def _dense(tensor: Tensor, kind: str, rows: Tensor | None = None, name: str = "") -> Tensor:
    tensor = tensor if rows is None else tensor[rows]
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType, quants

        return torch.from_numpy(quants.quantize(tensor.float().numpy(), GGMLQuantizationType.Q8_0))
    dtype = next(dtype for dtype, known in DENSE.items() if known == kind)
    stored = tensor.to(dtype).contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError(f"{name} holds NaN, or values that are infinite in {kind}; pass file_type='BF16'")
    return stored.view(torch.uint8)


def _refusal(name: str, layer: TernaryLinear, tried: tuple[str, ...]) -> str:
    reasons = "; ".join(f"as {kind}, {misfit(layer, kind)}" for kind in tried)
    wrong = relative_error(layer, tried[-1])
    cost = "" if wrong is None else f" Rounded to {tried[-1]} all the same, its weights would be off by {wrong:.1%}."
    held = [kind for kind in BLOCKS if kind not in tried and misfit(layer, kind) is None]
    errors = {kind: relative_error(layer, kind) for kind in (*held, "F16", "Q8_0")}
    known = [f"{kind!r} (off by {error:.2%})" for kind, error in errors.items() if error is not None]
    return f"{name} cannot be written without a change: {reasons}.{cost} Pass file_type={' or '.join(known)}."


def _file_type(gguf, types: Counter) -> int:
    kind = main_type(types)
    return gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]


def _add(gguf, writer, entry: _Entry) -> int:
    """Announce a tensor to the writer; returns its bytes."""
    number = gguf.GGMLQuantizationType[entry.kind]
    columns, size = gguf.GGML_QUANT_SIZES[number]
    shape = (*entry.shape[:-1], entry.shape[-1] // columns * size)
    count = torch.Size(shape).numel()
    writer.add_tensor_info(entry.name, shape, torch.empty(0, dtype=torch.uint8).numpy().dtype, count, number)
    return count


def _write(writer, entries: list[_Entry], out: Path, size: int) -> None:
    """Write all tensors to a hidden file beside `out`, which then takes its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < size:
        raise disk_full(out.parent, size)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make().numpy())
        writer.close()
        os.replace(partial, out)
    except OSError as error:
        if not is_disk_full(error):
            raise
        partial.unlink(missing_ok=True)
        raise disk_full(out.parent, size) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
