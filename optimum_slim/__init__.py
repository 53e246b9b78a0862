"""Make language models small and fast without leaving Hugging Face.

Importing this package registers `quant_method: slim` with Transformers, so that

    AutoModelForCausalLM.from_pretrained(name, quantization_config=SlimConfig("pt2llm"))

slims a model while loading it, and a saved slim model loads with a plain `from_pretrained`.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


__version__ = "0.1.0"

_TRANSFORMERS_RANGE = ((5, 4), (6, 0))


def _check_transformers() -> None:
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found = None
    low, high = _TRANSFORMERS_RANGE
    if found is None or not low <= tuple(int(part) for part in found.split(".")[:2]) < high:
        raise ImportError(
            f"optimum-slim {__version__} needs transformers>=5.4,<6 but found {found or 'none'}. "
            'Install a supported version with: pip install "transformers>=5.4,<6"'
        )


def _find_kernels() -> None:
    """Make `optimum_slim._kernels` importable from a bare checkout, where no installer has mapped it."""
    name = f"{__name__}._kernels"
    if importlib.util.find_spec(name) is not None:
        return
    folder = Path(__file__).resolve().parent.parent / "kernels" / "torch-ext" / "slim_kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_check_transformers()
_find_kernels()

from .adapters import merge_and_repack, prepare_for_training  # noqa: E402
from .binary import BinaryLinear  # noqa: E402
from .calibration import Calibration  # noqa: E402
from .config import SlimConfig  # noqa: E402
from .evaluate import evaluate, perplexity  # noqa: E402
from .gguf_export import GgufFile, export_gguf  # noqa: E402
from .gguf_loading import load_gguf  # noqa: E402
from .layerskip_loss import LayerSkipLoss  # noqa: E402
from .lens import Lens, lens  # noqa: E402
from .methods import (  # noqa: E402
    ARBLLM,
    PT2LLM,
    TQ,
    BiLLM,
    BitNet,
    BitNetTraining,
    Depth,
    Heal,
    LayerSkip,
    Magnitude,
    Minitron,
    OneBit,
    SparseGPT,
    Wanda,
)
from .packed import PackedLinear, TernaryLinear  # noqa: E402
from .pairing import make_draft  # noqa: E402
from .quantizer import SlimQuantizer  # noqa: E402
from .recipe import slim  # noqa: E402
from .report import Report  # noqa: E402
from .saving import push_to_hub, save  # noqa: E402
from .sign import SignLinear  # noqa: E402
from .sparse import SparseLinear  # noqa: E402
from .speculation import SelfSpeculation  # noqa: E402
from .step import LinearStep, Step, StepReport, register  # noqa: E402
from .tuning import SpeculationTuning, tune_speculation  # noqa: E402


__all__ = [
    "ARBLLM",
    "PT2LLM",
    "TQ",
    "BiLLM",
    "BinaryLinear",
    "BitNet",
    "BitNetTraining",
    "Calibration",
    "Depth",
    "GgufFile",
    "Heal",
    "LayerSkip",
    "LayerSkipCallback",
    "LayerSkipLoss",
    "Lens",
    "LinearStep",
    "Magnitude",
    "Minitron",
    "OneBit",
    "PackedLinear",
    "Report",
    "SelfSpeculation",
    "SignLinear",
    "SlimConfig",
    "SlimQuantizer",
    "SparseGPT",
    "SparseLinear",
    "SpeculationTuning",
    "Step",
    "StepReport",
    "TernaryLinear",
    "Wanda",
    "evaluate",
    "export_gguf",
    "lens",
    "load_gguf",
    "make_draft",
    "merge_and_repack",
    "perplexity",
    "prepare_for_training",
    "push_to_hub",
    "register",
    "save",
    "slim",
    "tune_speculation",
]


def __getattr__(name: str):
    if name == "LayerSkipCallback":  # on first use, because Transformers' Trainer brings PEFT and bitsandbytes along
        from .layerskip_callback import LayerSkipCallback

        return LayerSkipCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
