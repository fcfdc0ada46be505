"""The extension `pynar._C`: loading it, or saying why it is not in use."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["device_sources", "extension", "why_not_extension"]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    if _switch("PYNAR_DISABLE_EXT"):
        return None, "PYNAR_DISABLE_EXT=1"
    # The extension shares torch's OpenMP runtime only if torch brings its own in first.
    import torch  # noqa: F401

    try:
        module = importlib.import_module("pynar._C")
    except ImportError as error:
        folder = Path(__file__).parent
        if not any(folder.glob("_C.*")):
            return None, f"the extension is not built in {folder}: run `pip install .`"
        return None, f"the extension does not load: {error}"
    level = os.environ.get("PYNAR_SIMD")
    if level:
        module.set_simd_level(level)
    module.set_use_nvrtc(prefers_nvrtc())
    return module, ""


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def prefers_nvrtc() -> bool:
    """Returns whether to take the route of a machine without nvcc where kernels are compiled."""
    return _switch("PYNAR_NVRTC")


def extension() -> ModuleType | None:
    """Returns `pynar._C`, or None where `why_not_extension()` gives a reason."""
    return _load()[0]


def why_not_extension() -> str:
    """Returns why the extension is not in use; the empty string if it is."""
    return _load()[1]


def device_sources() -> Path | None:
    """Returns the folder of the CUDA sources: in the package, or beside it in a source tree."""
    package = Path(__file__).parent
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / "common" / "device.cuh").is_file():
            return folder
    return None


def shares_openmp_with_torch() -> bool | None:
    """Returns whether the process has a single OpenMP runtime; None where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        names = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    return len(names) <= 1
