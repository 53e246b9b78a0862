"""What llama.cpp calls the parts of a model, and what a GGUF file says about it besides its weights.

    model.layers.3.self_attn.q_proj.weight     blk.3.attn_q.weight
    config.num_key_value_heads                 llama.attention.head_count_kv

Four architectures of llama.cpp compute what a Transformers model computes: `llama`, `qwen2`, `qwen3`, and `bitnet`,
which is a Llama with the SubLN norms of BitNet before the output and down projections. Rotary embeddings pair up
neighbouring rows of a head in llama.cpp's `llama` where Transformers pairs row i with row i + head_dim / 2; so the
query and key projections have their rows in another order there:

    row of the file     0   1       2   3           ...        (of each head)
    row of the model    0   d / 2   1   d / 2 + 1   ...        d = head_dim
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitNetConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config


CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "bitnet": BitNetConfig}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
FIELDS = {  # of a config, with the type of the number in the file
    "max_position_embeddings": ("context_length", "uint32"),
    "hidden_size": ("embedding_length", "uint32"),
    "num_hidden_layers": ("block_count", "uint32"),
    "intermediate_size": ("feed_forward_length", "uint32"),
    "num_attention_heads": ("attention.head_count", "uint32"),
    "num_key_value_heads": ("attention.head_count_kv", "uint32"),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", "float32"),
    "vocab_size": ("vocab_size", "uint32"),
}


def architecture(model: nn.Module) -> str:
    """The architecture of llama.cpp that computes what `model` computes.

    Raises:
        ValueError: there is none; says what differs.
    """
    config = model.config
    kind = config.model_type
    if kind not in CONFIGS:
        raise ValueError(
            f"GGUF files are written for the model types {', '.join(CONFIGS)}, and this model is a {kind}; save it "
            "with model.save_pretrained and use llama.cpp's convert_hf_to_gguf.py on the folder"
        )
    act, rope = config.hidden_act, _rope(config)
    wrong = []
    if act != "silu":
        wrong.append(f"hidden_act={act!r}, where llama.cpp computes silu")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        wrong.append(f"rope_type={rope['rope_type']!r}, where default, linear and llama3 are written")
    if getattr(config, "partial_rotary_factor", None) not in (None, 1) or rope.get("partial_rotary_factor", 1) != 1:
        wrong.append("partial rotary embeddings")
    if getattr(config, "use_sliding_window", False):
        wrong.append("sliding-window attention (use_sliding_window)")
    if kind in ("qwen3", "bitnet") and config.attention_bias:
        wrong.append("biases in its attention (attention_bias)")
    if kind == "bitnet" and not config.tie_word_embeddings:
        wrong.append("an output head of its own, where llama.cpp's bitnet uses the embeddings (tie_word_embeddings)")
    if wrong:
        raise ValueError(f"llama.cpp's {kind} computes something else: this model has {'; '.join(wrong)}")
    return kind


def gguf_name(name: str, kind: str) -> str:
    """The name in the file of parameter `name`; raises a `ValueError` if architecture `kind` has none for it."""
    module, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    found = LAYER_NAMES.get(layer[2]) if layer else NAMES.get(module)
    if found is None or leaf not in ("weight", "bias"):
        raise ValueError(
            f"llama.cpp's {kind} has no tensor for {name}; merge or unload adapters first, and export models with "
            "the modules of their Transformers architecture only"
        )
    return f"blk.{layer[1]}.{found}.{leaf}" if layer else f"{found}.{leaf}"


def model_name(name: str) -> str | None:
    """The parameter that the tensor `name` of a file is, `None` if it is none."""
    module, _, leaf = name.rpartition(".")
    if layer := re.fullmatch(r"blk\.(\d+)\.(.+)", module):
        found = next((ours for ours, theirs in LAYER_NAMES.items() if theirs == layer[2]), None)
        return found and f"model.layers.{layer[1]}.{found}.{leaf}"
    found = next((ours for ours, theirs in NAMES.items() if theirs == module), None)
    return found and f"{found}.{leaf}"


def row_order(name: str, config: PreTrainedConfig) -> Tensor | None:
    """Rows of parameter `name` in the order of the file, int64 (rows,); `None` if it is that of the model."""
    part = re.search(r"\.self_attn\.([qk])_proj\.", name)
    if config.model_type != "llama" or part is None:
        return None
    heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
    return torch.arange(heads * head_dim(config)).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def metadata(config: PreTrainedConfig) -> dict[str, tuple[str, Any]]:
    """What the file says about the model: key -> (type, value)."""
    kind, rope = config.model_type, _rope(config)
    entries = {f"{kind}.{key}": (number, getattr(config, name)) for name, (key, number) in FIELDS.items()}
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        entries[f"{kind}.{key}"] = "uint32", head_dim(config)
    entries[f"{kind}.rope.freq_base"] = "float32", float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        entries[f"{kind}.rope.scaling.type"] = "string", "linear"
        entries[f"{kind}.rope.scaling.factor"] = "float32", float(rope["factor"])
    return entries


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """What each frequency of Llama 3's rotary embeddings is divided by, fp32 (head_dim / 2,); `None` for other ones.

    Long waves are slowed down by `factor`, short ones are left alone, and those in between are interpolated.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_dim(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def config_of(fields: dict[str, Any], tensors: set[str]) -> PreTrainedConfig:
    """The config of the model in a file, from its metadata and the names of its tensors.

    Raises:
        ValueError: an architecture or rotary embedding that is not read here.
    """
    kind = fields.get("general.architecture")
    if kind not in CONFIGS:
        raise ValueError(
            f"the file holds a model of architecture {kind!r}; ternary blocks are read for {', '.join(CONFIGS)}. "
            "load_model(folder, gguf_file=...) reads what Transformers can, as dense weights"
        )
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_freqs.weight" in tensors:
        raise ValueError(
            "the file scales its rotary embeddings by a table or by yarn, which says nothing about the config they "
            "came from; load the checkpoint that the file was made from"
        )
    settings = {name: fields[f"{kind}.{key}"] for name, (key, _) in FIELDS.items() if f"{kind}.{key}" in fields}
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    if (dim := fields.get(f"{kind}.attention.key_length") or fields.get(f"{kind}.rope.dimension_count")) is not None:
        settings["head_dim"] = dim
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.get(f"{kind}.rope.freq_base", 1e4)}
    if scaling == "linear":
        settings["rope_parameters"] |= {"rope_type": "linear", "factor": fields[f"{kind}.rope.scaling.factor"]}
    settings["hidden_act"] = "silu"
    settings["tie_word_embeddings"] = "output.weight" not in tensors
    if kind == "llama":
        settings["attention_bias"] = "blk.0.attn_output.bias" in tensors
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    for token in ("bos", "eos"):
        settings[f"{token}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
    settings["pad_token_id"] = fields.get("tokenizer.ggml.padding_token_id")
    settings.setdefault("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())))
    return CONFIGS[kind](**settings)


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    return {"rope_type": rope.get("rope_type") or "default", "rope_theta": 1e4} | rope
