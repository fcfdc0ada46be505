"""Transformer encoder and decoder (Vaswani et al. 2017), pre- or post-norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.attention import CrossAttention, SelfAttention, padding_mask
from pynar.nn.dropout import Dropout
from pynar.ops.interval_attention import interval_attention

__all__ = ["Decoder", "DecoderCache", "Encoder", "FeedForward", "KeysValues", "Memory"]

KeysValues = list[tuple[Tensor, Tensor]]

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

    def rows(self) -> tuple[KeysValues, Tensor]:
        """Keys and values as rows `[B * S, H, D]`, and the live ones of each sentence `[B, 2]`."""
        start = torch.arange(len(self.lengths), device=self.lengths.device) * self.states.shape[1]
        flat = [
            (k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))
            for k, v in self.keys_values
        ]
        return flat, torch.stack([start, start + self.lengths], 1).int()

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


def _attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    """Attention of rows `q: [N, C]` to rows `k`, `v: [M, H, D]` in their `intervals: [N, R, 2]`."""
    y = cast(Tensor, interval_attention(q.unflatten(-1, k.shape[-2:]), k, v, intervals))
    return y.flatten(-2)


def _self_attend(
    attention: SelfAttention, x: Tensor, intervals: Tensor, content: int, read: Tensor | None
) -> Tensor:
    """Self-attention of packed rows `x: [N, C]` to the first `content` of them.

    Only these have keys and values. With `read: [M]` the result is that of those rows alone.
    """
    dim = x.shape[-1]
    weight, key_value_weight = attention.qkv.weight.split([dim, 2 * dim])
    bias, key_value_bias = attention.qkv.bias.split([dim, 2 * dim])
    keys_values = F.linear(x[:content], key_value_weight, key_value_bias)
    k, v = keys_values.unflatten(-1, (2, attention.heads, -1)).unbind(1)
    q = F.linear(x if read is None else x[read], weight, bias)
    return attention.output(_attend(q, k, v, intervals))


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
        self.dropout = Dropout(dropout)
        self.norm_first = norm_first

    def forward(
        self, x: Tensor, sublayer: Callable[[Tensor], Tensor], read: Tensor | None = None
    ) -> Tensor:
        """With `read` the sub-layer gives the results of those rows alone, and they go on."""
        kept = x if read is None else x[read]
        if self.norm_first:
            return kept + self.dropout(sublayer(self.norm(x)))
        return self.norm(kept + self.dropout(sublayer(x)))


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

    def rows(self, x: Tensor, intervals: Tensor) -> Tensor:
        """Encodes packed rows `x: [N, C]`, each of which sees the rows of its interval.

        `intervals: [N, 1, 2]` hold the sentence of every row; no row is padding.
        """
        for layer in cast("list[_EncoderLayer]", self.layers):
            attention = layer.self_attention

            def attend(h: Tensor, attention: SelfAttention = attention) -> Tensor:
                return _self_attend(attention, h, intervals, len(h), None)

            x = layer.residual[1](layer.residual[0](x, attend), layer.feed_forward)
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

    def project_rows(self, states: Tensor) -> KeysValues:
        """As `project`, of packed rows `states: [N, C]`: keys and values `[N, H, D]`."""
        return [(k.transpose(0, 1), v.transpose(0, 1)) for k, v in self.project(states)]

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

    def rows(
        self,
        x: Tensor,
        keys_values: KeysValues,
        *,
        sees: Tensor,
        reads: Tensor,
        content: int,
        read: Tensor | None = None,
    ) -> Tensor:
        """Decodes packed rows `x: [N, C]` of any sentences and streams; none is padding.

        The first `content` rows have keys and values; the others, queries, only look. All rows
        share the weights, and each has its own residual path.

        Args:
            keys_values: of every layer, the source's rows, `[S, H, D]` each.
            sees: `[N, R, 2]`, which content rows a row sees.
            reads: `[N, 1, 2]`, which source rows.
            read: `[M]`, the rows that are wanted; the last layer is computed for them alone.

        Returns:
            `[N, C]`, or `[M, C]`.
        """
        last = len(self.layers) - 1
        for index, (layer, (k, v)) in enumerate(zip(self._stack(), keys_values, strict=True)):
            here = read if index == last else None
            if here is not None:
                sees, reads = sees[here], reads[here]
            attention, cross = layer.self_attention, layer.cross_attention

            def attend(
                h: Tensor,
                attention: SelfAttention = attention,
                sees: Tensor = sees,
                here: Tensor | None = here,
            ) -> Tensor:
                return _self_attend(attention, h, sees, content, here)

            def look(
                h: Tensor,
                cross: CrossAttention = cross,
                k: Tensor = k,
                v: Tensor = v,
                reads: Tensor = reads,
            ) -> Tensor:
                return cross.output(_attend(cross.query(h), k, v, reads))

            x = layer.residual[0](x, attend, here)
            x = layer.residual[2](layer.residual[1](x, look), layer.feed_forward)
        return self.norm(x)

    def cache(self, rows: int, like: Tensor) -> DecoderCache:
        return DecoderCache(rows, len(self.layers), self.heads, self.dim, like)

    def step(self, x: Tensor, memory: Memory, cache: DecoderCache) -> Tensor:
        """Decodes the next position of every row, `x: [B * n, R, C]`, and advances the cache.

        All R see what came before and the first of them, which alone has a key and a value: a
        second one is the query of two-stream models. Returns the last one's states,
        `[B * n, 1, C]`.
        """
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
        return self.norm(x[:, -1:])
