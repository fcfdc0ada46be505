from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._operator import Operator

__all__ = ["batched_logdet"]


def batched_logdet(weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`\log|\det W|` and :math:`W^{-1}` of many small matrices, in one launch.

    By Gauss-Jordan elimination with the greatest pivot of each column. A singular matrix has
    log-determinant -inf and an inverse of NaN, without an error; a matrix with a NaN has both NaN.
    The gradient is
    :math:`W^{-\top} g - W^{-\top} G W^{-\top}` for gradients :math:`g` of the log-determinant and
    :math:`G` of the inverse.

    Args:
        weights: `[N, d, d]`, float32 or float64.

    Returns:
        The logarithms, `[N]`, and the inverses, `[N, d, d]`.

    Example:
        >>> logdet, inverse = batched_logdet(torch.tensor([[[0.0, 2.0], [4.0, 0.0]]]))
        >>> logdet.exp()
        tensor([8.])
        >>> inverse
        tensor([[[0.0000, 0.2500],
                 [0.5000, 0.0000]]])
    """
    if torch.is_grad_enabled() and weights.requires_grad:
        return _Differentiable.apply(weights)
    return _OPERATOR(weights)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor) -> tuple[Tensor, Tensor]:
        return _OPERATOR.call(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logdet: Tensor | None, grad_inverse: Tensor | None
    ) -> Tensor | None:
        transposed = ctx.saved_tensors[0].mT
        # Products of small matrices, for which torch has a batched one on every device.
        grad = None
        if grad_inverse is not None:
            grad = -(transposed @ grad_inverse @ transposed)
        if grad_logdet is not None:
            by_logdet = grad_logdet[:, None, None] * transposed
            grad = by_logdet if grad is None else grad + by_logdet
        return grad


def _native(extension: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
    if weights.is_cuda and weights.dim() == 3:
        bytes_each = weights.shape[1] * weights.shape[2] * weights.element_size()
        if bytes_each > extension.batched_logdet_most_bytes():
            return _reference(weights)
    logdet = weights.new_empty(weights.shape[:1])
    inverse = torch.empty_like(weights, memory_format=torch.contiguous_format)
    plan = extension.batched_logdet(weights.contiguous(), logdet, inverse)
    if plan is not None:
        _nvrtc.launch(plan)
    return logdet, inverse


def _reference(weights: Tensor) -> tuple[Tensor, Tensor]:
    check = Check("batched_logdet")
    check.dims("weights", weights, 3, "[N, d, d]")
    check.dtype("weights", weights, (torch.float32, torch.float64))
    count, dim, _ = weights.shape
    check.shape("weights", weights, [count, dim, dim], "square matrices")
    return reference.batched_logdet(weights)


def _fake(weights: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape[:1]), weights.new_empty(weights.shape)


_OPERATOR = Operator(
    "batched_logdet(Tensor weights) -> (Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
)
