"""One file per method; importing a file registers its step."""

from .bitnet import BitNet
from .depth import Depth
from .heal import Heal
from .magnitude import Magnitude
from .pt2llm import PT2LLM
from .sparsegpt import SparseGPT
from .wanda import Wanda


__all__ = ["PT2LLM", "BitNet", "Depth", "Heal", "Magnitude", "SparseGPT", "Wanda"]
