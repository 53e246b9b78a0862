"""Load a model dense, also from a GGUF file, so that it can be slimmed or measured."""

from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_model(name: str | Path, *, gguf_file: str | None = None, dtype="auto", trust_remote_code: bool = False):
    """A causal language model as it is stored, dense or slimmed; the weights of a GGUF file are made dense.

    Args:
        name: Hub id or local folder.
        gguf_file: name of a GGUF file there; needs `pip install optimum-slim[gguf]`.
        dtype: `"auto"` or a dtype; GGUF files load in fp32 under `"auto"`.
        trust_remote_code: run model code that comes with the checkpoint.

    Returns:
        The model. One read from a GGUF file no longer counts as quantized, so it can be slimmed and saved.
    """
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file and hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights packed unless told
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    trust = trust_remote_code or None
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust, **extra)
    if gguf_file:
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        for attribute in ("quantization_config", "_is_quantized"):
            model.config.__dict__.pop(attribute, None)
    return model


def load_tokenizer(name: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False):
    """The tokenizer stored with a model, `None` for a local folder that holds none."""
    folder = Path(name)
    if folder.is_dir() and not gguf_file and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code or None, **extra)
