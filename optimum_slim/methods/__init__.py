"""One file per method; importing a file registers its step."""

from .arbllm import ARBLLM
from .billm import BiLLM
from .bitnet import BitNet
from .bitnet_training import BitNetTraining
from .depth import Depth
from .heal import Heal
from .layerskip import LayerSkip
from .magnitude import Magnitude
from .minitron import Minitron
from .onebit import OneBit
from .pt2llm import PT2LLM
from .sparsegpt import SparseGPT
from .tq import TQ
from .wanda import Wanda


__all__ = [
    "ARBLLM",
    "PT2LLM",
    "TQ",
    "BiLLM",
    "BitNet",
    "BitNetTraining",
    "Depth",
    "Heal",
    "LayerSkip",
    "Magnitude",
    "Minitron",
    "OneBit",
    "SparseGPT",
    "Wanda",
]
