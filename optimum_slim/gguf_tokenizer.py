"""What a GGUF file says about the tokenizer, taken from a fast tokenizer of Transformers.

llama.cpp knows byte-level BPE as the model `gpt2`: a list of tokens, their types, the merges, and the name of the
pattern that cuts text into words before anything is merged. The name is chosen here by the pattern itself, as the
tokenizer's own JSON holds it, and a pattern without a name is refused: another one would cut words differently and
nothing would say so.
"""

import json
from typing import Any


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = {  # what cuts text into words -> llama.cpp's name for it
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""), "bytes"): "qwen2",
}


def tokenizer_metadata(tokenizer, vocab_size: int) -> dict[str, tuple[str, Any]]:
    """What the file says about `tokenizer`: key -> (type, value).

    Args:
        tokenizer: a fast tokenizer of Transformers, or `None`, for a file that takes token ids only.
        vocab_size: rows of the embeddings; rows without a token become unused ones.

    Raises:
        ValueError: the tokenizer is no byte-level BPE, or one that llama.cpp has no name for.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": ("string", "none")}
    data = _json(tokenizer)
    pattern = _pattern(data["pre_tokenizer"])
    if data["model"]["type"] != "BPE" or pattern is None:
        raise ValueError(
            f"the tokenizer is a {data['model']['type']} with the pre-tokenizer {_short(data['pre_tokenizer'])}; GGUF "
            f"files are written for byte-level BPE as in {', '.join(sorted(PATTERNS.values()))}. Pass tokenizer=None "
            "for a file without one, which llama.cpp runs on token ids"
        )
    tokens, types = _tokens(data, vocab_size)
    entries = {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", pattern),
        "tokenizer.ggml.tokens": ("array", tokens),
        "tokenizer.ggml.token_type": ("array", types),
        "tokenizer.ggml.merges": ("array", [" ".join(_pair(merge)) for merge in data["model"]["merges"]]),
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in names.items():
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            entries[f"tokenizer.ggml.{key}_token_id"] = "uint32", number
    ids = tokenizer("a")["input_ids"]
    entries["tokenizer.ggml.add_bos_token"] = "bool", bool(ids) and ids[0] == tokenizer.bos_token_id
    entries["tokenizer.ggml.add_eos_token"] = "bool", bool(ids) and ids[-1] == tokenizer.eos_token_id
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        entries["tokenizer.chat_template"] = "string", template
    return entries


def _json(tokenizer) -> dict[str, Any]:
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"a {type(tokenizer).__name__} has no tokenizer.json to read merges from; pass the fast tokenizer that "
            "AutoTokenizer loads"
        )
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _pattern(pre: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for what cuts text into words, `None` if it has none."""
    parts = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    words = []
    for part in parts:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                words.append("ByteLevel")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                words.append("bytes")
            case {"type": "Digits", "individual_digits": True}:
                words.append("Digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                words.append(regex)
            case _:
                return None
    return PATTERNS.get(tuple(words))


def _tokens(data: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = [(token, index, NORMAL) for token, index in data["model"]["vocab"].items()]
    for added in data["added_tokens"]:
        entries.append((added["content"], added["id"], CONTROL if added["special"] else USER_DEFINED))
    if len(tokens) <= (last := max(index for _, index, _ in entries)):
        raise ValueError(
            f"the tokenizer has a token {last}, and the model's embeddings only {vocab_size} rows; pass the tokenizer "
            "that belongs to the model"
        )
    for token, index, kind in entries:
        tokens[index], types[index] = token, kind
    return tokens, types


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _short(pre: dict[str, Any] | None) -> str:
    text = json.dumps(pre)
    return text if len(text) < 200 else f"{text[:200]}..."
