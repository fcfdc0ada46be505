from __future__ import annotations

import torch
from torch import Tensor

from pynar.reference._live import only_live
from pynar.reference.actnorm import actnorm
from pynar.reference.head_linear import head_linear, head_product, split_heads

__all__ = ["flow_linear", "flow_linear_map", "flow_linear_map_backward", "is_strided"]


def is_strided(layout: str, step: int) -> bool:
    """Whether the heads of this step's matrix are channels that lie apart."""
    return layout == "strided" or (layout == "alternating" and step % 2 == 1)


def flow_linear(
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    *,
    layout: str = "alternating",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Applies steps of :func:`actnorm` and :func:`head_linear` one after another.

    The definition of :func:`pynar.ops.flow_linear`, in plain PyTorch: the same arguments, the same
    results but for 16-bit types, which are rounded once here as there.
    """
    y = only_live(x, lengths)
    logdet = y.new_zeros(x.shape[0])
    order = range(len(weight))
    for k in reversed(order) if inverse else order:
        name = "strided" if is_strided(layout, k) else "contiguous"
        if inverse:
            y, linear = head_linear(y, lengths, weight[k], layout=name, inverse=True)
            y, norm = actnorm(y, lengths, log_scale[k], bias[k], inverse=True)
        else:
            y, norm = actnorm(y, lengths, log_scale[k], bias[k])
            y, linear = head_linear(y, lengths, weight[k], layout=name)
        logdet = logdet + norm + linear
    return y.to(x.dtype), logdet


def _states(
    h: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
) -> list[Tensor]:
    """What goes into each step, in the order in which steps are applied, and what comes out."""
    states = [h]
    order = range(len(weight))
    for k in reversed(order) if inverse else order:
        if not inverse and log_scale is not None and bias is not None:
            h = h * log_scale[k].exp() + bias[k]
        h = head_product(h, weight[k], is_strided(layout, k))
        if inverse and log_scale is not None and bias is not None:
            h = (h - bias[k]) * (-log_scale[k]).exp()
        states.append(h)
    return states


def flow_linear_map(
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
) -> Tensor:
    """The first result of :func:`flow_linear`.

    `weight` holds the inverses for the inverse direction; without `log_scale` and `bias` there are
    only products.
    """
    y = _states(only_live(x, lengths), log_scale, bias, weight, layout, inverse)[-1]
    return only_live(y, lengths).to(x.dtype)


def flow_linear_map_backward(
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`flow_linear_map` by `x`, `log_scale`, `bias` and `weight`.

    Those of a missing `log_scale` and `bias` are empty.
    """
    g = only_live(grad_y, lengths)
    states = _states(only_live(x, lengths), log_scale, bias, weight, layout, inverse)
    channels = (0, x.shape[2]) if log_scale is None else log_scale.shape
    grad_log_scale = weight.new_zeros(channels)
    grad_bias = torch.zeros_like(grad_log_scale)
    grad_weight = torch.zeros_like(weight)
    order = range(len(weight))
    applied = list(reversed(order) if inverse else order)
    for place in reversed(order):
        k, strided = applied[place], is_strided(layout, applied[place])
        u = states[place]
        if log_scale is not None and bias is not None:
            if inverse:
                scale = (-log_scale[k]).exp()
                grad_log_scale[k] = -(g * states[place + 1]).sum((0, 1))
                grad_bias[k] = -g.sum((0, 1)) * scale
                g = g * scale
            else:
                u = u * log_scale[k].exp() + bias[k]
        heads = split_heads(g, weight.shape[1], strided).flatten(0, 2)
        grad_weight[k] = heads.T @ split_heads(u, weight.shape[1], strided).flatten(0, 2)
        g = head_product(g, weight[k].T, strided)
        if not inverse and log_scale is not None:
            grad_log_scale[k] = (g * states[place]).sum((0, 1)) * log_scale[k].exp()
            grad_bias[k] = g.sum((0, 1))
            g = g * log_scale[k].exp()
    return only_live(g, lengths).to(x.dtype), grad_log_scale, grad_bias, grad_weight
