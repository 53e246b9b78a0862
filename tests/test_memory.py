import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tinyllama.py"


@pytest.mark.slow
def test_packing_while_loading_never_holds_a_dense_copy(tmp_path):
    """Peak anonymous memory of the load, in a process of its own, against the packed size and one tensor's work."""
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 256}
    model = tiny_llama(**size).to(torch.bfloat16)
    dense_bytes = 2 * model.num_parameters()
    largest = 4 * model.model.layers[0].mlp.up_proj.weight.numel()
    model.save_pretrained(tmp_path / "dense", max_shard_size="50MB")
    del model

    command = [sys.executable, SCRIPT, "--pack-only", tmp_path / "dense", tmp_path / "slim"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    load = json.loads(done.stdout.splitlines()[-1])

    room = 8 * largest  # packing holds 2.3 fp32 weights at once; malloc keeps freed blocks until the next trim
    assert dense_bytes > 2 * (load["packed"] + room), "the test would not notice a dense copy"
    assert load["packed"] < load["peak"] < load["packed"] + load["embeddings"] + room
