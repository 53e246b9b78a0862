"""Read the ternary blocks of a GGUF file straight into packed layers.

    model = load_gguf("path/of/a/folder", "TriLM-TQ2_0.gguf")

The codes are cut out of their blocks and packed again, one tensor at a time; a dense copy of them never exists.
`from_pretrained(..., gguf_file=...)` of Transformers makes every weight dense, and accepts no other quantization
configuration beside a GGUF file, so this is a function of its own.

Where all blocks of each tensor have one scale, as in BitNet models, the model is as if `BitNet` had packed it; else
every 256 columns of a row keep their own scale, as the step `TQ` records it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from ._kernels import pack_ternary
from .config import SlimConfig
from .gguf_blocks import unpack_blocks
from .gguf_export import import_gguf
from .gguf_model import config_of, model_name, row_order
from .methods.bitnet import BitNet
from .methods.tq import TQ


TERNARY = ("TQ1_0", "TQ2_0")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_gguf(
    name: str | Path, gguf_file: str | None = None, *, dtype="auto", activation_bits: int | None = 8
) -> torch.nn.Module:
    """A model whose TQ1_0 and TQ2_0 tensors are packed `TernaryLinear` layers and whose other tensors are dense.

    Args:
        name: Hub id or local folder; or the path of a GGUF file.
        gguf_file: name of the GGUF file there.
        dtype: of the dense tensors and activations; `"auto"` takes that of the file's embeddings, fp32 if those are
            quantized.
        activation_bits: 8 rounds activations to int8, as BitNet models are trained and llama.cpp multiplies; `None`
            leaves them as they are.

    Returns:
        The model, which can be saved and loaded as any slimmed one. Its tokenizer comes with
        `AutoTokenizer.from_pretrained(name, gguf_file=...)`.

    Raises:
        ImportError: the `gguf` package is missing.
        FileNotFoundError: there is no such file.
        ValueError: no GGUF file, one without ternary blocks, or of an architecture that is not read here.
    """
    gguf = import_gguf()
    path = _find(name, gguf_file)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path.name} is no GGUF file, or cut short ({error}); copy it again") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = config_of({key: _value(field) for key, field in reader.fields.items()}, set(tensors))
    if not any(tensor.tensor_type.name in TERNARY for tensor in tensors.values()):
        raise ValueError(
            f"{path.name} holds no ternary tensor ({' or '.join(TERNARY)}); load_model(folder, gguf_file=...) reads "
            "it as dense weights"
        )
    if dtype == "auto":
        dtype = DTYPES.get(tensors["token_embd.weight"].tensor_type.name, torch.float32)
    packed, state = {}, {}
    for key, tensor in tensors.items():
        target = model_name(key)
        if target is None or not target.endswith((".weight", ".bias")):
            raise ValueError(f"{path.name} holds a tensor {key}, which no {config.model_type} model has a place for")
        order = row_order(target, config)
        rows = None if order is None else order.argsort()
        if tensor.tensor_type.name in TERNARY:
            packed[target.removesuffix(".weight")] = _ternary(key, tensor, rows)
        else:
            state[target] = _dense(gguf, tensor, rows).to(dtype)
    config.quantization_config = _recipe(packed, state, activation_bits).to_dict()
    per_tensor = config.quantization_config["steps"][0]["step"] == BitNet.name
    for target, (weight, scale, one) in packed.items():
        state[f"{target}.weight"] = weight
        state[f"{target}.weight_scale"] = one.reshape(1) if per_tensor else scale
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if missing := sorted(model.state_dict().keys() - state.keys() - tied.keys()):
        raise ValueError(f"{path.name} lacks {missing[0]}; the file is incomplete, copy or convert it again")
    model.name_or_path = model.config._name_or_path = str(name)
    return model.eval()


def _find(name: str | Path, gguf_file: str | None) -> Path:
    path = Path(name) if gguf_file is None else Path(name) / gguf_file
    if path.is_file():
        return path
    if gguf_file is None or Path(name).is_dir():
        raise FileNotFoundError(f"there is no file {path}; pass a folder or Hub id and gguf_file=, or a path")
    return Path(cached_file(str(name), gguf_file))


def _value(field) -> Any:
    """A number or a string of the metadata; of a list only its length is needed, so its entries stay unread."""
    return [None] * len(field.data) if len(field.types) > 1 else field.contents()


def _ternary(key: str, tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes, the scales fp16 (out, blocks), and the scale fp32 if there is but one. Zero blocks have any."""
    try:
        codes, scale = unpack_blocks(torch.from_numpy(np.array(tensor.data)), tensor.tensor_type.name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    used = scale[(codes.unflatten(1, (scale.shape[1], -1)) != 0).any(2)].float()
    one = used.new_ones(()) if not len(used) else used[0] if bool((used == used[0]).all()) else None
    if rows is not None:
        codes, scale = codes[rows], scale[rows]
    return pack_ternary(codes), scale, one


def _dense(gguf, tensor, rows: Tensor | None) -> Tensor:
    kind = tensor.tensor_type
    data = np.array(tensor.data) if kind.name in ("F32", "F16") else gguf.dequantize(tensor.data, kind)
    dense = torch.from_numpy(data)
    return dense if rows is None else dense[rows]


def _recipe(packed: dict[str, tuple], state: dict[str, Tensor], activation_bits: int | None) -> SlimConfig:
    """The recipe that such a model would have been packed by."""
    kept = tuple(sorted(key.removesuffix(".weight") for key in state if key.endswith("_proj.weight")))
    common = {"activation_bits": activation_bits, "force": True, "modules_to_not_convert": (*kept, "lm_head")}
    if all(one is not None for _, _, one in packed.values()):
        return SlimConfig([BitNet(linear_class="autobitlinear", **common)])
    return SlimConfig([TQ(group_size=256, **common)])
