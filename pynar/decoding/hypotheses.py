"""What every decoding strategy returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Hypotheses"]


@dataclass
class Hypotheses:
    """The n best outputs of B sentences, best first, without BOS or EOS.

    `passes` counts the decoder passes each sentence took part in. `trace` holds, for strategies
    asked to keep it, the best hypothesis' tokens `[B, T]` after every pass.

    Of strategies that verify drafts, `accepted` counts the drafted tokens that were settled and
    `verified` the passes that settled them: their ratio is the acceptance length.
    """

    tokens: Tensor  # int64 [B, n, T], right padded with PAD
    lengths: Tensor  # int64 [B, n]
    scores: Tensor  # [B, n]
    passes: Tensor  # int64 [B]
    trace: list[Tensor] = field(default_factory=list)
    accepted: Tensor | None = None  # int64 [B]
    verified: Tensor | None = None  # int64 [B]

    def lists(self) -> list[list[list[int]]]:
        """Token ids as nested lists: sentence, hypothesis, token."""
        return [
            [row[:length] for row, length in zip(rows, lengths, strict=True)]
            for rows, lengths in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        ]
