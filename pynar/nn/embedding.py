"""Token embeddings with positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pynar.symbols import PAD

__all__ = ["Embedding", "sinusoids"]


def sinusoids(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions `[length, dim]`: all sines, then all cosines (tensor2tensor layout).

    Position t, frequency k: sin and cos of t * exp(-k * ln(10000) / (dim / 2 - 1)).
    """
    half = dim // 2
    steps = torch.arange(half, device=device)
    frequency = torch.exp(steps * (-math.log(10000.0) / max(half - 1, 1)))
    angle = torch.arange(length, device=device)[:, None] * frequency
    table = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.nn.functional.pad(table, (0, dim - 2 * half))


class Embedding(nn.Module):
    """Token embeddings scaled by sqrt(C), and positions; dropout belongs to the caller.

    Learned positions end at `max_length`; sinusoids are made as long as a sentence asks for;
    `positions="none"` adds zeros, for networks that read step by step.
    Without `scale` token embeddings stay as they are; `norm` is the layer normalisation of the
    sum, or the identity (BART has one).
    """

    table: Tensor | None

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        positions: str,
        max_length: int,
        scale: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.scale = math.sqrt(dim) if scale else 1.0
        self.max_length = max_length
        self.learned = nn.Embedding(max_length, dim) if positions == "learned" else None
        table = sinusoids(max_length, dim) if positions == "sinusoidal" else None
        self.register_buffer("table", table, persistent=False)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def positions(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the position table, `[stop - start, C]`."""
        if self.learned is not None:
            if stop > self.max_length:
                raise ValueError(
                    f"Embedding: a sequence of {stop} tokens is longer than the model's "
                    f"{self.max_length} learned positions; split it or train with more"
                )
            return self.learned.weight[start:stop]
        if self.table is None:
            return self.tokens.weight.new_zeros(stop - start, self.tokens.embedding_dim)
        if stop > self.table.shape[0]:
            # Even while decoding: a tensor made in inference mode could not be trained with.
            with torch.inference_mode(False):
                table = sinusoids(max(stop, 2 * self.table.shape[0]), self.table.shape[1])
                self.table = table.to(self.table)
        return self.table[start:stop]

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings without positions or norm, `[..., T] -> [..., T, C]`."""
        return self.tokens(tokens) * self.scale

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        return self.norm(self.embed(tokens) + self.positions(start, start + tokens.shape[-1]))
