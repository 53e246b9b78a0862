import os
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPTIMUM_SLIM_CACHE", tempfile.mkdtemp(prefix="optimum_slim_tests_"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from helpers import tiny_llama
from transformers.utils import logging


logging.disable_progress_bar()


@pytest.fixture
def dense_folder(tmp_path):
    """A saved dense tiny Llama."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def eager_bitnet():
    """Transformers compiles its BitLinear; run it eagerly, which gives the same values in a fraction of the time."""
    with torch.compiler.set_stance("force_eager"):
        yield
