from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._flow import (
    accumulation,
    backward_on_squeezed_steps,
    check_map,
    check_squeeze,
    log_determinant,
    map_sizes,
    on_squeezed_steps,
    readable,
)
from pynar.ops._operator import Operator

__all__ = ["actnorm"]


def actnorm(
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    inverse: bool = False,
    squeeze: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts each channel, or undoes it.

    .. math:: y = x \odot e^{s} + b, \qquad \log|\det J|_b = \mathrm{lengths}_b \sum_c s_c,

    the activation normalisation of Glow (Kingma and Dhariwal, 2018), over the steps
    :math:`t <` ``lengths[b]``. Padding may hold anything and comes out as zero. The inverse
    direction computes :math:`x = (y - b) \odot e^{-s}` and the negative log-determinant; no epsilon
    is added in either.

    Args:
        x: `[B, T, C]`, float32, bfloat16, float16 or float64.
        lengths: `[B]`, int64, each in `[0, T]`.
        log_scale: `[C]`, :math:`s`, float32 (float64 for float64 `x`).
        bias: `[C]`, :math:`b`, of the same type.
        inverse: whether to undo the map.
        squeeze: joins so many neighbouring steps first, as :func:`squeeze` does, and in the inverse
            direction takes them apart afterwards, in the same pass: `x`, or else the result, is
            `[B, f T, C / f]`, and `lengths` are those of its steps, in `[0, f T]`. The map acts on
            `ceil(lengths / f)` joined steps, which is what the log-determinant counts; of the last
            one, what lies beyond the sentence counts as zero, and comes out as zero where it is
            taken apart.

    Returns:
        The result, `[B, T, C]`, and the log-determinant, `[B]`, of `log_scale`'s type.

    Example:
        >>> x = torch.ones(1, 2, 1)
        >>> y, logdet = actnorm(x, torch.tensor([1]), torch.tensor([2.0]).log(), torch.zeros(1))
        >>> y
        tensor([[[2.],
                 [0.]]])
        >>> logdet
        tensor([0.6931])
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, log_scale, bias)):
        y = _Differentiable.apply(x, lengths, log_scale, bias, inverse, squeeze)
    else:
        y = _FORWARD(x, lengths, log_scale, bias, inverse, squeeze)
    return y, log_determinant(lengths, log_scale.sum(), inverse, squeeze)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool, squeeze: int
    ) -> Tensor:
        return _FORWARD.call(x, lengths, log_scale, bias, inverse, squeeze)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.inverse, ctx.squeeze = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lengths, log_scale, bias = ctx.saved_tensors
        grads = _BACKWARD.call(grad_y, x, lengths, log_scale, bias, ctx.inverse, ctx.squeeze)
        return (grads[0], None, *grads[1:], None, None)


def _native(
    extension: Any,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    inverse: bool,
    squeeze: int,
) -> Tensor:
    if x.dim() != 3:
        check_map(Check("actnorm"), x, lengths, inverse, squeeze)
    y = _fake(x, lengths, log_scale, bias, inverse, squeeze)
    plan = extension.actnorm(
        readable(x), lengths, log_scale.contiguous(), bias.contiguous(), inverse, squeeze, y
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return y


def _backward_native(
    extension: Any,
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(grad_y, x, lengths, log_scale, bias, inverse, squeeze)
    workspace = None
    if x.is_cuda and x.dim() == 3 and squeeze > 0:
        sizes = map_sizes(x, inverse, squeeze)[0]
        size = extension.flow_linear_backward_workspace(*sizes, 0, 0, log_scale.element_size())
        workspace = log_scale.new_empty(size)
    plan = extension.actnorm_backward(
        *(readable(grad_y), readable(x), lengths, log_scale.contiguous(), bias.contiguous()),
        *(inverse, squeeze, *grads, workspace),
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return grads


def _check(
    check: Check,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    inverse: bool,
    squeeze: int,
) -> None:
    _, channels = check_map(check, x, lengths, inverse, squeeze)
    for name, tensor in (("log_scale", log_scale), ("bias", bias)):
        check.shape(name, tensor, [channels], "channels of `x`")
        check.dtype(name, tensor, (accumulation(x.dtype),))
        check.device(name, tensor, "x", x)


def _reference(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool, squeeze: int
) -> Tensor:
    _check(Check("actnorm"), x, lengths, log_scale, bias, inverse, squeeze)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return reference.actnorm(x, lengths, log_scale, bias, inverse=inverse)[0]

    return on_squeezed_steps(run, x, lengths, inverse, squeeze)


def _backward_reference(
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(Check("actnorm_backward"), x, lengths, log_scale, bias, inverse, squeeze)
    run = functools.partial(reference.actnorm_backward, log_scale=log_scale, bias=bias)
    return backward_on_squeezed_steps(run, grad_y, x, lengths, inverse, squeeze)  # type: ignore[return-value]


def _fake(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool, squeeze: int
) -> Tensor:
    check_squeeze("actnorm", x, inverse, squeeze)
    return x.new_empty(map_sizes(x, inverse, squeeze)[1])


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)


_FORWARD = Operator(
    "actnorm(Tensor x, Tensor lengths, Tensor log_scale, Tensor bias, bool inverse, "
    "int squeeze) -> Tensor",
    native=_native,
    reference=_reference,
    fake=_fake,
)

_BACKWARD = Operator(
    "actnorm_backward(Tensor grad_y, Tensor x, Tensor lengths, Tensor log_scale, Tensor bias, "
    "bool inverse, int squeeze) -> (Tensor, Tensor, Tensor)",
    native=_backward_native,
    reference=_backward_reference,
    fake=_backward_fake,
)
