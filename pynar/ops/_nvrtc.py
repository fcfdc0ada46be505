"""Compiles and launches the CUDA kernels at first use, through CuPy, where no nvcc was found."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from typing import Any

from pynar import _backend

__all__ = ["launch", "options", "program", "why_not"]


@functools.lru_cache(maxsize=1)
def why_not() -> str:
    """Returns why this route is closed, and what to do about it; empty if it is open."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: run `pip install 'pynar[cupy]'`"
    if _backend.device_sources() is None:
        return "the CUDA sources are missing from this installation"
    return ""


def options() -> tuple[str, ...]:
    """Returns the compiler options that every source needs."""
    return ("-std=c++20", f"-I{_backend.device_sources()}")


@functools.lru_cache(maxsize=1)
def _digest() -> str:
    folder = _backend.device_sources()
    assert folder is not None
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("**/*.cuh"), *folder.glob("**/*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def program(source: str) -> str:
    """Returns the text that is compiled for a file below csrc/."""
    # CuPy keeps binaries by the text that it is given, without what that includes.
    return f'// {_digest()}\n#include "{source}"\n'


@functools.cache
def _function(source: str, kernel: str, device: int) -> Any:
    import cupy

    del device  # a compiled function belongs to the device that was current
    module = cupy.RawModule(
        code=program(source), options=options(), name_expressions=(kernel,), backend="nvrtc"
    )
    return module.get_function(kernel)


class _Stream:
    """A stream of the caller's, in the form in which CuPy takes over another library's."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.pointer)


def launch(plan: Any) -> None:
    """Launches the kernels of a `pynar._C.LaunchPlan` on its stream, without waiting for them."""
    import cupy
    import numpy

    # CuPy passes an array of the host by value, as it passes a struct.
    parameters = numpy.frombuffer(plan.parameters, dtype=numpy.int64)
    with cupy.cuda.Device(plan.device), cupy.cuda.Stream.from_external(_Stream(plan.stream)):
        for kernel, blocks, threads in plan.kernels:
            _function(plan.source, kernel, plan.device)((blocks,), (threads,), (parameters,))
