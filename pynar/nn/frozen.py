"""Encoder and decoder frozen for inference on the CPU.

Weights are packed once; batches lose their padding (live positions are rows `[N, C]`, sentence
after sentence); the affine part of a layer normalisation is folded into the weight behind it, and
the attention's scale into the query's; keys and values of all decoder layers are one projection.
The modules take the places of `Encoder` and `Decoder` in a model, which does not see a difference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.frozen_state import FrozenCache, FrozenMemory
from pynar.nn.kept import SMALL, kept
from pynar.nn.live_rows import Rows
from pynar.nn.transformer import Decoder, Encoder, KeysValues, Memory, _Residual
from pynar.ops import PackedLayer, interval_attention, pack_linear
from pynar.ops._operator import OPERATORS
from pynar.ops.packed_layers import layer_tensors
from pynar.ops.packed_linear import ACTIVATIONS, PANEL, PackedWeight

__all__ = [
    "DTYPES",
    "FrozenCopy",
    "FrozenDecoder",
    "FrozenEncoder",
    "PackedLinear",
    "freeze_network",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class PackedLinear:
    """A linear map with its neighbours, `[N, K] -> [N, M]`: see `pynar.ops.packed_linear`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
        *,
        activation: str = "none",
        input_norm: nn.Module | None = None,
        output_norm: nn.Module | None = None,
    ) -> None:
        weight, bias = weight.detach().double(), bias.detach().double()
        input_eps = -1.0
        self.norm: tuple[Tensor, Tensor] | None = None
        output_eps = 0.0
        if isinstance(input_norm, nn.LayerNorm):
            bias = bias + weight @ input_norm.bias.detach().double()
            weight = weight * input_norm.weight.detach().double()
            input_eps = input_norm.eps
        if isinstance(output_norm, nn.LayerNorm):
            weight_of_norm, bias_of_norm = output_norm.weight.detach(), output_norm.bias.detach()
            self.norm = weight_of_norm.float().clone(), bias_of_norm.float().clone()
            output_eps = output_norm.eps
        self.packed = packed = pack_linear(weight.float(), dtype)
        self.bias = bias.float()
        # The operator's own arguments, checked here once instead of in every call.
        self._weight = packed.data, packed.scales, packed.column_sums, self.bias
        self._rest = (
            *(self.norm or (None, None)),
            packed.out_features,
            ACTIVATIONS.index(activation),
            input_eps,
            output_eps,
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return OPERATORS["packed_linear"](x, *self._weight, residual, *self._rest)

    def columns(self, begin: int, end: int) -> PackedLinear:
        """The map to outputs `begin` to `end`, whole panels; the weight is not copied."""
        if begin % PANEL or end % PANEL or self.norm is not None:
            raise ValueError(f"PackedLinear: outputs {begin} to {end} are not whole panels")
        part = copy.copy(self)
        strip = self.packed.data.shape[2]
        data = self.packed.data[begin // strip : end // strip]
        sums = self.packed.scales, self.packed.column_sums
        scales, column_sums = (x if x is None else x[begin:end] for x in sums)
        part.packed = PackedWeight(data, scales, column_sums, end - begin, self.packed.in_features)
        part.bias = self.bias[begin:end]
        part._weight = data, scales, column_sums, part.bias
        part._rest = *self._rest[:2], end - begin, *self._rest[3:]
        return part


@kept
def _kept_reads(rows: Rows, source: Rows, candidates: int) -> Tensor:
    """Intervals `[N, 1, 2]` of the source's rows, for `candidates` of every sentence."""
    return rows.each(_repeated(source.bounds, candidates))


def _repeated(bounds: Tensor, candidates: int) -> Tensor:
    return bounds if candidates == 1 else bounds.repeat_interleave(candidates, 0)


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[N, n C] -> [N, n H, D]`, without a copy."""
    return x.view(x.shape[0], heads, x.shape[1] // heads)


def _attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    """Attention of `[N, H, D]` to `[N, C]`; the scale is in the query's weight."""
    y = cast(Tensor, interval_attention(q, k, v, intervals, scale=1.0))
    return y.view(y.shape[0], y.shape[1] * y.shape[2])


def _packed_layer(layer: Any, dtype: torch.dtype) -> PackedLayer:
    """A layer of the encoder or the decoder."""
    residual, attention, feed = layer.residual, layer.self_attention, layer.feed_forward
    dim, heads = attention.output.in_features, attention.heads
    scale = torch.full((dim,), (dim // heads) ** -0.5)
    of_queries = torch.cat([scale, torch.ones(2 * dim)])
    activation = {F.relu: "relu", F.gelu: "gelu"}[feed.activation]
    maps = _sub_layer(attention.qkv, attention.output, residual[0], dtype, scale=of_queries)
    if len(residual) == 3:
        cross = layer.cross_attention
        maps += _sub_layer(cross.query, cross.output, residual[1], dtype, scale=scale)
    maps += _sub_layer(feed.inner, feed.outer, residual[-1], dtype, activation=activation)
    return PackedLayer(
        tuple(part.packed for part in maps),
        tuple(part.bias for part in maps),
        tuple(tensor for part in maps for tensor in part.norm or ()),
        heads,
        activation,
        residual[0].norm.eps,
    )


def _sub_layer(
    first: nn.Linear,
    last: nn.Linear,
    residual: _Residual,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    activation: str = "none",
) -> list[PackedLinear]:
    """The linear maps that begin and end a sub-layer, with its normalisation."""
    before, after = (residual.norm, None) if residual.norm_first else (None, residual.norm)
    weight, bias = first.weight.detach(), first.bias.detach()
    if scale is not None:
        weight, bias = weight * scale[:, None], bias * scale
    return [
        PackedLinear(weight, bias, dtype, activation=activation, input_norm=before),
        PackedLinear(last.weight, last.bias, dtype, output_norm=after),
    ]


class _Stack:
    """All layers of the encoder or the decoder in one call."""

    def __init__(self, layers: Iterable[Any], dtype: torch.dtype) -> None:
        packed = [_packed_layer(layer, dtype) for layer in layers]
        self._tensors = layer_tensors(packed)
        self._rest = len(packed), *packed[0].options()

    def __call__(
        self,
        x: Tensor,
        sees: Tensor,
        keys_values: Sequence[tuple[Tensor, Tensor]] = (),
        reads: Tensor | None = None,
        chosen: Tensor | None = None,
        content: int | None = None,
    ) -> Tensor:
        """With `chosen: [M]` the result is that of those rows; all see the first `content`."""
        keys = [pair[0] for pair in keys_values]
        values = [pair[1] for pair in keys_values]
        content = x.shape[0] if content is None else content
        return OPERATORS["packed_layers"](
            x, *self._tensors, sees, keys, values, reads, chosen, content, *self._rest
        )

    def step(
        self,
        x: Tensor,
        cache: FrozenCache,
        sees: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        reads: Tensor,
        chosen: Tensor | None,
    ) -> Tensor:
        """The same of rows that see those of earlier steps; the first ones are written down."""
        caches, slots = cache.data, cache.slots
        return OPERATORS["packed_step"](
            x, *self._tensors, sees, keys, values, reads, chosen, caches, slots, *self._rest
        )


class _Frozen(nn.Module):
    """What all frozen modules refuse: training, moving, saving."""

    def train(self, mode: bool = True) -> _Frozen:
        if mode:
            self._refuse("be trained; train the model it was made from")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        self._refuse("be moved or converted; do so before freezing")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("be saved; save the model it was made from")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"a model with weights packed for the CPU cannot {what}")


class FrozenCopy(_Frozen):
    """A copy of a network of which nothing is packed, such as LSTMs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = copy.deepcopy(network).requires_grad_(False).eval()
        self.training = False

    def project(self, states: Tensor) -> KeysValues:
        return self.network.project(states)  # type: ignore[no-any-return]

    def remember(self, states: Tensor, embedded: Tensor, lengths: Tensor) -> Memory:
        return self.network.remember(states, embedded, lengths)  # type: ignore[no-any-return]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.network(*arguments, **options)


def freeze_network(network: nn.Module, dtype: torch.dtype) -> _Frozen:
    """`Encoder` and `Decoder` with packed weights; a copy of anything else."""
    if isinstance(network, Encoder):
        return FrozenEncoder(network, dtype)
    if isinstance(network, Decoder):
        return FrozenDecoder(network, dtype)
    return FrozenCopy(network)


class FrozenEncoder(_Frozen):
    """`Encoder` with packed weights."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.stack = _Stack(encoder.layers, dtype)
        self.norm = _plain(encoder.norm)
        self.training = False

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = Rows.of(lengths, x.shape[1])
        intervals, packed = rows.own, rows.pack(x)
        groups = rows.groups()
        if len(groups) == 1:
            return rows.unpack(self._encode(packed, intervals))
        parts = [self._encode(packed[a:b], intervals[a:b] - a) for a, b in groups]
        return rows.unpack(torch.cat(parts))

    def _encode(self, h: Tensor, sees: Tensor) -> Tensor:
        h = self.stack(h, sees)
        return h if self.norm is None else self.norm(h)


class FrozenDecoder(_Frozen):
    """`Decoder` with packed weights."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.heads = decoder.dim, decoder.heads
        self.depth = len(decoder.layers)
        self.stack = _Stack(decoder.layers, dtype)
        projections = [layer.cross_attention.key_value for layer in _modules(decoder.layers)]
        weights = [projection.weight.detach() for projection in projections]
        biases = [projection.bias.detach() for projection in projections]
        self.key_value = PackedLinear(torch.cat(weights), torch.cat(biases), dtype)
        self.norm = _plain(decoder.norm)
        self.training = False

    def remember(self, states: Tensor, embedded: Tensor, lengths: Tensor) -> FrozenMemory:
        """Projects the encoder's `states: [B, S, C]` for every layer at once."""
        rows = Rows.of(lengths, states.shape[1])
        projected = self.key_value(rows.pack(states))
        shape = len(projected), 2 * self.depth, self.heads, self.dim // self.heads
        parts = projected.view(shape).unbind(1)
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        return FrozenMemory(states, embedded, lengths, rows.bounds, rows, pairs, layouts={})

    def forward(
        self,
        x: Tensor,
        memory: FrozenMemory,
        lengths: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.forward`; the last layer is computed for the wanted positions alone."""
        rows, sees, reads = self._layout(x, memory, lengths)
        packed, keys_values = rows.pack(x), memory.keys_values
        chosen = None if wanted is None else rows.chosen(wanted)
        groups = rows.groups()
        if len(groups) == 1:
            h = self._decode(packed, sees, reads, keys_values, chosen)
        else:
            parts = []
            for start, end in groups:
                here = chosen
                if chosen is not None:
                    here = chosen[(chosen >= start) & (chosen < end)] - start
                part = packed[start:end], sees[start:end] - start, reads[start:end]
                parts.append(self._decode(*part, keys_values, here))
            h = torch.cat(parts)
        return h if wanted is not None else rows.unpack(h)

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
        """As `Decoder.rows`."""
        return self._decode(x, sees, reads, keys_values, read, content)

    def _decode(
        self,
        h: Tensor,
        sees: Tensor,
        reads: Tensor,
        keys_values: KeysValues,
        chosen: Tensor | None,
        content: int | None = None,
    ) -> Tensor:
        h = self.stack(h, sees, keys_values, reads, chosen, content)
        return h if self.norm is None else self.norm(h)

    def _layout(
        self, x: Tensor, memory: FrozenMemory, lengths: Tensor | None
    ) -> tuple[Rows, Tensor, Tensor]:
        """Rows, and what they see of the target and of the source; the same in every pass."""
        known = memory.layouts if memory.layouts is not None else {}
        # The tensor itself is kept, so that its address cannot come to mean another.
        found = known.get("last")
        if found is not None and found[0] is lengths and found[1] == x.shape[:2]:
            return found[2]
        width = x.shape[1]
        full = torch.full((x.shape[0],), width) if lengths is None else lengths
        rows = Rows.of(full, width)
        sees = rows.causal() if lengths is None else rows.own
        candidates = x.shape[0] // max(len(memory.lengths), 1)
        if memory.index is None and x.shape[0] * width <= SMALL:
            reads = _kept_reads(rows, memory.source, candidates)
        else:
            reads = rows.each(_repeated(memory.bounds, candidates))
        layout = rows, sees, reads
        known["last"] = lengths, x.shape[:2], layout
        return layout

    def cache(self, rows: int, like: Tensor) -> FrozenCache:
        return FrozenCache(rows, self.depth, self.heads, self.dim)

    def step(self, x: Tensor, memory: FrozenMemory, cache: FrozenCache) -> Tensor:
        """As `Decoder.step`, `x: [B * n, R, C]`; the last layer is of the last rows alone."""
        cache.reserve()
        rows, streams, _ = x.shape
        sees, (reads, keys, values) = cache.sees, self._source_of_steps(memory, rows)
        chosen = None
        if streams > 1:  # stream after stream, as those with keys and values come first
            sees, reads = (part.repeat(streams, 1, 1) for part in (sees, reads))
            chosen = torch.arange((streams - 1) * rows, streams * rows)
        h = x.transpose(0, 1).flatten(0, 1)
        h = self.stack.step(h, cache, sees, keys, values, reads, chosen)
        cache.advance()
        return (h if self.norm is None else self.norm(h))[:, None]

    def _source_of_steps(self, memory: FrozenMemory, rows: int) -> tuple[Any, ...]:
        """Intervals `[N, 1, 2]` of the source's rows, its keys and values: the same every step."""
        known = memory.layouts if memory.layouts is not None else {}
        found = known.get("step")
        if found is None or found[0] is not memory.bounds or len(found[1][0]) != rows:
            candidates = rows // max(len(memory.lengths), 1)
            reads = _repeated(memory.bounds, candidates)[:, None]
            keys, values = ([pair[i] for pair in memory.keys_values] for i in (0, 1))
            found = known["step"] = memory.bounds, (reads, keys, values)
        return found[1]  # type: ignore[no-any-return]


def _modules(layers: Iterable[nn.Module]) -> list[Any]:
    return list(layers)


def _plain(norm: nn.Module) -> nn.Module | None:
    """A copy of the last normalisation without gradients, if there is one."""
    if not isinstance(norm, nn.LayerNorm):
        return None
    copy = nn.LayerNorm(norm.normalized_shape, norm.eps).requires_grad_(False)
    copy.load_state_dict({k: v.float() for k, v in norm.state_dict().items()})
    return copy.eval()
