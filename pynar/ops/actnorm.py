from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._flow import accumulation, check_steps, log_determinant, readable
from pynar.ops._operator import Operator

__all__ = ["actnorm"]


def actnorm(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False
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
        y = _Differentiable.apply(x, lengths, log_scale, bias, inverse)
    else:
        y = _FORWARD(x, lengths, log_scale, bias, inverse)
    return y, log_determinant(lengths, log_scale.sum(), inverse)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
    ) -> Tensor:
        return _FORWARD.call(x, lengths, log_scale, bias, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.inverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lengths, log_scale, bias = ctx.saved_tensors
        grads = _BACKWARD.call(grad_y, x, lengths, log_scale, bias, ctx.inverse)
        return (grads[0], None, *grads[1:], None)


def _native(
    extension: Any, x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    plan = extension.actnorm(
        readable(x), lengths, log_scale.contiguous(), bias.contiguous(), inverse, y
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
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grads = (torch.empty_like(log_scale), torch.empty_like(bias))
    workspace = None
    if x.is_cuda and x.dim() == 3:
        size = extension.flow_linear_backward_workspace(*x.shape, 0, 0, log_scale.element_size())
        workspace = log_scale.new_empty(size)
    plan = extension.actnorm_backward(
        *(readable(grad_y), readable(x), lengths, log_scale.contiguous(), bias.contiguous()),
        *(inverse, grad_x, *grads, workspace),
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return grad_x, *grads


def _check(check: Check, x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor) -> None:
    check_steps(check, "x", x, lengths)
    for name, tensor in (("log_scale", log_scale), ("bias", bias)):
        check.shape(name, tensor, [x.shape[2]], "channels of `x`")
        check.dtype(name, tensor, (accumulation(x.dtype),))
        check.device(name, tensor, "x", x)


def _reference(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
) -> Tensor:
    _check(Check("actnorm"), x, lengths, log_scale, bias)
    return reference.actnorm(x, lengths, log_scale, bias, inverse=inverse)[0]


def _backward_reference(
    grad_y: Tensor, x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(Check("actnorm_backward"), x, lengths, log_scale, bias)
    return reference.actnorm_backward(grad_y, x, lengths, log_scale, bias, inverse)


def _fake(x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    grad_y: Tensor, x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)


_FORWARD = Operator(
    "actnorm(Tensor x, Tensor lengths, Tensor log_scale, Tensor bias, bool inverse) -> Tensor",
    native=_native,
    reference=_reference,
    fake=_fake,
)

_BACKWARD = Operator(
    "actnorm_backward(Tensor grad_y, Tensor x, Tensor lengths, Tensor log_scale, Tensor bias, "
    "bool inverse) -> (Tensor, Tensor, Tensor)",
    native=_backward_native,
    reference=_backward_reference,
    fake=_backward_fake,
)
