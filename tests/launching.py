"""Starting processes, one by itself or two that work together, as `accelerate launch` and torchrun do."""

import os
import socket
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


def start(script: str, *words, **environment: str) -> subprocess.Popen:
    """A process that runs a script of this folder on one thread."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)} | environment
    words = [sys.executable, str(TESTS / script), *map(str, words)]
    return subprocess.Popen(words, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def run_in_two(script: str, *words, timeout: float = 900) -> None:
    """Run a script in two processes that know of each other; raises an `AssertionError` with what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(script, *words, **common, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
