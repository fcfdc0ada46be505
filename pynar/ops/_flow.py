"""What the operators of the flow have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pynar import reference
from pynar.ops._checks import Check

__all__ = [
    "FLOATING",
    "accumulation",
    "backward_on_squeezed_steps",
    "check_map",
    "check_squeeze",
    "check_steps",
    "log_determinant",
    "map_sizes",
    "on_squeezed_steps",
    "readable",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, and of the parameters that are shared by all steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def readable(x: Tensor) -> Tensor:
    """The tensor itself if its channels are neighbours, else a copy in which they are."""
    return x if x.dim() != 3 or x.stride(2) == 1 or x.shape[2] < 2 else x.contiguous()


def check_steps(check: Check, name: str, x: Tensor, lengths: Tensor, factor: int = 1) -> None:
    """Checks `[B, T, C]` and the lengths of its sentences, in [0, factor T]."""
    check.dims(name, x, 3, "[B, T, C]")
    check.dtype(name, x, FLOATING)
    batch, steps, channels = x.shape
    if channels == 0:
        check.fail(name, "have at least one channel", 0)
    check.shape("lengths", lengths, [batch], f"batch of `{name}`")
    check.dtype("lengths", lengths, (torch.int64,))
    check.device("lengths", lengths, name, x)
    check.values("lengths", lengths, f"in [0, {steps * factor}]", 0, steps * factor)


def check_squeeze(name: str, x: Tensor, inverse: bool, squeeze: int) -> None:
    """What results have to be shaped by, before the operator checks all of it."""
    if squeeze == 1:
        return
    check = Check(name)
    check.dims("x", x, 3, "[B, T, C]")
    if squeeze < 1:
        check.fail("squeeze", "be at least 1", squeeze)
    divided, what = (x.shape[2], "channels") if inverse else (x.shape[1], "steps")
    if divided % squeeze:
        check.fail("x", f"have a multiple of {squeeze} {what} (`squeeze`)", divided)


def map_sizes(x: Tensor, inverse: bool, squeeze: int) -> tuple[list[int], list[int]]:
    """Of the steps that a map acts on, and of what comes out."""
    batch, steps, channels = x.shape
    if squeeze == 1:
        return [batch, steps, channels], [batch, steps, channels]
    if inverse:
        return [batch, steps, channels], [batch, steps * squeeze, channels // squeeze]
    joined = [batch, steps // squeeze, channels * squeeze]
    return joined, joined


def check_map(
    check: Check, x: Tensor, lengths: Tensor, inverse: bool, squeeze: int
) -> tuple[int, int]:
    """Checks what a map of squeezed steps is given; returns their steps and channels."""
    check_squeeze(check.operator, x, inverse, squeeze)
    check_steps(check, "x", x, lengths, squeeze if inverse else 1)
    _, steps, channels = map_sizes(x, inverse, squeeze)[0]
    return steps, channels


def on_squeezed_steps(
    run: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    lengths: Tensor,
    inverse: bool,
    squeeze: int,
) -> Tensor:
    """What `run` makes of squeezed steps and their lengths; `x` is squeezed, or else the result."""
    if squeeze == 1:
        return run(x, lengths)
    joined = (lengths + (squeeze - 1)) // squeeze
    if not inverse:
        return run(reference.squeeze(x, lengths, squeeze, x.shape[2])[0], joined)
    y, steps = run(x, joined), x.shape[1] * squeeze
    return reference.unsqueeze(y, y.new_empty(len(y), steps, 0), lengths, squeeze, steps)


def backward_on_squeezed_steps(
    run: Callable[..., tuple[Tensor, ...]],
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, ...]:
    """The gradients of `on_squeezed_steps`, by `x` and what follows it."""
    if squeeze == 1:
        return run(grad_y, x, lengths, inverse=inverse)
    joined = (lengths + (squeeze - 1)) // squeeze
    if inverse:
        grad_y = reference.squeeze(grad_y, lengths, squeeze, grad_y.shape[2])[0]
        return run(grad_y, x, joined, inverse=True)
    steps = x.shape[1]
    squeezed = reference.squeeze(x, lengths, squeeze, x.shape[2])[0]
    grad_x, *grads = run(grad_y, squeezed, joined, inverse=False)
    nothing = grad_x.new_empty(len(x), steps, 0)
    return (reference.unsqueeze(grad_x, nothing, lengths, squeeze, steps), *grads)


def log_determinant(lengths: Tensor, by_step: Tensor, inverse: bool, squeeze: int = 1) -> Tensor:
    """The log-determinants, `[B]`, of a map that has the same one, a number, for every step."""
    if squeeze > 1:
        lengths = (lengths + (squeeze - 1)) // squeeze
    return lengths.to(by_step.dtype) * (-by_step if inverse else by_step)
