from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pynar.reference._live import only_live

__all__ = ["affine_coupling", "affine_coupling_backward"]


def affine_coupling(
    z: Tensor, lengths: Tensor, shift: Tensor, raw_scale: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales by `sigmoid(raw_scale + 2)` and shifts the steps that are no padding, or undoes it.

    The definition of :func:`pynar.ops.affine_coupling`, in plain PyTorch: the same arguments, the
    same results. Computes in float32, or in float64 for float64.
    """
    h, b, v = only_live(z, lengths), only_live(shift, lengths), only_live(raw_scale, lengths) + 2
    y = (h - b) / v.sigmoid() if inverse else h * v.sigmoid() + b
    logdet = only_live(F.logsigmoid(v), lengths).sum((1, 2))
    return only_live(y, lengths).to(z.dtype), -logdet if inverse else logdet


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    lengths: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`affine_coupling` by `z`, `shift` and `raw_scale`.

    `x` is what the scale multiplies: the argument of the forward direction, the result of the
    inverse one.
    """
    g, h = only_live(grad_y, lengths), only_live(x, lengths)
    v = only_live(raw_scale, lengths) + 2
    by_raw = (-v).sigmoid() * grad_logdet[:, None, None]
    if inverse:
        grad_shift = -g / v.sigmoid()
        grads = (-grad_shift, grad_shift, -g * h * (-v).sigmoid() - by_raw)
    else:
        grads = (g * v.sigmoid(), g, g * h * v.sigmoid() * (-v).sigmoid() + by_raw)
    return tuple(only_live(x, lengths).to(grad_y.dtype) for x in grads)  # type: ignore[return-value]
