"""Transformer layers with weights packed for the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pynar import reference
from pynar.ops._checks import Check
from pynar.ops._operator import Operator
from pynar.ops.interval_attention import _check as check_attention
from pynar.ops.interval_attention import _readable as readable
from pynar.ops.packed_linear import ACTIVATIONS, PackedWeight, check_packed

__all__ = ["PackedLayer", "packed_layers", "packed_step"]


@dataclass(frozen=True)
class PackedLayer:
    """The weights of a Transformer layer, all packed in one type.

    Its linear maps are, in order: self-attention's queries, keys and values `[3 C, C]` and output
    `[C, C]`; cross-attention's queries and output, if there is one; the feed-forward network's
    `[F, C]` and `[C, F]`. The scale of the scores belongs into the queries' weights. The output
    maps may be missing, both of them: attention then ends without one (FlowSeq's couplings).

    `norms` are weight and bias of the layer normalisation after each sub-layer; without them each
    sub-layer begins with one, whose weight and bias belong into the map behind it.
    """

    weights: tuple[PackedWeight, ...]
    biases: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    heads: int
    activation: str
    eps: float

    def options(self) -> tuple[int, int, float]:
        """The operator's last arguments, `heads`, `activation` and `eps`."""
        return self.heads, ACTIVATIONS.index(self.activation), self.eps


def layer_tensors(layers: Sequence[PackedLayer]) -> tuple[list[Tensor], ...]:
    """The operator's arguments from `data` to `norms`."""
    weights = [weight for layer in layers for weight in layer.weights]
    return (
        [w.data for w in weights],
        [w.scales for w in weights if w.scales is not None],
        [w.column_sums for w in weights if w.column_sums is not None],
        [bias for layer in layers for bias in layer.biases],
        [norm for layer in layers for norm in layer.norms],
    )


def packed_layers(
    x: Tensor,
    layers: Sequence[PackedLayer],
    intervals: Tensor,
    *,
    memory: tuple[Sequence[Tensor], Sequence[Tensor], Tensor] | None = None,
    chosen: Tensor | None = None,
    content: int | None = None,
) -> Tensor:
    r"""Transformer layers (Vaswani et al. 2017) on packed rows, for inference on the CPU.

    The sub-layers f are self-attention, cross-attention if there is a `memory`, and the
    feed-forward network; one after the other they do

    .. math:: h \leftarrow \mathrm{LayerNorm}(h + f(h)) \quad\text{or}\quad
              h \leftarrow h + f(\mathrm{LayerNorm}(h)).

    They are calls of :func:`packed_linear` and :func:`interval_attention` with all their
    properties, to the last bit: nothing depends on batch mates or threads. What is saved are the
    ways back to Python between them. Not differentiable.

    Args:
        x: `[N, C]`, float32: the rows of all sentences, without padding.
        layers: the weights, one after the other, of layers that are alike but for them.
        intervals: `[N, R, 2]`, int32, which rows of `x` a row attends to.
        memory: keys and values `[S, H, D]` of each layer for cross-attention, and `[N, R, 2]`,
            which of them a row attends to.
        chosen: `[M]`, int64, the rows whose results are wanted; all if None.
        content: only so many rows, the first ones, have keys and values; all if None.

    Returns:
        `[N, C]`, or `[M, C]` with `chosen`.
    """
    tensors, keys, values, sees = _arguments("packed_layers", layers, memory)
    return _OPERATOR(
        x.detach(),
        *tensors,
        intervals,
        keys,
        values,
        sees,
        chosen,
        (x.shape[0] if x.dim() else 0) if content is None else content,
        len(layers),
        *layers[0].options(),
    )


def packed_step(
    x: Tensor,
    layers: Sequence[PackedLayer],
    intervals: Tensor,
    caches: Sequence[Tensor],
    slots: Tensor,
    *,
    memory: tuple[Sequence[Tensor], Sequence[Tensor], Tensor] | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """As :func:`packed_layers`, attending to keys and values of earlier calls, too.

    In every layer the first rows of `x` write their keys and values into the cache, before any row
    attends to it: a step of left-to-right decoding.

    Args:
        x: `[N, C]`, float32.
        layers: as in `packed_layers`.
        intervals: `[N, R, 2]`, int32, which of the cache's rows, places one after the other, a row
            attends to.
        caches: one a layer, `[places, capacity, 2 H, D]`, float32: keys, then values.
        slots: `[content]`, int64, all different: the cache's rows that the first `content` rows of
            `x` write.
        memory: as in `packed_layers`.
        chosen: as in `packed_layers`.

    Returns:
        `[N, C]`, or `[M, C]` with `chosen`; `caches` are written to.
    """
    if slots.dim() == 1 and x.dim() == 2 and len(slots) > len(x):
        Check("packed_step").fail("slots", f"have at most {len(x)} elements", len(slots))
    tensors, keys, values, sees = _arguments("packed_step", layers, memory)
    return _STEP(
        x.detach(),
        *tensors,
        intervals,
        keys,
        values,
        sees,
        chosen,
        list(caches),
        slots,
        len(layers),
        *layers[0].options(),
    )


def _arguments(
    operator: str,
    layers: Sequence[PackedLayer],
    memory: tuple[Sequence[Tensor], Sequence[Tensor], Tensor] | None,
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], Tensor | None]:
    check = Check(operator)
    if not layers:
        check.fail("layers", "have at least one layer", "none")
    for layer in layers:
        if not isinstance(layer, PackedLayer):
            check.fail("layers", "be PackedLayers", type(layer).__name__)
        if layer.activation not in ACTIVATIONS:
            check.fail("activation", f"be one of {', '.join(ACTIVATIONS)}", layer.activation)
        if not layer.eps >= 0:
            check.fail("eps", "be at least 0", layer.eps)
        for name in ("heads", "activation", "eps"):
            of_this, of_first = getattr(layer, name), getattr(layers[0], name)
            if of_this != of_first:
                check.fail(name, f"be the same in all layers ({of_first})", of_this)
    keys, values, sees = memory or ((), (), None)
    return (
        [[tensor.detach() for tensor in part] for part in layer_tensors(layers)],
        [part.detach() for part in keys],
        [part.detach() for part in values],
        sees,
    )


def _native(
    extension: Any,
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    column_sums: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    intervals: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    memory_intervals: Tensor | None,
    chosen: Tensor | None,
    content: int,
    layers: int,
    heads: int,
    activation: int,
    eps: float,
    caches: Sequence[Tensor] = (),
    slots: Tensor | None = None,
) -> Tensor:
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    intervals = readable(intervals)
    keys, values = [readable(part) for part in keys], [readable(part) for part in values]
    if memory_intervals is not None:
        memory_intervals = readable(memory_intervals)
    rows = (x if chosen is None else chosen).shape[:1]
    y = x.new_empty(*rows, x.shape[-1] if x.dim() else 0)
    extension.packed_layers(
        x,
        data,
        scales,
        column_sums,
        biases,
        norms,
        intervals,
        keys,
        values,
        memory_intervals,
        chosen,
        caches,
        slots,
        content,
        layers,
        heads,
        activation,
        eps,
        y,
    )
    return y


def _reference(
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    column_sums: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    intervals: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    memory_intervals: Tensor | None,
    chosen: Tensor | None,
    content: int,
    layers: int,
    heads: int,
    activation: int,
    eps: float,
    caches: Sequence[Tensor] = (),
    slots: Tensor | None = None,
) -> Tensor:
    check = Check("packed_layers" if slots is None else "packed_step")
    if layers < 1:
        check.fail("layers", "be at least 1", layers)
    crosses = len(keys) > 0
    _check_layers(check, x, data, scales, column_sums, biases, norms, layers, heads, crosses)
    if not 0 <= activation < len(ACTIVATIONS):
        Check("packed_linear").fail("activation", f"be in [0, {len(ACTIVATIONS) - 1}]", activation)
    for name, tensors, count, meaning in (
        ("keys", keys, layers, "one for each layer, or none"),
        ("values", values, len(keys), "one for each of `keys`"),
    ):
        if (crosses or name == "values") and len(tensors) != count:
            check.fail(name, f"have {count} tensors ({meaning})", len(tensors))
    if (memory_intervals is None) == crosses:
        got = "None" if crosses else "it alone"
        check.fail("memory_intervals", "be given with `keys`, and only then", got)
    if memory_intervals is not None:
        _check_intervals(check, "memory_intervals", memory_intervals, len(x))
        for pair in zip(keys, values, strict=True):
            q = x.unflatten(1, (heads, -1))
            check_attention(Check("interval_attention"), q, *pair, memory_intervals)
    _check_intervals(check, "intervals", intervals, len(x))
    if not 0 <= content <= len(x):
        check.fail("content", f"be in [0, {len(x)}]", content)
    if chosen is not None:
        check.dims("chosen", chosen, 1, "[M]")
        check.dtype("chosen", chosen, (torch.int64,))
        check.device("chosen", chosen, "x", x)
        outside = chosen[(chosen < 0) | (chosen >= len(x))]
        if len(outside):
            check.fail("chosen", f"lie in [0, {len(x)})", int(outside[0]))
    if caches:
        _check_caches(check, x, caches, slots, content, layers, heads)
    shapes = _maps(x.shape[1], len(biases[-2]), crosses, _is_bare(len(data) // layers, crosses))
    maps, parts = len(data) // layers, len(norms) // layers
    sums = _sums(scales, column_sums, len(data))
    for index in range(layers):
        own = slice(index * maps, (index + 1) * maps)
        weights = [
            PackedWeight(part, *pair, *shape).unpack()
            for part, pair, shape in zip(data[own], sums[own], shapes, strict=True)
        ]
        memory = None
        if memory_intervals is not None:
            memory = keys[index], values[index], memory_intervals
        x = reference.packed_layer(
            x,
            weights,
            biases[own],
            norms[index * parts : (index + 1) * parts],
            data[0].dtype,
            intervals,
            memory,
            chosen if index + 1 == layers else None,
            content,
            heads,
            ACTIVATIONS[activation],
            eps,
            caches[index] if caches else None,
            slots,
        )
    return x


# A step's arguments come in another order: all tensors first, as its schema has it.
def _native_step(extension: Any, *arguments: Any) -> Tensor:
    caches, slots = arguments[11:13]
    content = slots.shape[0] if slots.dim() else 0
    given = (*arguments[:11], content, *arguments[13:], caches, slots.contiguous())
    return _native(extension, *given)


def _reference_step(*arguments: Any) -> Tensor:
    caches, slots = arguments[11:13]
    content = slots.shape[0] if slots.dim() else 0
    given = (*arguments[:11], content, *arguments[13:], caches, slots)
    return _reference(*given)


def _maps(dim: int, hidden: int, crosses: bool, bare: bool) -> list[tuple[int, int]]:
    """Outputs and inputs of each linear map; `bare` attention has none behind it."""
    outputs = [] if bare else [(dim, dim)]
    attention = [(3 * dim, dim), *outputs] + crosses * [(dim, dim), *outputs]
    return [*attention, (hidden, dim), (dim, hidden)]


def _is_bare(maps: float, crosses: bool) -> bool:
    return maps == (4 if crosses else 3)


def _sums(
    scales: Sequence[Tensor], column_sums: Sequence[Tensor], maps: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    return list(zip(scales, column_sums, strict=True)) if scales else [(None, None)] * maps


def _check_layers(
    check: Check,
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    column_sums: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    layers: int,
    heads: int,
    crosses: bool,
) -> None:
    linear = Check("packed_linear")
    check.dims("x", x, 2, "[N, C]")
    check.dtype("x", x, (torch.float32,))
    check.cpu("x", x)
    dim = x.shape[1]
    if heads < 1 or dim % heads:
        check.fail("heads", f"divide the channels of `x` ({dim})", heads)
    parts, bare = (3 if crosses else 2), _is_bare(len(data) / layers, crosses)
    maps = (parts + 1 if bare else 2 * parts) * layers
    each = "one for each linear map"
    sub_layers = "weight and bias for each sub-layer, or none"
    for name, tensors, meaning, count, needed in (
        ("weights", data, each, maps, True),
        ("biases", biases, each, maps, True),
        ("scales", scales, f"{each}, or none", maps, bool(scales or column_sums)),
        ("column_sums", column_sums, f"{each}, or none", maps, bool(scales or column_sums)),
        ("norms", norms, sub_layers, 2 * parts * layers, bool(norms)),
    ):
        if needed and len(tensors) != count:
            check.fail(name, f"have {count} tensors ({meaning})", len(tensors))
    check.dims("biases", biases[-2], 1, "[F]")
    shapes = _maps(dim, len(biases[-2]), crosses, bare) * layers
    for bias, (columns, _) in zip(biases, shapes, strict=True):
        check.shape("biases", bias, [columns], "3 C, then C each, F and C")
    for part, sums, (columns, depth) in zip(
        data, _sums(scales, column_sums, maps), shapes, strict=True
    ):
        check_packed(linear, part, *sums, depth, columns)
    for norm in norms:
        check.shape("norms", norm, [dim], "channels of `x`")


def _check_caches(
    check: Check,
    x: Tensor,
    caches: Sequence[Tensor],
    slots: Tensor | None,
    content: int,
    layers: int,
    heads: int,
) -> None:
    if len(caches) != layers:
        check.fail("caches", f"have {layers} tensors (one for each layer, or none)", len(caches))
    places, capacity = [*caches[0].shape[:2], 0, 0][:2]
    for cache in caches:
        shape = [places, capacity, 2 * heads, x.shape[1] // heads]
        check.shape("caches", cache, shape, "places, capacity, 2 H, D")
        check.dtype("caches", cache, (torch.float32,))
        check.cpu("caches", cache)
        if not cache.is_contiguous():
            check.fail("caches", "be contiguous", "a strided view")
    if slots is None:
        check.fail("slots", "be given with `caches`", "None")
    check.shape("slots", slots, [content], "rows with keys and values")
    check.dtype("slots", slots, (torch.int64,))
    check.device("slots", slots, "x", x)
    outside = slots[(slots < 0) | (slots >= places * capacity)]
    if len(outside):
        check.fail("slots", f"lie in [0, {places * capacity})", int(outside[0]))


def _check_intervals(check: Check, name: str, intervals: Tensor, rows: int) -> None:
    check.dims(name, intervals, 3, "[N, R, 2]")
    check.shape(name, intervals, [rows, intervals.shape[1], 2], "rows of `x`, R, begin and end")
    check.dtype(name, intervals, (torch.int32,))


def _fake(x: Tensor, *rest: Any) -> Tensor:
    chosen = rest[9]
    return x.new_empty(x.shape[0] if chosen is None else chosen.shape[0], x.shape[1])


_OPERATOR = Operator(
    "packed_layers(Tensor x, Tensor[] data, Tensor[] scales, Tensor[] column_sums, "
    "Tensor[] biases, Tensor[] norms, Tensor intervals, Tensor[] keys, Tensor[] values, "
    "Tensor? memory_intervals, Tensor? chosen, int content, int layers, int heads, "
    "int activation, float eps) -> Tensor",
    native=_native,
    reference=_reference,
    fake=_fake,
    cpu_only="packed weights are for CPUs",
)

_STEP = Operator(
    "packed_step(Tensor x, Tensor[] data, Tensor[] scales, Tensor[] column_sums, "
    "Tensor[] biases, Tensor[] norms, Tensor intervals, Tensor[] keys, Tensor[] values, "
    "Tensor? memory_intervals, Tensor? chosen, Tensor(a!)[] caches, Tensor slots, int layers, "
    "int heads, int activation, float eps) -> Tensor",
    native=_native_step,
    reference=_reference_step,
    fake=_fake,
    cpu_only="packed weights are for CPUs",
)
