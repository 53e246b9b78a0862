"""Tiny models built from configs, shared by the tests."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from optimum_slim import Magnitude


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random two-layer Llama in fp32; `changes` override its config."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def tiny_mixtral() -> MixtralForCausalLM:
    """A random Mixtral, whose experts Transformers fuses into 3-D parameters."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=64,
        )
    ).eval()


def token_ids(batch: int = 2, length: int = 9, vocabulary: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def sparse_layer(sparsity="2:4", bits=None, group_size=None, shape=(24, 38), dtype=torch.float32, bias=True):
    """A pruned layer whose number of columns no group divides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype))
    Magnitude(sparsity=sparsity, bits=bits, group_size=group_size).replace(model, "0")
    return model[0]
