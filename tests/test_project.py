"""The project files: what a wheel holds, what an import needs, what the supported range does."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "torch-ext" / "slim_kernels"

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


def test_packages_lists_every_package_folder(project):
    folders = {file.parent for file in (ROOT / "optimum_slim").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    packages |= {"optimum_slim._kernels", "optimum.commands.register"}
    packages |= {
        ".".join(("optimum_slim", "_kernels", *file.parent.relative_to(KERNELS).parts))
        for file in KERNELS.rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = run("-c", "import kernels; print(getattr(kernels, '__file__', None))", cwd=ROOT)
    assert not done.stdout.strip().startswith(str(ROOT / "kernels"))


def test_nothing_of_ours_lies_in_a_namespace_that_is_not_ours():
    assert [file.name for file in (ROOT / "optimum_slim" / "_optimum_register").glob("*.py")] == ["register_slim.py"]


def test_version_is_stated_once(project):
    import optimum_slim

    assert project["project"]["version"] == optimum_slim.__version__
    assert f"## {optimum_slim.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_torch_is_pinned_first():
    for name in ("requirements-dev.txt", "requirements-oldest.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line and not line.startswith("#")]
        assert re.fullmatch(r"torch==[\d.]+", wanted[0])
        assert all("==" in line for line in wanted)


def test_the_oldest_environment_has_the_lowest_supported_transformers(project):
    low = next(re.search(r">=([\d.]+)", name)[1] for name in project["project"]["dependencies"] if "transf" in name)
    assert f"transformers=={low}.0" in (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("version", ["5.3.9", "4.57.1", "6.0.0"])
def test_transformers_out_of_range_is_refused(version):
    code = (
        "import importlib.metadata as m; real = m.version;"
        f"m.version = lambda name: {version!r} if name == 'transformers' else real(name);"
        "import optimum_slim"
    )
    done = run("-c", code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"needs transformers>=5.4,<6 but found {version}" in last and "pip install" in last


def test_importing_does_not_import_what_is_optional():
    heavy = "{'peft', 'bitsandbytes', 'matplotlib', 'optimum', 'datasets', 'lm_eval', 'optimum_slim._kernels.triton'}"
    code = f"import sys, optimum_slim; print(sorted({heavy} & set(sys.modules)))"
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_recipes_in_examples_load():
    from optimum_slim import SlimConfig

    names = {path.name: [step.name for step in SlimConfig.from_yaml(path).steps] for path in RECIPES}
    assert names == {
        "bitnet.yaml": ["bitnet"],
        "chain.yaml": ["minitron", "heal", "minitron", "heal"],
        "shallow.yaml": ["depth", "heal"],
        "sparse.yaml": ["sparsegpt"],
        "ternary.yaml": ["pt2llm"],
    }


RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


def test_every_link_in_the_documents_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_step_is_documented():
    from optimum_slim.step import STEPS

    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, step in STEPS.items():
        if step.__module__.startswith("optimum_slim."):
            assert f"`{name}`" in methods and f"`{step.__name__}`" in readme


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("needs git to tell sources from leftovers")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    done = run(*words, cwd=source)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "optimum/commands/register/register_slim.py" in names
    assert not {"optimum/__init__.py", "optimum/commands/__init__.py", "optimum/commands/register/__init__.py"} & names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "examples/", "benchmarks/"))]
    for file in KERNELS.rglob("*"):
        if file.suffix in (".py", ".c", ".json"):
            assert f"optimum_slim/_kernels/{file.relative_to(KERNELS).as_posix()}" in names
    for file in (ROOT / "optimum_slim").rglob("*.py"):
        if "_optimum_register" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names
    assert "optimum_slim/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    done = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    assert done.returncode == 0, done.stderr[-3000:]
    code = (
        "import torch, optimum_slim, optimum_slim._kernels as k; from torch import nn;"
        "from optimum_slim import BitNet; print(optimum_slim.__file__, k.__file__);"
        "step = BitNet(force=True); linear = nn.Linear(8, 12); packed = step.empty(linear);"
        "packed.load_packed(step.compress(linear.weight.detach())); print(tuple(packed(torch.ones(2, 8)).shape))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHONPATH": str(site)
    }
    done = run("-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    paths, shape = done.stdout.strip().splitlines()
    assert all(path.startswith(str(site)) for path in paths.split())
    assert shape == "(2, 12)"
