"""Tiny mixtures of experts: fused, with shared experts, behind dense layers, with group-limited routers."""

import torch
from test_width import tiny


LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
SPARSE = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": LATENT
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}


def sparse(kind: str, **changes):
    """A random model of this kind with two layers, the last of which has experts."""
    model = tiny(kind, **({"gpt_oss": GPT_OSS} | SPARSE)[kind] | changes)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            torch.nn.init.normal_(buffer, std=0.1)
    return model


def experts_of(model, layer: int = -1):
    """The module of fused experts of one layer, and the router before it."""
    mlp = model.model.layers[layer].mlp
    return mlp.experts, mlp.router if hasattr(mlp, "router") else mlp.gate
