"""Batches without padding: the live positions of all sentences as rows, one after the other.

Nothing here waits for a GPU: how many rows there are is known from numbers that are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedRows", "Places", "bounds", "pack"]


@dataclass(frozen=True)
class PackedRows:
    """The tokens of all sentences, or of several streams of them."""

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [N], in their sentences
    sentence: Tensor  # int64 [N]
    intervals: Tensor  # int32 [N, R, 2], the rows that each row sees
    width: int  # no position is as large


@dataclass(frozen=True)
class Places:
    """Sentence of every packed row and its place there, `[N]`, and every sentence's first row."""

    sentence: Tensor
    place: Tensor
    start: Tensor  # [B]

    @staticmethod
    def of(lengths: Tensor, total: int) -> Places:
        start = lengths.cumsum(0) - lengths
        numbers = torch.arange(len(lengths), device=lengths.device)
        sentence = numbers.repeat_interleave(lengths, output_size=total)
        rows = torch.arange(total, device=lengths.device)
        return Places(sentence, rows - start[sentence], start)

    def intervals(self, padded: Tensor, start: Tensor) -> Tensor:
        """Those of `padded: [B, T, R, 2]`, counted from the `start: [B]` of their sentences."""
        first = start.int()[self.sentence, None, None]
        return padded[self.sentence, self.place] + first


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
