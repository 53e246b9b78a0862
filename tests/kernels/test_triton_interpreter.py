"""Run the files triton_numerics.py, sparse_... and binary_... in Triton's interpreter, in processes of their own.

The interpreter must be switched on before Triton is imported and cannot be switched off again, so these cases cannot
share a process with the compile tests.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


FILES = {"triton_numerics.py": 100, "sparse_triton_numerics.py": 100, "binary_triton_numerics.py": 40}
"""With the least number of cases that must run."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux only"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.parametrize("name", FILES)
def test_kernels_match_the_reference(name, record_property):
    file = Path(__file__).with_name(name)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[2], timeout=600)
    cases = [line for line in done.stdout.splitlines() if line.startswith(("PASSED ", "FAILED ", "ERROR "))]
    failed = [line for line in cases if not line.startswith("PASSED ")]
    record_property("cases", len(cases))
    print(*cases, sep="\n")
    assert done.returncode == 0 and not failed, f"{done.stdout}\n{done.stderr}"
    assert len(cases) > FILES[name], f"only {len(cases)} cases ran:\n{done.stdout}"
