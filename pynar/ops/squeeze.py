from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._flow import FLOATING, check_steps, readable
from pynar.ops._operator import Operator

__all__ = ["squeeze", "squeeze_split", "unsqueeze", "unsqueeze_join"]


def squeeze(x: Tensor, lengths: Tensor, factor: int = 2) -> tuple[Tensor, Tensor]:
    r"""Joins every `factor` neighbouring steps into one.

    .. math:: y_{b,t} = [x_{b,ft}; x_{b,ft+1}; \dots; x_{b,ft+f-1}]

    Padding may hold anything and counts as zero; its volume does not change, so there is no
    log-determinant to return.

    Args:
        x: `[B, T, C]`, float32, bfloat16, float16 or float64.
        lengths: `[B]`, int64, each in `[0, T]`.
        factor: :math:`f`, at least 1.

    Returns:
        The joined steps, `[B, ceil(T / f), f C]`, and their lengths, `ceil(lengths / f)`.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> y, lengths = squeeze(x, torch.tensor([3]))
        >>> y
        tensor([[[1., 2.],
                 [3., 0.]]])
        >>> lengths
        tensor([2])
    """
    y, _, new_lengths = squeeze_split(x, lengths, x.shape[-1], factor)
    return y, new_lengths


def squeeze_split(
    x: Tensor, lengths: Tensor, kept: int, factor: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Splits off the channels from `kept` on, and squeezes the others as :func:`squeeze` does.

    Between the levels of a multi-scale flow: the channels that are dropped go no further. One pass,
    forward and backward.

    Returns:
        The joined steps, `[B, ceil(T / f), f kept]`, the channels dropped, `[B, T, C - kept]`, and
        the lengths of the former, `ceil(lengths / f)`.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> y, dropped, lengths = squeeze_split(x, torch.tensor([2]), kept=1)
        >>> y, dropped
        (tensor([[[1., 3.]]]), tensor([[[2.],
                 [4.]]]))
    """
    if torch.is_grad_enabled() and x.requires_grad:
        y, dropped = _Squeeze.apply(x, lengths, factor, kept)
    else:
        y, dropped = _SQUEEZE(x, lengths, factor, kept)
    return y, dropped, (lengths + (factor - 1)) // factor


def unsqueeze(y: Tensor, lengths: Tensor, factor: int = 2) -> Tensor:
    """Takes every step apart again into `factor` steps: undoes :func:`squeeze`.

    Args:
        y: `[B, T, f C]`, float32, bfloat16, float16 or float64.
        lengths: `[B]`, int64, those of the result: each in `[0, f T]`.
        factor: `f`, at least 1.

    Returns:
        `[B, f T, C]`, with zeros for the padding.

    Example:
        >>> unsqueeze(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([3]))
        tensor([[[1.],
                 [2.],
                 [3.],
                 [0.]]])
    """
    Check("unsqueeze").dims("y", y, 3, "[B, T, f C]")
    steps = y.shape[1] * factor
    dropped = y.new_empty(y.shape[0], steps, 0)
    return _join("unsqueeze", y, dropped, lengths, factor, steps)


def unsqueeze_join(y: Tensor, dropped: Tensor, lengths: Tensor, factor: int = 2) -> Tensor:
    """Undoes :func:`squeeze_split`: `y` and the channels dropped, `[B, T, D]`, make `[B, T, C]`.

    `lengths` are those of the result, each in `[0, T]`; `T` need not be a multiple of `factor`.
    """
    Check("unsqueeze_join").dims("dropped", dropped, 3, "[B, T, D]")
    return _join("unsqueeze_join", y, dropped, lengths, factor, dropped.shape[1])


def _join(
    name: str, y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int
) -> Tensor:
    if torch.is_grad_enabled() and (y.requires_grad or dropped.requires_grad):
        return _Unsqueeze.apply(name, y, dropped, lengths, factor, steps)
    return _UNSQUEEZE.call(name, y, dropped, lengths, factor, steps)


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, lengths: Tensor, factor: int, kept: int) -> tuple[Tensor, Tensor]:
        return _SQUEEZE.call(x, lengths, factor, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, lengths, ctx.factor, _ = inputs
        ctx.steps = x.shape[1]
        ctx.save_for_backward(lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_dropped: Tensor) -> tuple[Tensor | None, ...]:
        (lengths,) = ctx.saved_tensors
        grad_x = _UNSQUEEZE.call(
            "squeeze_backward", grad_y, grad_dropped, lengths, ctx.factor, ctx.steps
        )
        return grad_x, None, None, None


class _Unsqueeze(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str, y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int
    ) -> Tensor:
        return _UNSQUEEZE.call(name, y, dropped, lengths, factor, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, y, _, lengths, ctx.factor, _ = inputs
        ctx.kept = y.shape[2] // ctx.factor
        ctx.save_for_backward(lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        (lengths,) = ctx.saved_tensors
        grad_y, grad_dropped = _SQUEEZE.call(grad_x, lengths, ctx.factor, ctx.kept)
        return None, grad_y, grad_dropped, None, None, None


def _check_squeeze(x: Tensor, lengths: Tensor, factor: int, kept: int) -> None:
    check = Check("squeeze")
    check_steps(check, "x", x, lengths)
    if factor < 1:
        check.fail("factor", "be at least 1", factor)
    if not 1 <= kept <= x.shape[2]:
        check.fail("kept", f"be in [1, {x.shape[2]}] (channels of `x`)", kept)


def _check_unsqueeze(
    name: str, y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int
) -> None:
    check = Check(name)
    check.dims("y", y, 3, "[B, T, f C]")
    check.dtype("y", y, FLOATING)
    if factor < 1:
        check.fail("factor", "be at least 1", factor)
    if y.shape[2] == 0 or y.shape[2] % factor != 0:
        check.fail("y", f"have a multiple of {factor} channels (`factor`)", y.shape[2])
    check.dims("dropped", dropped, 3, "[B, T, D]")
    batch, joined = dropped.shape[0], -(-steps // factor)
    check.shape("y", y, [batch, joined, y.shape[2]], "batch and steps of `dropped`, joined")
    check.dtype("dropped", dropped, (y.dtype,))
    check.device("dropped", dropped, "y", y)
    check.shape("lengths", lengths, [batch], "batch of `y`")
    check.dtype("lengths", lengths, (torch.int64,))
    check.device("lengths", lengths, "y", y)
    check.values("lengths", lengths, f"in [0, {steps}]", 0, steps)


def _squeeze_native(
    extension: Any, x: Tensor, lengths: Tensor, factor: int, kept: int
) -> tuple[Tensor, Tensor]:
    if x.dim() != 3 or factor < 1 or not 1 <= kept <= x.shape[2]:
        _check_squeeze(x, lengths, factor, kept)
    y, dropped = _squeeze_fake(x, lengths, factor, kept)
    plan = extension.squeeze(readable(x), lengths, factor, y, dropped)
    if plan is not None:
        _nvrtc.launch(plan)
    return y, dropped


def _unsqueeze_native(
    extension: Any, name: str, y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int
) -> Tensor:
    if y.dim() != 3 or dropped.dim() != 3 or factor < 1 or y.shape[2] % factor != 0:
        _check_unsqueeze(name, y, dropped, lengths, factor, steps)
    x = _unsqueeze_fake(name, y, dropped, lengths, factor, steps)
    plan = extension.unsqueeze(name, readable(y), readable(dropped), lengths, factor, x)
    if plan is not None:
        _nvrtc.launch(plan)
    return x


def _squeeze_reference(x: Tensor, lengths: Tensor, factor: int, kept: int) -> tuple[Tensor, Tensor]:
    _check_squeeze(x, lengths, factor, kept)
    return reference.squeeze(x, lengths, factor, kept)


def _unsqueeze_reference(
    name: str, y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int
) -> Tensor:
    _check_unsqueeze(name, y, dropped, lengths, factor, steps)
    return reference.unsqueeze(y, dropped, lengths, factor, steps)


def _squeeze_fake(x: Tensor, lengths: Tensor, factor: int, kept: int) -> tuple[Tensor, Tensor]:
    batch, steps, channels = x.shape
    y = x.new_empty(batch, (steps + factor - 1) // factor, factor * kept)
    return y, x.new_empty(batch, steps, channels - kept)


def _unsqueeze_fake(
    name: str, y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int
) -> Tensor:
    return y.new_empty(y.shape[0], steps, y.shape[2] // factor + dropped.shape[2])


_SQUEEZE = Operator(
    "squeeze(Tensor x, Tensor lengths, int factor, int kept) -> (Tensor, Tensor)",
    native=_squeeze_native,
    reference=_squeeze_reference,
    fake=_squeeze_fake,
)

_UNSQUEEZE = Operator(
    "unsqueeze(str name, Tensor y, Tensor dropped, Tensor lengths, int factor, int steps) "
    "-> Tensor",
    native=_unsqueeze_native,
    reference=_unsqueeze_reference,
    fake=_unsqueeze_fake,
)
