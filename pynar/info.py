"""What this installation is made of, and what runs where: `pynar info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from pynar import _backend

__all__ = ["Report", "collect", "main"]

_PACKAGES = (
    *("torch", "numpy", "sentencepiece", "pyarrow", "lightning-fabric"),
    *("cupy-cuda13x", "ctranslate2"),
)


@dataclass(frozen=True)
class Report:
    """Facts by name, in sections, in the order in which they are printed."""

    versions: dict[str, str]
    extension: dict[str, str]
    devices: dict[str, str]
    # operator -> device -> which implementation serves it, and why none of the faster ones
    operators: dict[str, dict[str, str]]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _extension() -> dict[str, str]:
    module = _backend.extension()
    if module is None:
        return {"in use": f"no: {_backend.why_not_extension()}"}
    build = module.build_info()
    shared = _backend.shares_openmp_with_torch()
    openmp = "none" if build["openmp"] is None else str(build["openmp"])
    if build["openmp"] is not None and shared is not None:
        openmp += ", torch's runtime" if shared else ", with a runtime apart from torch's"
    cuda = "not compiled (no nvcc, or PYNAR_CUDA=off)"
    if build["cuda"] is not None:
        version = f"{build['cuda'] // 1000}.{build['cuda'] % 1000 // 10}"
        cuda = f"{version}, architectures {build['cuda_architectures']}"
    return {
        "in use": "yes",
        "file": str(module.__file__),
        "built from": build["version"],
        "compiler": build["compiler"],
        "SIMD compiled": build["simd_compiled"],
        "SIMD in use": module.simd_level(),
        "threads": str(module.num_threads()),
        "OpenMP": openmp,
        "DLPack": ".".join(map(str, build["dlpack"])),
        "CUDA": cuda,
    }


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{_processor()}, {os.cpu_count()} processors"}
    if torch.version.cuda is None:
        devices["cuda"] = f"none: torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        devices["cuda"] = "none: torch finds no device or driver"
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            capability = f"{properties.major}.{properties.minor}"
            devices[f"cuda:{index}"] = f"{properties.name}, {capability}, {memory:.0f} GiB"
    return devices


def _operators() -> dict[str, dict[str, str]]:
    # Importing the operators registers them.
    import pynar.ops  # noqa: F401
    from pynar.ops._operator import OPERATORS

    table: dict[str, dict[str, str]] = {}
    for name in sorted(OPERATORS):
        table[name] = {}
        for device in ("cpu", "cuda"):
            chosen = OPERATORS[name].implementation(device)
            text = chosen.name + (f": {chosen.reason}" if chosen.reason else "")
            table[name][device] = text
    return table


def collect() -> Report:
    """Returns the facts that `main()` prints."""
    versions = {"pynar": _version("pynar"), "python": platform.python_version()}
    versions |= {package: _version(package) for package in _PACKAGES}
    versions["platform"] = platform.platform()
    return Report(versions, _extension(), _devices(), _operators())


def _print_section(title: str, facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    print(title)
    for name, value in facts.items():
        print(f"  {name:<{width}}  {value}")


def main() -> None:
    """Prints versions, build flags, devices, and which implementation runs where, and why."""
    report = collect()
    _print_section("versions", report.versions)
    _print_section("extension", report.extension)
    _print_section("devices", report.devices)
    print("operators")
    for name, devices in report.operators.items():
        _print_section(f"  {name}", {f"  {device}": text for device, text in devices.items()})
