from __future__ import annotations

from torch import Tensor

from pynar.reference._live import only_live

__all__ = ["actnorm", "actnorm_backward"]


def actnorm(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and shifts each channel of the steps that are no padding, or undoes it.

    The definition of :func:`pynar.ops.actnorm`, in plain PyTorch: the same arguments, the same
    results. Computes in float32, or in float64 for float64.
    """
    h = only_live(x, lengths)
    y = (h - bias) * (-log_scale).exp() if inverse else h * log_scale.exp() + bias
    logdet = lengths.to(h.dtype) * log_scale.sum()
    return only_live(y, lengths).to(x.dtype), -logdet if inverse else logdet


def actnorm_backward(
    grad_y: Tensor, x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the first result of :func:`actnorm` by `x`, `log_scale` and `bias`."""
    g, h = only_live(grad_y, lengths), only_live(x, lengths)
    total = g.sum((0, 1))
    if inverse:
        scale = (-log_scale).exp()
        return (g * scale).to(x.dtype), -(g * (h - bias)).sum((0, 1)) * scale, -total * scale
    scale = log_scale.exp()
    return (g * scale).to(x.dtype), (g * h).sum((0, 1)) * scale, total
