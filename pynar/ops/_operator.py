"""Registration of an operator with PyTorch, and which implementation serves it where."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pynar import _backend
from pynar.ops import _nvrtc

__all__ = ["OPERATORS", "Implementation", "Operator"]

_LIBRARY = torch.library.Library("pynar", "FRAGMENT")

OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Implementation:
    """What serves an operator on one kind of device."""

    name: str  # "extension", "nvrtc", "reference" or "none"
    reason: str = ""  # why it is none of the faster ones, or none at all


@functools.cache
def implementation(device_type: str) -> Implementation:
    """Chooses for all operators that a device has: they come with all implementations."""
    module = _backend.extension()
    if module is None:
        return Implementation("reference", _backend.why_not_extension())
    if device_type == "cpu":
        return Implementation("extension")
    if device_type == "cuda":
        reason = "the extension was built without nvcc"
        if module.build_info()["cuda"] is not None:
            if not _backend.prefers_nvrtc():
                return Implementation("extension")
            reason = "PYNAR_NVRTC=1"
        why_not = _nvrtc.why_not()
        if not why_not:
            return Implementation("nvrtc", reason)
        return Implementation("reference", f"{reason}, and {why_not}")
    return Implementation("reference", f"there is no kernel for {device_type}")


class Operator:
    """A `torch.library` operator `pynar::name`.

    `native` is called with the extension and the operator's arguments, `reference` with the
    arguments alone; `fake` gives shapes, dtypes and layout to FakeTensor and the compiler.
    `cpu_only` is the reason why there is nothing for other devices, whose tensors `reference` then
    rejects.
    """

    def __init__(
        self,
        schema: str,
        *,
        native: Callable[..., Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        cpu_only: str = "",
    ) -> None:
        self.name = schema.partition("(")[0]
        self.native = native
        self.reference = reference
        self.cpu_only = cpu_only
        self._direct = {device: self._kernel(device) for device in ("cpu", "cuda")}
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._direct["cpu"], "CPU")
        _LIBRARY.impl(self.name, self._direct["cuda"], "CUDA")
        torch.library.register_fake(f"pynar::{self.name}", fake, lib=_LIBRARY)
        self.call = getattr(torch.ops.pynar, self.name).default
        OPERATORS[self.name] = self

    def __call__(self, first: torch.Tensor, *rest: Any) -> Any:
        """Calls the operator; under `torch.inference_mode()` past the dispatcher.

        That saves some 3 microseconds, a fifth of the time of a step at batch 1. Compilers, and
        modes that put other tensors in the place of ours, see the operator as ever.
        """
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self.call(first, *rest)
        return self.direct(first)(first, *rest)

    def direct(self, first: torch.Tensor) -> Callable[..., Any]:
        """What serves tensors like the `first` argument, where nothing has to be recorded.

        The dispatcher itself for other kinds of tensors, and for other devices.
        """
        if type(first) is torch.Tensor:
            # `device.type` takes as long as all of this.
            if first.is_cpu:
                return self._direct["cpu"]
            if first.is_cuda:
                return self._direct["cuda"]
        return self.call

    def implementation(self, device_type: str) -> Implementation:
        """Returns what serves this operator there."""
        if self.cpu_only and device_type != "cpu":
            return Implementation("none", self.cpu_only)
        return implementation(device_type)

    def _kernel(self, device_type: str) -> Callable[..., Any]:
        """Returns the function for a dispatch key; it is the chosen implementation itself."""
        chosen = self.implementation(device_type)
        if chosen.name in ("extension", "nvrtc"):
            return functools.partial(self.native, _backend.extension())
        if chosen.name == "none" or "PYNAR_DISABLE_EXT" in chosen.reason:
            return self.reference

        def loud_reference(*args: Any) -> Any:
            _warn_once(device_type, chosen.reason)
            return self.reference(*args)

        return loud_reference


@functools.cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"pynar operators run as PyTorch references on {device_type}: {reason}. "
        "`pynar info` shows what runs where.",
        stacklevel=4,
    )
