"""Build the C files here into one shared library. Standard library only: setup.py uses this before torch is there."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=off")


class CompilerMissing(RuntimeError):
    """No C compiler, or none that builds the kernels."""


def sources() -> list[Path]:
    """The C files that make up the library; headers are found by the compiler."""
    return sorted(FOLDER.glob("*.c"))


def library_name(*build: str) -> str:
    """File name of the library: a digest of the sources and of what built it: a stale one is never loaded."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (*sources(), *sorted(FOLDER.glob("*.h")))))
    for part in build:
        digest.update(b"\0" + part.encode())
    return f"slim_kernels-{digest.hexdigest()[:16]}.so"


def compilers() -> Iterator[str]:
    """Paths of the C compilers of this machine: $CC, cc, gcc, clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            yield path


def compile_library(compiler: str, target: Path) -> None:
    """Build `target` with OpenMP, or without if the compiler has none; it appears complete or not at all.

    Raises:
        CompilerMissing: the compiler cannot build the sources; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for openmp in (("-fopenmp",), ()):
            command = [compiler, *FLAGS, *openmp, "-o", str(built), *map(str, sources()), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                built.replace(target)
                return
    raise CompilerMissing(f"{compiler} cannot build the C kernels: {result.stderr.strip()[-300:]}")


def cache_folder() -> Path:
    """$OPTIMUM_SLIM_CACHE, or optimum_slim in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("OPTIMUM_SLIM_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimum_slim")


def find_or_build_library() -> Path:
    """The library that came with the wheel, or the one in the cache, built now if it is not there yet.

    Raises:
        CompilerMissing: there is no compiler, or none builds it.
        OSError: the cache folder cannot be written.
    """
    bundled = FOLDER / library_name()
    if bundled.exists():
        return bundled
    problem: Exception = CompilerMissing("no C compiler found (looked for $CC, cc, gcc, clang)")
    for compiler in compilers():
        stat = os.stat(compiler)
        identity = f"{os.path.realpath(compiler)} {stat.st_size} {stat.st_mtime_ns}"
        target = cache_folder() / library_name(identity, platform.machine(), *FLAGS)
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_library(compiler, target)
        except CompilerMissing as error:
            problem = error
        else:
            return target
    raise problem
