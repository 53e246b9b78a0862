"""What one token costs a model, counted from its modules: no weight is read, so the meta device will do.

A forward pass multiplies every token once by every weight matrix, the output head included, and a product costs two
operations per weight, a multiplication and an addition:

    FLOPs per token = 2 * weights of all matrix products + attention over the context

The second term compares the token with those before it: 2 * (d_qk + d_v) operations per head and earlier token, where
d_qk and d_v are a head's widths. It grows with the context and is counted apart. Embeddings are looked up, not
multiplied; norms, activations, softmax and rotations are small and left out.
"""

import re
from dataclasses import dataclass

from torch import nn

from .packed import PackedLinear


CONTEXT = 4096  # tokens of context that the attention is counted for, where the model takes as many


@dataclass(frozen=True)
class Flops:
    """Operations for one token.

    Args:
        products: of all matrix products, two per weight.
        attention: of the attention over `context` tokens; `None` if the config does not say the widths of heads.
        context: tokens in the context.
        experts: what was counted of a mixture of experts, "" for a model without.
    """

    products: int
    attention: int | None
    context: int
    experts: str = ""


def flops_per_token(model: nn.Module, context: int = CONTEXT) -> Flops:
    """Count `model`, dense or packed, on any device, the meta device included.

    Args:
        model: a causal language model of Transformers, with its tied weights tied.
        context: tokens that the attention is counted for, at most the positions of the model.
    """
    config = model.config.get_text_config()
    experts, active = _experts(config)
    counted = "all experts, though fewer are active" if experts and not active else ""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, PackedLinear):
            weights, routed = module.in_features * module.out_features, _in_list(name)
        else:
            matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            weights = sum(p.numel() for p in matrices)
            routed = _in_list(name) or any(p.dim() == 3 and p.shape[0] == experts for p in matrices)
        if experts and active and routed:
            weights, counted = weights * active // experts, f"{active} of {experts} experts, those active for a token"
        total += 2 * weights
    context = min(context, getattr(config, "max_position_embeddings", None) or context)
    return Flops(total, _attention(config, context), context, counted if experts else "")


def _experts(config) -> tuple[int | None, int | None]:
    """How many routed experts a layer has and how many of them a token visits."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
    found = [
        next((value for name in names if (value := getattr(config, name, None))), None) for names in (counts, active)
    ]
    return (found[0], found[1]) if isinstance(found[0], int) and isinstance(found[1] or 1, int) else (None, None)


def _in_list(name: str) -> bool:
    """Whether a module lies inside one of a list of experts."""
    return re.search(r"\bexperts\.\d+\b", name) is not None


def _attention(config, context: int) -> int | None:
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    width = getattr(config, "head_dim", None) or hidden // heads
    query = width
    if getattr(config, "v_head_dim", None):  # latent attention: queries and values differ in width
        width = config.v_head_dim
        query = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0) or width
    window = min(context, getattr(config, "sliding_window", None) or context)
    chunk = min(context, getattr(config, "attention_chunk_size", None) or context)
    seen = {"full_attention": context, "sliding_attention": window, "chunked_attention": chunk, "attention": context}
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 2 * heads * (query + width) * sum(seen.get(kind, 0) for kind in kinds)
