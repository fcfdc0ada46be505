"""Where a measurement was made: machine, versions, commit, and how fast the machine can be."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pynar import __version__, _backend

__all__ = [
    "CudaClock",
    "busy",
    "commit",
    "environment",
    "matmul_rate",
    "processor",
    "read_bandwidth",
]

_PACKAGES = ("torch", "numpy", "sentencepiece", "sacrebleu", "ctranslate2")


class CudaClock:
    """A clock for pytest-benchmark that reads the GPU's own time, in seconds."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._now = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            # Summed up from differences, since an event's own time is a float of milliseconds.
            self._now += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._now


def read_bandwidth(device: torch.device, bytes_moved: int) -> float:
    """Measures the rate, in bytes a second, at which this many bytes can be read here.

    On the CPU with torch's number of threads, data of that size and as warm as a repeated
    benchmark leaves it; on a GPU half the traffic of a device-to-device copy, cold.
    """
    count = max(1, bytes_moved // 4)
    data = torch.ones(count, device=device)
    if device.type == "cuda":
        other = torch.empty_like(data)
        return 8 * count / _median_seconds(lambda: other.copy_(data), device)
    extension = _backend.extension()
    read = data.sum if extension is None else lambda: extension.read_all(data)
    return 4 * count / _median_seconds(read, device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Measures floating-point operations a second of a square matrix product."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)


def _median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    clock = CudaClock() if device.type == "cuda" else time.perf_counter
    times: list[float] = []
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end or len(times) < 5:
        begin = clock()
        function()
        times.append(clock() - begin)
    return statistics.median(times)


def commit(*paths: str) -> str:
    """Names the commit of the source tree, "-dirty" if `paths` differ from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[2]
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        except OSError:
            return ""  # no git; an installed package has no commit either
        return done.stdout.strip()

    if not git("ls-files", "pynar/__init__.py"):
        return "unknown"  # installed, if perhaps somewhere inside another repository
    changed = git("status", "--porcelain", "--", *paths)
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux; platform knows less, but knows it everywhere
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a reader of a result needs to know of the machine and the software."""
    extension = _backend.extension()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["pynar", *sys.argv[1:]]),
        "commit": commit("pynar", "csrc"),
        "processor": processor(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "simd": extension.simd_level() if extension is not None else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {
            "pynar": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def busy(facts: dict[str, Any]) -> str | None:
    """What to warn of where other work ran while `environment` was asked; None if there was none.

    Threads that wait for each other by spinning lose far more than their share to it.
    """
    load, processors = facts["load_average"], facts["processors"]
    if load is None or load < 0.25 * processors:
        return None
    return (
        f"the machine was busy, with a load of {load:.1f} on {processors} processors; "
        "figures from it are not to be trusted"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
