"""Builds the C kernel of the ternary layers into the wheel if a C compiler is there; the rest is in pyproject.toml.

Without a compiler the wheel is pure Python and still complete: the kernel is built on the user's machine on first use,
or plain PyTorch answers.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _load_build_module():
    path = Path(__file__).parent / "kernels" / "torch-ext" / "slim_kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("slim_kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build_module()


class BuildWithKernel(build_py):
    def run(self) -> None:
        super().run()
        compiler = next(build.compilers(), None)
        if self.editable_mode or compiler is None:
            return
        target = Path(self.build_lib) / "optimum_slim" / "_kernels" / build.library_name()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(compiler, target)
        except build.CompilerMissing as error:
            self.announce(f"the wheel goes without the C kernel: {error}", level=3)


class PlatformWheel(bdist_wheel):
    """The library uses neither Python's ABI nor torch's: one wheel per platform serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class KernelDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return next(build.compilers(), None) is not None


setup(distclass=KernelDistribution, cmdclass={"build_py": BuildWithKernel, "bdist_wheel": PlatformWheel})
