"""Tiny models and tokenizers for the tests of GGUF files."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from optimum_slim import TernaryLinear


WIDE = {"hidden_size": 256, "intermediate_size": 512}
SETTINGS = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def tiny_qwen2(**changes) -> Qwen2ForCausalLM:
    """A random Qwen2, whose query, key and value projections have biases."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**(WIDE | SETTINGS | {"tie_word_embeddings": True} | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    return model


def tiny_qwen3(**changes) -> Qwen3ForCausalLM:
    """A random Qwen3, whose heads are wider than hidden_size / heads, with norms that are not all ones."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**(WIDE | SETTINGS | {"head_dim": 128} | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def round_scales(model) -> None:
    """Round the scales of ternary layers to fp16, so that a GGUF file holds them as they are."""
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            scale = layer.scale().half().float()
            layer.weight_scale.data = (scale.reciprocal() if layer.reciprocal_scale else scale).to(layer.scale_dtype)


def byte_tokenizer(kind: str = "ByteLevel", template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of all bytes and three merges, with two special tokens: 261 tokens.

    Args:
        kind: `"ByteLevel"`, `"Digits"` or `"qwen2"`, what cuts text into words.
        template: chat template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    words = [*alphabet, *("".join(pair) for pair in merges), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
    split = {
        "Digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "qwen2": lambda: pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
    }
    tokenizer.pre_tokenizer = level if kind == "ByteLevel" else pre_tokenizers.Sequence([split[kind](), level])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast
