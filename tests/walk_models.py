"""Tiny models of several architectures, for the tests that walk through their layers."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW}
MODELS = {
    "llama": SHAPE,
    "mistral": SHAPE | WINDOW,
    "qwen2": SHAPE | MIXED | {"use_sliding_window": True},
    "qwen3": SHAPE,
    "gemma2": SHAPE | MIXED,
    "gemma3_text": SHAPE | MIXED,
    "phi3": SHAPE,
    "opt": {
        "vocab_size": 97,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def tiny_model(model_type, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(MODELS[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def assert_untouched(model):
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks and not module._forward_hooks


def linears(layer):
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
