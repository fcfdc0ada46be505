"""What the operators of the flow have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from pynar.ops._checks import Check

__all__ = ["FLOATING", "accumulation", "check_steps", "log_determinant", "readable"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, and of the parameters that are shared by all steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def readable(x: Tensor) -> Tensor:
    """The tensor itself if its channels are neighbours, else a copy in which they are."""
    return x if x.dim() != 3 or x.stride(2) == 1 or x.shape[2] < 2 else x.contiguous()


def check_steps(check: Check, name: str, x: Tensor, lengths: Tensor) -> None:
    """Checks `[B, T, C]` and the lengths of its sentences."""
    check.dims(name, x, 3, "[B, T, C]")
    check.dtype(name, x, FLOATING)
    batch, steps, channels = x.shape
    if channels == 0:
        check.fail(name, "have at least one channel", 0)
    check.shape("lengths", lengths, [batch], f"batch of `{name}`")
    check.dtype("lengths", lengths, (torch.int64,))
    check.device("lengths", lengths, name, x)
    check.values("lengths", lengths, f"in [0, {steps}]", 0, steps)


def log_determinant(lengths: Tensor, by_step: Tensor, inverse: bool) -> Tensor:
    """The log-determinants, `[B]`, of a map that has the same one, a number, for every step."""
    return lengths.to(by_step.dtype) * (-by_step if inverse else by_step)
