"""Maps of a flow with packed weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.reference.affine_coupling import affine_coupling
from pynar.reference.interval_attention import interval_attention
from pynar.reference.packed_layers import packed_layer
from pynar.reference.packed_linear import packed_linear

__all__ = ["packed_coupling"]


def packed_coupling(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    dtype: torch.dtype,
    memory: Tensor,
    rows: Sequence[Tensor],
    heads: int,
    eps: float,
    split: str,
    up: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """An affine coupling of rows `[N, C]`, and its log-determinant by row, `[N]`.

    `weights` are unpacked, float32; `dtype` is what they were packed as. Of seven the first two
    gather by position what goes into the network.
    """
    y = x.clone()
    if split == "steps":
        halves = y[0::2], y[1::2]
    elif split == "alternate":
        halves = y[:, 0::2], y[:, 1::2]
    else:
        halves = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
    given, changed = halves if up else reversed(halves)
    positions, sees, reads = rows
    if len(weights) == 7:
        found, queries = (
            packed_linear(h, weights[i], biases[i], dtype, "none", None, None, None)
            for i, h in enumerate((given, positions))
        )
        q, k, v = (h.unflatten(1, (heads, -1)) for h in (queries, *found.chunk(2, 1)))
        gathered = cast(Tensor, interval_attention(q, k, v, sees, scale=1.0)).flatten(1)
        found = positions + gathered
        inputs = F.layer_norm(found, found.shape[1:], norms[0], norms[1], eps)
        weights, biases, norms = weights[2:], biases[2:], norms[2:]
    else:
        inputs = given + positions
    keys, values = (part.unflatten(1, (heads, -1)) for part in memory.chunk(2, 1))
    states = packed_layer(
        inputs,
        weights[:-1],
        biases[:-1],
        norms,
        dtype,
        sees,
        (keys, values, reads),
        None,
        len(given),
        heads,
        "relu",
        eps,
    )
    net = packed_linear(states, weights[-1], biases[-1], dtype, "none", None, None, None)
    ones = torch.ones(len(given), dtype=torch.int64, device=x.device)
    shift, raw_scale = net[:, None].chunk(2, -1)
    new, by_row = affine_coupling(changed[:, None], ones, shift, raw_scale, inverse=inverse)
    changed.copy_(new[:, 0])
    logdet = x.new_zeros(len(x))
    logdet[:: 2 if split == "steps" else 1] = by_row
    return y, logdet
