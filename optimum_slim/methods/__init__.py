"""One file per method; importing a file registers its step."""

from .bitnet import BitNet
from .pt2llm import PT2LLM


__all__ = ["PT2LLM", "BitNet"]
