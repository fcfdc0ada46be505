"""Batches without padding: the live positions of all sentences as rows, one after the other.

Nothing here waits for a GPU: how many rows there are is known from numbers that are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pynar.ops.intervals import Places

__all__ = ["PackedRows", "bounds", "pack"]


@dataclass(frozen=True)
class PackedRows:
    """The tokens of all sentences, or of several streams of them."""

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N], in their sentences
    sentence: Tensor  # int64 [N]
    intervals: Tensor  # int32 [N, R, 2], the rows that each row sees
    width: int  # no position is as large


def bounds(lengths: Tensor) -> Tensor:
    """The rows of every sentence, int32 `[B, 2]`."""
    ends = lengths.cumsum(0)
    return torch.stack([ends - lengths, ends], -1).int()


def pack(tokens: Tensor, lengths: Tensor, total: int, *, causal: bool = False) -> PackedRows:
    """The `total` live tokens of `tokens: [B, T]`.

    Each row sees its sentence, or with `causal` what of it is not after the row.
    """
    at = Places.of(lengths, total)
    sees = bounds(lengths)[at.sentence]
    if causal:
        last = torch.arange(1, total + 1, dtype=torch.int32, device=lengths.device)
        sees = torch.stack([sees[:, 0], last], -1)
    live = tokens[at.sentence, at.place]
    return PackedRows(live, at.place, at.sentence, sees[:, None], tokens.shape[1])
