"""A Transformer layer with packed weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pynar.reference.interval_attention import interval_attention
from pynar.reference.packed_linear import packed_linear

__all__ = ["packed_layer"]


def packed_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    dtype: torch.dtype,
    intervals: Tensor,
    memory: tuple[Tensor, Tensor, Tensor] | None,
    chosen: Tensor | None,
    content: int,
    heads: int,
    activation: str,
    eps: float,
) -> Tensor:
    """`weights` are unpacked, float32; `dtype` is what they were packed as."""

    def enter(index: int, x: Tensor, activation: str = "none") -> Tensor:
        input_eps = None if norms else eps
        return packed_linear(
            x, weights[index], biases[index], dtype, activation, None, input_eps, None
        )

    def leave(index: int, x: Tensor, residual: Tensor) -> Tensor:
        norm = (norms[index - 1], norms[index], eps) if norms else None
        return packed_linear(x, weights[index], biases[index], dtype, "none", residual, None, norm)

    def attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
        q = q.unflatten(1, (heads, q.shape[1] // heads))
        return cast(Tensor, interval_attention(q, k, v, intervals, scale=1.0)).flatten(1)

    q, k, v = enter(0, x).chunk(3, 1)
    k, v = (part[:content].unflatten(1, (heads, x.shape[1] // heads)) for part in (k, v))
    if chosen is not None:
        q, x, intervals = q[chosen], x[chosen], intervals[chosen]
    h = leave(1, attend(q.contiguous(), k, v, intervals), x)
    if memory is not None:
        keys, values, sees = memory
        sees = sees if chosen is None else sees[chosen]
        h = leave(3, attend(enter(2, h), keys, values, sees), h)
    last = len(weights) - 1
    return leave(last, enter(last - 1, h, activation), h)
