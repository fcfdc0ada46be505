"""Transformer encoder and decoder (Vaswani et al. 2017), pre- or post-norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.attention import CrossAttention, SelfAttention, padding_mask

__all__ = ["Decoder", "DecoderCache", "Encoder", "FeedForward", "Memory"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass
class Memory:
    """What the decoder needs of the encoded source; computed once a sentence."""

    states: Tensor  # [B, S, C]
    embedded: Tensor  # [B, S, C], scaled token embeddings without positions
    lengths: Tensor  # [B]
    keys_values: list[tuple[Tensor, Tensor]]  # per decoder layer, [B, H, S, C / H] each

    @property
    def mask(self) -> Tensor:
        """Boolean `[B, 1, 1, S]`, true on live source positions."""
        return padding_mask(self.lengths, self.states.shape[1])

    def select(self, index: Tensor) -> Memory:
        """Keeps the sentences of `index`, as finished ones leave the batch."""
        return Memory(
            self.states[index],
            self.embedded[index],
            self.lengths[index],
            [(k[index], v[index]) for k, v in self.keys_values],
        )


class DecoderCache:
    """Keys and values of the target prefix, `[N, layers, 2, H, capacity, C / H]`.

    Rows come first so that beam search re-orders all layers with one `index_select`; the
    capacity doubles, so that a position is copied a constant number of times on average.
    """

    def __init__(self, rows: int, layers: int, heads: int, dim: int, like: Tensor) -> None:
        self.position = 0
        self.data = like.new_empty(rows, layers, 2, heads, 16, dim // heads)

    def reserve(self) -> None:
        if self.position == self.data.shape[-2]:
            self.data = torch.cat([self.data, torch.empty_like(self.data)], dim=-2)

    def select(self, index: Tensor) -> None:
        self.data = self.data.index_select(0, index)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.activation(self.inner(x)))


class _Residual(nn.Module):
    """Adds a sub-layer's dropped-out result, with layer normalisation before or after it."""

    def __init__(self, dim: int, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.norm_first = norm_first

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


class _EncoderLayer(nn.Module):
    def __init__(
        self, dim: int, hidden: int, heads: int, dropout: float, norm_first: bool, activation: str
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.feed_forward = FeedForward(dim, hidden, activation)
        self.residual = nn.ModuleList(_Residual(dim, dropout, norm_first) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.residual[0](x, lambda h: self.self_attention(h, mask))
        return self.residual[1](x, self.feed_forward)


class _DecoderLayer(nn.Module):
    def __init__(
        self, dim: int, hidden: int, heads: int, dropout: float, norm_first: bool, activation: str
    ) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.cross_attention = CrossAttention(dim, heads)
        self.feed_forward = FeedForward(dim, hidden, activation)
        self.residual = nn.ModuleList(_Residual(dim, dropout, norm_first) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        attend: Callable[[Tensor], Tensor],
        keys_values: tuple[Tensor, Tensor],
        memory_mask: Tensor,
    ) -> Tensor:
        x = self.residual[0](x, attend)
        x = self.residual[1](x, lambda h: self.cross_attention(h, keys_values, memory_mask))
        return self.residual[2](x, self.feed_forward)


class Encoder(nn.Module):
    """A stack of self-attention layers, `[B, S, C] -> [B, S, C]`."""

    def __init__(
        self,
        layers: int,
        dim: int,
        hidden: int,
        heads: int,
        *,
        dropout: float,
        norm: str,
        activation: str,
    ) -> None:
        super().__init__()
        first = norm == "pre"
        self.layers = nn.ModuleList(
            _EncoderLayer(dim, hidden, heads, dropout, first, activation) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim) if first else nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = padding_mask(lengths, x.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of layers over target states and the memory: causal, bidirectional or stepwise."""

    def __init__(
        self,
        layers: int,
        dim: int,
        hidden: int,
        heads: int,
        *,
        dropout: float,
        norm: str,
        activation: str,
    ) -> None:
        super().__init__()
        first = norm == "pre"
        self.dim, self.heads = dim, heads
        self.layers = nn.ModuleList(
            _DecoderLayer(dim, hidden, heads, dropout, first, activation) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim) if first else nn.Identity()

    def project(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's cross-attention keys and values of the encoder's `states`."""
        return [layer.cross_attention.project(states) for layer in self._stack()]

    def _stack(self) -> list[_DecoderLayer]:
        return cast("list[_DecoderLayer]", self.layers)

    def forward(
        self,
        x: Tensor,
        memory: Memory,
        lengths: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Decodes `x: [B * n, T, C]`: bidirectionally within `lengths: [B * n]`, causally if None.

        Right padding needs no mask under causal attention: live rows never see it. With boolean
        `wanted: [B * n, T]` only the states of those positions are returned, `[N, C]`.
        """
        mask = None if lengths is None else padding_mask(lengths, x.shape[1])
        memory_mask = memory.mask
        for layer, keys_values in zip(self._stack(), memory.keys_values, strict=True):
            attention = layer.self_attention

            def attend(h: Tensor, attention: SelfAttention = attention) -> Tensor:
                return attention(h, mask, causal=lengths is None)

            x = layer(x, attend, keys_values, memory_mask)
        return self.norm(x if wanted is None else x[wanted])

    def remember(self, states: Tensor, embedded: Tensor, lengths: Tensor) -> Memory:
        """What decoding needs of the encoder's `states: [B, S, C]`, projected for every layer."""
        return Memory(states, embedded, lengths, self.project(states))

    def cache(self, rows: int, like: Tensor) -> DecoderCache:
        return DecoderCache(rows, len(self.layers), self.heads, self.dim, like)

    def step(self, x: Tensor, memory: Memory, cache: DecoderCache) -> Tensor:
        """Decodes the next position `x: [B * n, 1, C]` of every row and advances the cache."""
        cache.reserve()
        memory_mask = memory.mask
        for index, (layer, keys_values) in enumerate(
            zip(self._stack(), memory.keys_values, strict=True)
        ):
            attention, slots = layer.self_attention, cache.data[:, index]

            def attend(
                h: Tensor, attention: SelfAttention = attention, slots: Tensor = slots
            ) -> Tensor:
                return attention.step(h, slots, cache.position)

            x = layer(x, attend, keys_values, memory_mask)
        cache.position += 1
        return self.norm(x)
