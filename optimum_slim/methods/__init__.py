"""One file per method; importing a file registers its step."""

from .bitnet import BitNet
from .depth import Depth
from .heal import Heal
from .pt2llm import PT2LLM


__all__ = ["PT2LLM", "BitNet", "Depth", "Heal"]
