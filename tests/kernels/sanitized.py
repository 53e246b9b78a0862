"""A C kernel under the sanitizers for addresses, shifts and overflows, on random bytes."""

import subprocess
from pathlib import Path

import pytest

from optimum_slim._kernels import build


HEAD = r"""
#include <stdio.h>
#include "%s"

static unsigned next(void) {
    static unsigned state = 1;
    return (state = state * 1664525u + 1013904223u) >> 8;
}

static void *filled(size_t bytes) {
    uint8_t *memory = malloc(bytes ? bytes : 1);
    for (size_t i = 0; i < bytes; i++) memory[i] = (uint8_t)next();
    return memory;
}
"""
FLAGS = ("-O1", "-g", "-std=c11", "-fsanitize=address,shift,signed-integer-overflow", "-fno-sanitize-recover=all")


def run_sanitized(folder: Path, kernel: str, main: str, *flags: str) -> None:
    """Compile `main`, which may use `next()`, `filled(bytes)` and all of the file `kernel`; it must print "done"."""
    compiler = next(build.compilers(), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    program, source = folder / "sanitized", folder / "main.c"
    source.write_text(HEAD % kernel + main)
    command = [compiler, *FLAGS, *flags, "-I", str(build.FOLDER), "-o", str(program), str(source), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("done")
