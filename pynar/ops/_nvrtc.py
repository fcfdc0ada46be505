"""Compiles and launches the CUDA kernels at first use, through CuPy, where no nvcc was found."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from pynar import _backend

__all__ = ["launch", "options", "why_not"]


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


@functools.cache
def _function(source: str, kernel: str, device: int) -> Any:
    import cupy

    del device  # a compiled function belongs to the device that was current
    module = cupy.RawModule(
        code=f'#include "{source}"\n', options=options(), name_expressions=(kernel,)
    )
    return module.get_function(kernel)


def launch(plan: Any) -> None:
    """Launches the kernels of a `pynar._C.LaunchPlan` on its stream, without waiting for them."""
    import cupy
    import numpy

    parameters = numpy.frombuffer(plan.parameters, dtype=numpy.int64)
    with cupy.cuda.Device(plan.device), cupy.cuda.ExternalStream(plan.stream):
        for kernel, blocks, threads in plan.kernels:
            _function(plan.source, kernel, plan.device)((blocks,), (threads,), (parameters,))
