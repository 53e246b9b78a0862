"""Calibration tokens sampled from the model itself.

Text the model writes follows the distribution it was trained on, which no public text is guaranteed to do. As in
LLM-QAT (https://arxiv.org/abs/2305.17888), every sample starts with a random ordinary token (behind the
beginning-of-text token, if the model has one), goes on with the most likely token for a few steps so that it gets onto
firm ground, and is then sampled from the model's full distribution. Special tokens are never drawn.

The samples of a model do not change, so they are written to the cache directory, under a fingerprint of the model's
config and weights and of the settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_slim.journal import digest


logger = logging.getLogger(__name__)

LIKELIEST = 3  # tokens after the first that are not sampled but the most likely ones
BATCH = 32


def cache_dir() -> Path:
    """Where optimum-slim keeps what it can recompute: $OPTIMUM_SLIM_CACHE, or optimum_slim in the user's cache."""
    if own := os.environ.get("OPTIMUM_SLIM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "optimum_slim"


def cached_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Sample token ids from the model, or read them from the cache: int64 (samples, length) on the CPU.

    Args:
        model: A causal language model.
        tokenizer: Tells which further ids are special or stand for no text.
        samples: Number of sequences.
        length: Tokens in each.
        seed: Seed of a generator of its own; the global random state is not touched.
        temperature: Divides the logits.
    """
    settings = {"samples": samples, "length": length, "seed": seed, "temperature": temperature}
    start, banned = _special_tokens(model, tokenizer)
    key = json.dumps([fingerprint(model), settings, start, banned])
    path = cache_dir() / "calibration" / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
    tokens = _read(path, (samples, length), model.get_input_embeddings().weight.shape[0])
    if tokens is None:
        tokens = _sample(model, start, banned, **settings)
        _write(path, tokens)
    return tokens


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    start: list[int],
    banned: list[int],
    *,
    samples: int,
    length: int,
    seed: int,
    temperature: float,
) -> Tensor:
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    allowed = torch.ones(vocabulary, device=device)
    allowed[banned] = 0
    training = [module for module in model.modules() if module.training]
    model.eval()
    done = []
    try:
        with tqdm(total=samples * length, desc="sampling calibration tokens", unit="tok", disable=None) as progress:
            for first in range(0, samples, BATCH):
                count = min(BATCH, samples - first)
                drawn = torch.multinomial(allowed, count, replacement=True, generator=generator)[:, None]
                tokens = torch.cat([torch.tensor(start, device=device).expand(count, -1), drawn], dim=1)[:, :length]
                sequence, cache = [tokens.to(torch.int64)], None
                progress.update(tokens.numel())
                for step in range(length - tokens.shape[1]):
                    output = model(input_ids=sequence[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache = output.past_key_values
                    logits = output.logits[:, -1].float()[:, :vocabulary].masked_fill(allowed == 0, -torch.inf)
                    if step < LIKELIEST:
                        chosen = logits.argmax(-1, keepdim=True)
                    else:
                        chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                    sequence.append(chosen)
                    progress.update(count)
                done.append(torch.cat(sequence, dim=1).cpu())
    finally:
        for module in training:
            module.training = True
    return torch.cat(done)


def _special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[int], list[int]]:
    """The ids a sample starts with, and the ids it must not contain otherwise."""
    config = model.config.get_text_config(decoder=True)
    banned: set[int] = set()
    for settings in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            banned.update(value if isinstance(value, list) else [] if value is None else [value])
    size = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None:
        banned.update(tokenizer.all_special_ids)
        banned.update(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        banned.update(range(len(tokenizer), size))
    banned = {token for token in banned if 0 <= token < size}
    bos = config.bos_token_id
    return ([bos] if isinstance(bos, int) and 0 <= bos < size else []), sorted(banned) if len(banned) < size else []


def fingerprint(model: PreTrainedModel) -> str:
    """A checksum of the config, and of the name, shape, dtype and some values of every weight."""
    config: dict[str, Any] = model.config.to_dict()
    for volatile in ("_name_or_path", "name_or_path", "transformers_version", "quantization_config"):
        config.pop(volatile, None)
    start = json.dumps(config, sort_keys=True, default=str).encode()
    return digest(model.state_dict().items(), start=start)


def _read(path: Path, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """The tokens of a cache file, or None if there is none or it is not what it should be."""
    if not path.is_file():
        return None
    try:
        tokens = load_file(path)["tokens"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("Sampling again: the cached calibration tokens in %s cannot be read (%s).", path, error)
        return None
    if tuple(tokens.shape) != shape or tokens.dtype != torch.int64 or tokens.min() < 0 or tokens.max() >= vocabulary:
        logger.warning("Sampling again: %s does not hold the expected calibration tokens %s.", path, shape)
        return None
    return tokens


def _write(path: Path, tokens: Tensor) -> None:
    """Write the tokens under a temporary name, then rename; a cache that cannot be written is only reported."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
        save_file({"tokens": tokens.contiguous()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning("The calibration tokens are not cached: %s cannot be written (%s).", path, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
