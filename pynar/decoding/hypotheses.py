"""What every decoding strategy returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Hypotheses"]


@dataclass
class Hypotheses:
    """The n best outputs of B sentences, best first, without BOS or EOS.

    `passes` counts the decoder passes each sentence took part in. `trace` holds, for strategies
    asked to keep it, the best hypothesis' tokens `[B, T]` after every pass.
    """

    tokens: Tensor  # int64 [B, n, T], right padded with PAD
    lengths: Tensor  # int64 [B, n]
    scores: Tensor  # [B, n]
    passes: Tensor  # int64 [B]
    trace: list[Tensor] = field(default_factory=list)

    def lists(self) -> list[list[list[int]]]:
        """Token ids as nested lists: sentence, hypothesis, token."""
        return [
            [row[:length] for row, length in zip(rows, lengths, strict=True)]
            for rows, lengths in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        ]

    @staticmethod
    def stack(rows: Sequence[Hypotheses]) -> Hypotheses:
        """Joins the results of several batches, padding to the longest; traces are dropped."""
        width = max(row.tokens.shape[-1] for row in rows)
        return Hypotheses(
            torch.cat([F.pad(row.tokens, (0, width - row.tokens.shape[-1])) for row in rows]),
            torch.cat([row.lengths for row in rows]),
            torch.cat([row.scores for row in rows]),
            torch.cat([row.passes for row in rows]),
        )
