"""The folder kernels/ is a valid Hub kernel project and never hides Hugging Face's library `kernels`."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "kernels"


def hub_kernels_version() -> str | None:
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


needs_hub_kernels = pytest.mark.skipif(hub_kernels_version() is None, reason="the package kernels is not installed")


def test_no_init_beside_the_project_file():
    assert (PROJECT / "build.toml").is_file()
    assert not (PROJECT / "__init__.py").exists()


@needs_hub_kernels
def test_kernels_from_the_repository_root_is_the_installed_library():
    command = [sys.executable, "-c", "import kernels; print(kernels.__file__)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "kernels")
    assert Path(done.stdout.strip()).parent.name == "kernels"


@needs_hub_kernels
def test_build_file_is_valid():
    rust = pytest.importorskip("kernels._rust", exc_type=ImportError)
    build = rust.Build.open(PROJECT)
    assert build is not None


@needs_hub_kernels
def test_a_broken_build_file_is_refused(tmp_path):
    rust = pytest.importorskip("kernels._rust", exc_type=ImportError)
    text = (PROJECT / "build.toml").read_text()
    (tmp_path / "build.toml").write_text(text.replace('name = "slim-kernels"', 'name = "slim_kernels"'))
    with pytest.raises(Exception, match="slim_kernels"):
        rust.Build.open(tmp_path)


@pytest.mark.parametrize("path", sorted((PROJECT / "torch-ext" / "slim_kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernel_sources_import_only_what_the_hub_allows(path):
    allowed = {*sys.stdlib_module_names, "torch"} | ({"triton"} if "triton" in path.name else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed
