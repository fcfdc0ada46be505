"""A Transformer layer with weights packed for the CPU kernels."""

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

__all__ = ["PackedLayer", "packed_layer"]


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

    def tensors(self) -> tuple[list[Tensor], ...]:
        """The operator's arguments from `weights` to `norms`."""
        scales = [w.scales for w in self.weights if w.scales is not None]
        sums = [w.column_sums for w in self.weights if w.column_sums is not None]
        data = [w.data for w in self.weights]
        return data, scales, sums, list(self.biases), list(self.norms)


def packed_layer(
    x: Tensor,
    layer: PackedLayer,
    intervals: Tensor,
    *,
    memory: tuple[Tensor, Tensor, Tensor] | None = None,
    chosen: Tensor | None = None,
    content: int | None = None,
) -> Tensor:
    r"""A Transformer layer (Vaswani et al. 2017) on packed rows, for inference on the CPU.

    The sub-layers f are self-attention, cross-attention if there is a `memory`, and the
    feed-forward network; one after the other they do

    .. math:: h \leftarrow \mathrm{LayerNorm}(h + f(h)) \quad\text{or}\quad
              h \leftarrow h + f(\mathrm{LayerNorm}(h)).

    They are calls of :func:`packed_linear` and :func:`interval_attention` with all their
    properties, to the last bit: nothing depends on batch mates or threads. What is saved are the
    ways back to Python between them. Not differentiable.

    Args:
        x: `[N, C]`, float32: the rows of all sentences, without padding.
        layer: the weights.
        intervals: `[N, R, 2]`, int32, which rows of `x` a row attends to.
        memory: keys and values `[S, H, D]` for cross-attention, and `[N, R, 2]`, which of them a
            row attends to.
        chosen: `[M]`, int64, the rows whose results are wanted; all if None.
        content: only so many rows, the first ones, have keys and values; all if None.

    Returns:
        `[N, C]`, or `[M, C]` with `chosen`.
    """
    check = Check("packed_layer")
    if not isinstance(layer, PackedLayer):
        check.fail("layer", "be a PackedLayer", type(layer).__name__)
    if layer.activation not in ACTIVATIONS:
        check.fail("activation", f"be one of {', '.join(ACTIVATIONS)}", layer.activation)
    if not layer.eps >= 0:
        check.fail("eps", "be at least 0", layer.eps)
    tensors = [[tensor.detach() for tensor in part] for part in layer.tensors()]
    keys, values, sees = memory or (None, None, None)
    if keys is not None and values is not None:
        keys, values = keys.detach(), values.detach()
    return _OPERATOR(
        x.detach(),
        *tensors,
        intervals,
        keys,
        values,
        sees,
        chosen,
        (x.shape[0] if x.dim() else 0) if content is None else content,
        layer.heads,
        ACTIVATIONS.index(layer.activation),
        layer.eps,
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
    keys: Tensor | None,
    values: Tensor | None,
    memory_intervals: Tensor | None,
    chosen: Tensor | None,
    content: int,
    heads: int,
    activation: int,
    eps: float,
) -> Tensor:
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    intervals = readable(intervals)
    if keys is not None and values is not None and memory_intervals is not None:
        keys, values, memory_intervals = map(readable, (keys, values, memory_intervals))
    rows = (x if chosen is None else chosen).shape[:1]
    y = x.new_empty(*rows, x.shape[-1] if x.dim() else 0)
    extension.packed_layer(
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
        content,
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
    keys: Tensor | None,
    values: Tensor | None,
    memory_intervals: Tensor | None,
    chosen: Tensor | None,
    content: int,
    heads: int,
    activation: int,
    eps: float,
) -> Tensor:
    crosses = keys is not None
    _check_layer(x, data, scales, column_sums, biases, norms, heads, crosses)
    check = Check("packed_layer")
    if not 0 <= activation < len(ACTIVATIONS):
        Check("packed_linear").fail("activation", f"be in [0, {len(ACTIVATIONS) - 1}]", activation)
    memory = None
    if keys is None or values is None or memory_intervals is None:
        for name, tensor in (("values", values), ("memory_intervals", memory_intervals)):
            if (tensor is None) == crosses:
                got = "None" if crosses else "it alone"
                check.fail(name, "be given with `keys`, and only then", got)
    else:
        memory = keys, values, memory_intervals
        _check_intervals(check, "memory_intervals", memory_intervals, len(x))
        check_attention(
            Check("interval_attention"), x.unflatten(1, (heads, -1)), keys, values, memory_intervals
        )
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
    shapes = _maps(x.shape[1], len(biases[-2]), crosses, _is_bare(len(data), crosses))
    weights = [
        PackedWeight(part, *sums, *shape).unpack()
        for part, sums, shape in zip(
            data, _sums(scales, column_sums, len(data)), shapes, strict=True
        )
    ]
    return reference.packed_layer(
        x,
        weights,
        biases,
        norms,
        data[0].dtype,
        intervals,
        memory,
        chosen,
        content,
        heads,
        ACTIVATIONS[activation],
        eps,
    )


def _maps(dim: int, hidden: int, crosses: bool, bare: bool) -> list[tuple[int, int]]:
    """Outputs and inputs of each linear map; `bare` attention has none behind it."""
    outputs = [] if bare else [(dim, dim)]
    attention = [(3 * dim, dim), *outputs] + crosses * [(dim, dim), *outputs]
    return [*attention, (hidden, dim), (dim, hidden)]


def _is_bare(maps: int, crosses: bool) -> bool:
    return maps == (4 if crosses else 3)


def _sums(
    scales: Sequence[Tensor], column_sums: Sequence[Tensor], maps: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    return list(zip(scales, column_sums, strict=True)) if scales else [(None, None)] * maps


def _check_layer(
    x: Tensor,
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    column_sums: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    heads: int,
    crosses: bool,
) -> None:
    check, linear = Check("packed_layer"), Check("packed_linear")
    check.dims("x", x, 2, "[N, C]")
    check.dtype("x", x, (torch.float32,))
    check.cpu("x", x)
    dim = x.shape[1]
    if heads < 1 or dim % heads:
        check.fail("heads", f"divide the channels of `x` ({dim})", heads)
    parts, bare = (3 if crosses else 2), _is_bare(len(data), crosses)
    maps = parts + 1 if bare else 2 * parts
    each = "one for each linear map"
    sub_layers = "weight and bias for each sub-layer, or none"
    for name, tensors, meaning, count, needed in (
        ("weights", data, each, maps, True),
        ("biases", biases, each, maps, True),
        ("scales", scales, f"{each}, or none", maps, bool(scales or column_sums)),
        ("column_sums", column_sums, f"{each}, or none", maps, bool(scales or column_sums)),
        ("norms", norms, sub_layers, 2 * parts, bool(norms)),
    ):
        if needed and len(tensors) != count:
            check.fail(name, f"have {count} tensors ({meaning})", len(tensors))
    check.dims("biases", biases[-2], 1, "[F]")
    shapes = _maps(dim, len(biases[-2]), crosses, bare)
    for bias, (columns, _) in zip(biases, shapes, strict=True):
        check.shape("biases", bias, [columns], "3 C, then C each, F and C")
    for part, sums, (columns, depth) in zip(
        data, _sums(scales, column_sums, maps), shapes, strict=True
    ):
        check_packed(linear, part, *sums, depth, columns)
    for norm in norms:
        check.shape("norms", norm, [dim], "channels of `x`")


def _check_intervals(check: Check, name: str, intervals: Tensor, rows: int) -> None:
    check.dims(name, intervals, 3, "[N, R, 2]")
    check.shape(name, intervals, [rows, intervals.shape[1], 2], "rows of `x`, R, begin and end")
    check.dtype(name, intervals, (torch.int32,))


def _fake(x: Tensor, *rest: Any) -> Tensor:
    chosen = rest[9]
    return x.new_empty(x.shape[0] if chosen is None else chosen.shape[0], x.shape[1])


_OPERATOR = Operator(
    "packed_layer(Tensor x, Tensor[] data, Tensor[] scales, Tensor[] column_sums, "
    "Tensor[] biases, Tensor[] norms, Tensor intervals, Tensor? keys, Tensor? values, "
    "Tensor? memory_intervals, Tensor? chosen, int content, int heads, int activation, "
    "float eps) -> Tensor",
    native=_native,
    reference=_reference,
    fake=_fake,
    cpu_only="packed weights are for CPUs",
)
