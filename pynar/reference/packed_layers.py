"""A Transformer layer with packed weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
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
    cache: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """`weights` are unpacked, float32; `dtype` is what they were packed as.

    With a `cache: [places, capacity, 2 H, D]` keys and values go to its rows `slots`, and
    `intervals` are of all its rows.
    """

    def enter(index: int, x: Tensor, activation: str = "none") -> Tensor:
        input_eps = None if norms else eps
        return packed_linear(
            x, weights[index], biases[index], dtype, activation, None, input_eps, None
        )

    def leave(part: int, index: int | None, x: Tensor, residual: Tensor) -> Tensor:
        norm = (norms[2 * part], norms[2 * part + 1], eps) if norms else None
        if index is not None:
            return packed_linear(
                x, weights[index], biases[index], dtype, "none", residual, None, norm
            )
        h = x + residual
        return h if norm is None else F.layer_norm(h, h.shape[1:], *norm)

    def attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
        q = q.unflatten(1, (heads, q.shape[1] // heads))
        return cast(Tensor, interval_attention(q, k, v, intervals, scale=1.0)).flatten(1)

    q, k, v = enter(0, x).chunk(3, 1)
    k, v = (part[:content].unflatten(1, (heads, x.shape[1] // heads)) for part in (k, v))
    if cache is not None:
        rows = cache.view(-1, *cache.shape[2:])
        rows[slots] = torch.cat([k, v], 1)
        k, v = rows.chunk(2, 1)
    if chosen is not None:
        q, x, intervals = q[chosen], x[chosen], intervals[chosen]
    parts = 2 if memory is None else 3
    bare = len(weights) == parts + 1
    h = leave(0, None if bare else 1, attend(q.contiguous(), k, v, intervals), x)
    if memory is not None:
        keys, values, sees = memory
        sees = sees if chosen is None else sees[chosen]
        query = enter(1 if bare else 2, h)
        h = leave(1, None if bare else 3, attend(query, keys, values, sees), h)
    last = len(weights) - 1
    return leave(parts - 1, last, enter(last - 1, h, activation), h)
