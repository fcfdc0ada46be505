"""Builds the extension `pynar._C` with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CUDA_CHOICES = ("auto", "on", "off")


def find_nvcc() -> str | None:
    """Looks for the CUDA compiler: a build machine has a toolkit, not necessarily a device."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in filter(None, homes):
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if nvcc:
            return nvcc
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_options() -> list[str]:
    """Turns PYNAR_CUDA and PYNAR_CUDA_ARCHITECTURES into CMake definitions."""
    choice = os.environ.get("PYNAR_CUDA", "auto")
    if choice not in CUDA_CHOICES:
        sys.exit(f"PYNAR_CUDA must be one of {', '.join(CUDA_CHOICES)}, got {choice!r}")
    nvcc = None if choice == "off" else find_nvcc()
    if choice == "on" and nvcc is None:
        sys.exit(
            "PYNAR_CUDA=on, but nvcc was not found: set CUDACXX to it or CUDA_HOME to its toolkit, "
            "put it on PATH, or set PYNAR_CUDA=off"
        )
    if nvcc is None:
        return ["-DPYNAR_CUDA=OFF"]
    options = ["-DPYNAR_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    architectures = os.environ.get("PYNAR_CUDA_ARCHITECTURES")
    if architectures:
        options.append(f"-DPYNAR_CUDA_ARCHITECTURES={architectures}")
    return options


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Always a fresh folder: under build isolation cmake, ninja and pybind11 lie in a temporary
        # environment, and a cache that remembers their paths breaks the next build.
        with tempfile.TemporaryDirectory(prefix="pynar-build-") as build:
            configure = [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                build,
                "-G",
                "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPYNAR_VERSION={self.distribution.get_version()}",
                *cuda_options(),
            ]
            make = ["cmake", "--build", build]
            if self.parallel:
                make += ["--parallel", str(self.parallel)]
            subprocess.run(configure, check=True)
            subprocess.run(make, check=True)
            shutil.copyfile(Path(build) / "_C.so", target)


class BuildPython(build_py):
    """Adds the device code, which is compiled at first use where no nvcc was found."""

    def _device_sources(self) -> dict[str, str]:
        out = Path(self.build_lib) / "pynar" / "_csrc"
        files = [*ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/**/*.h")]
        return {str(out / file.relative_to(ROOT / "csrc")): str(file) for file in sorted(files)}

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for target, source in self._device_sources().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self._device_sources()]


setup(
    ext_modules=[Extension("pynar._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
