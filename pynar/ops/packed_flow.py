"""The maps of a flow's level with weights packed for the CPU kernels."""

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
from pynar.ops.packed_layers import PackedLayer
from pynar.ops.packed_linear import PANEL, PackedWeight, strip_columns

__all__ = ["PackedActNorm", "PackedCoupling", "PackedFlowLinear", "PackedPositions", "packed_flow"]

SPLITS = ("features", "alternate", "steps")
_BY_POSITION = 9  # the first kind of those couplings
_LAYOUTS = ("contiguous", "strided")


@dataclass(frozen=True)
class PackedActNorm:
    """`log_scale` and `bias: [C]` of :func:`pynar.ops.actnorm`."""

    log_scale: Tensor
    bias: Tensor

    @property
    def logdet(self) -> float:
        """Of a row, forward."""
        return float(self.log_scale.double().sum())


@dataclass(frozen=True)
class PackedFlowLinear:
    """One step of :func:`pynar.ops.flow_linear`: actnorm and the matrix `[d, d]` of all heads.

    `inverse` and `log_abs_det` are those of the matrix, see :func:`pynar.ops.batched_logdet`.
    """

    log_scale: Tensor  # [C]
    bias: Tensor  # [C]
    weight: Tensor
    inverse: Tensor
    log_abs_det: float
    layout: str  # "contiguous" or "strided"

    @property
    def logdet(self) -> float:
        """Of a row, forward."""
        heads = len(self.bias) // len(self.weight)
        return float(self.log_scale.double().sum()) + heads * self.log_abs_det


@dataclass(frozen=True)
class PackedPositions:
    """Attention by which positions ask for states: a coupling's input is LayerNorm(p + found).

    `weights` are those of keys and values `[2 W, W]` and of queries `[W, W]`, which have the scale
    in them, and `norm` is weight and bias of the normalisation.
    """

    weights: tuple[PackedWeight, PackedWeight]
    biases: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PackedCoupling:
    """An affine coupling: `layer` and `output: [2 W, W]` make shift and scale of the half given.

    The layer is one of relu, with normalisations behind its sub-layers and attention without
    output maps. The halves are the first and last channels ("features"), even and odd channels
    ("alternate"), or even and odd rows ("steps"); `up`, the first half decides about the second.
    Positions are added to the half given; with `positions`, and halves by "features", they gather
    from it what goes into the layer.
    """

    layer: PackedLayer
    output: PackedWeight
    output_bias: Tensor
    split: str
    up: bool
    positions: PackedPositions | None = None

    logdet = 0.0  # it depends on the rows


FlowMap = PackedActNorm | PackedFlowLinear | PackedCoupling
RowsOf = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class FlowTensors:
    """What the operator wants of maps: their kinds, and one tensor of each sort for all of them."""

    kinds: list[int]
    linear: dict[bool, Tensor]  # by direction
    weights: list[Tensor]  # from `weights` to `norms`
    options: tuple[int, int, int, float]  # from `heads` to `eps`

    @staticmethod
    def of(maps: Sequence[FlowMap]) -> FlowTensors:
        return FlowTensors.each(maps)[0]

    @staticmethod
    def each(maps: Sequence[FlowMap]) -> tuple[FlowTensors, list[FlowTensors]]:
        """Of all maps, and of each alone; these are views."""
        couplings = [one for one in maps if isinstance(one, PackedCoupling)]
        steps = [one for one in maps if isinstance(one, PackedFlowLinear)]
        dtype = couplings[0].output.data.dtype if couplings else torch.float32
        layer = couplings[0].layer if couplings else None
        options = (
            layer.heads if layer else 1,
            len(layer.biases[2]) if layer else 1,
            len(steps[0].weight) if steps else 1,
            layer.eps if layer else 0.0,
        )
        kinds = [_kind(one) for one in maps]
        fp32 = torch.float32
        types = (fp32, fp32, dtype, fp32, torch.int32, fp32, fp32)
        parts = [list(map(_join, _parts(one), types)) for one in maps]
        whole = [_join(own, t) for own, t in zip(_by_sort(parts), types, strict=True)]
        views = [
            tensor.split([len(part) for part in own])
            for tensor, own in zip(whole, _by_sort(parts), strict=True)
        ]

        def made(kinds: list[int], tensors: list[Tensor]) -> FlowTensors:
            linear = {False: tensors[0], True: tensors[1]}
            return FlowTensors(kinds, linear, tensors[2:], options)

        alone = [made([kind], [v[i] for v in views]) for i, kind in enumerate(kinds)]
        return made(kinds, whole), alone

    def arguments(self, inverse: bool) -> tuple[list[int], list[Tensor]]:
        """The operator's, from `kinds` to `norms`."""
        return self.kinds, [self.linear[inverse], *self.weights]


def _kind(one: FlowMap) -> int:
    if isinstance(one, PackedCoupling):
        first = 3 + 2 * SPLITS.index(one.split) if one.positions is None else _BY_POSITION
        return first + (not one.up)
    return 1 + _LAYOUTS.index(one.layout) if isinstance(one, PackedFlowLinear) else 0


def _weights(one: PackedCoupling) -> list[PackedWeight]:
    first = one.positions.weights if one.positions is not None else ()
    return [*first, *one.layer.weights, one.output]


def _parts(one: FlowMap) -> list[list[Tensor]]:
    """What a map has of each sort: `linear` forward and back, and from `weights` to `norms`."""
    if isinstance(one, PackedCoupling):
        packed, biases = _weights(one), [*one.layer.biases, one.output_bias]
        norms = [*one.layer.norms]
        if one.positions is not None:
            biases, norms = [*one.positions.biases, *biases], [*one.positions.norm, *norms]
        scales = [w.scales for w in packed if w.scales is not None]
        sums = [w.column_sums for w in packed if w.column_sums is not None]
        return [[], [], [w.data for w in packed], scales, sums, biases, norms]
    norm = [one.log_scale, one.bias]
    if isinstance(one, PackedFlowLinear):
        return [[*norm, one.weight], [*norm, one.inverse], [], [], [], [], []]
    return [norm, norm, [], [], [], [], []]


def _by_sort(parts: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[own[i] for own in parts] for i in range(7)]


def _join(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = [tensor.detach().flatten() for tensor in tensors]
    return torch.cat(flat) if flat else torch.empty(0, dtype=dtype)


def packed_flow(
    x: Tensor,
    maps: Sequence[FlowMap],
    memory: Sequence[Tensor] = (),
    rows: RowsOf | None = None,
    pairs: RowsOf | None = None,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maps of a flow (FlowSeq, Ma et al. 2019, section 3.3) on packed rows, one after the other.

    They are calls of :func:`actnorm`, :func:`flow_linear`, :func:`packed_layers`,
    :func:`packed_linear` and :func:`affine_coupling` with all their properties, to the last bit.
    What is saved are the ways back to Python between them. Not differentiable.

    Args:
        x: `[N, C]`, float32: the rows of all sentences, without padding. With couplings by steps
            each sentence has an even number of them.
        maps: in forward order. Couplings have heads and epsilon in common.
        memory: for each coupling the keys and values of the source side by side, `[S, 2 W]`, W
            being C for a coupling by steps and C / 2 otherwise.
        rows: what couplings by channels need: positions `[N, C / 2]`, added to what is given to
            the network, and which rows of `x` and of the memory a row attends to, `[N, R, 2]`,
            int32.
        pairs: the same for couplings by steps: `[N / 2, C]`, and `[N / 2, R, 2]` twice.
        inverse: whether to undo the maps, from the last to the first.

    Returns:
        The result `[N, C]`, and what every row adds to the log-determinant, `[N]`; of a pair of
        rows its first has it all.
    """
    check = Check("packed_flow")
    for one in maps:
        if isinstance(one, PackedCoupling):
            if one.split not in SPLITS:
                check.fail("split", f"be one of {', '.join(SPLITS)}", repr(one.split))
            if one.positions is not None and one.split != "features":
                check.fail("split", 'be "features" with `positions`', repr(one.split))
        elif isinstance(one, PackedFlowLinear):
            if one.layout not in _LAYOUTS:
                check.fail("layout", f"be one of {', '.join(_LAYOUTS)}", repr(one.layout))
        elif not isinstance(one, PackedActNorm):
            check.fail("maps", "be packed maps of a flow", type(one).__name__)
    couplings = [one for one in maps if isinstance(one, PackedCoupling)]
    shared = [
        (layer.heads, layer.eps, layer.activation, len(layer.biases[2]), weight.data.dtype)
        for layer, weights in ((one.layer, _weights(one)) for one in couplings)
        for weight in weights
    ]
    for own in shared:
        wanted = (*shared[0][:2], "relu", *shared[0][3:])
        if own != wanted:
            check.fail("maps", f"agree in heads, eps, activation, hidden size, type {wanted}", own)
    for one in couplings:
        found = [(weight.out_features, weight.in_features) for weight in _weights(one)]
        shapes = _shapes(_kind(one), x.shape[-1], shared[0][3])
        if found != shapes:
            check.fail("maps", f"have weights of the sizes {shapes} in such a coupling", found)
    sizes = {len(one.weight) for one in maps if isinstance(one, PackedFlowLinear)}
    if len(sizes) > 1:
        check.fail("maps", "have matrices of one size", sorted(sizes))
    tensors = FlowTensors.of(maps)
    kinds, flat = tensors.arguments(inverse)
    source = torch.cat([part.detach() for part in memory], 1) if memory else x.new_empty(0, 0)
    y, logdet = _OPERATOR(
        x.detach(),
        kinds,
        *flat,
        source,
        list(rows or ()),
        list(pairs or ()),
        *tensors.options,
        inverse,
    )
    constant = sum(one.logdet for one in maps)
    return y, logdet + (-constant if inverse else constant)


def _native(
    extension: Any,
    x: Tensor,
    kinds: Sequence[int],
    linear: Tensor,
    weights: Tensor,
    scales: Tensor,
    column_sums: Tensor,
    biases: Tensor,
    norms: Tensor,
    memory: Tensor,
    rows: Sequence[Tensor],
    pairs: Sequence[Tensor],
    heads: int,
    hidden: int,
    matrix: int,
    eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    y, logdet = _fake(x)
    extension.packed_flow(
        x,
        kinds,
        linear,
        weights,
        scales,
        column_sums,
        biases,
        norms,
        memory,
        rows,
        pairs,
        heads,
        hidden,
        matrix,
        eps,
        inverse,
        y,
        logdet,
    )
    return y, logdet


def _reference(
    x: Tensor,
    kinds: Sequence[int],
    linear: Tensor,
    weights: Tensor,
    scales: Tensor,
    column_sums: Tensor,
    biases: Tensor,
    norms: Tensor,
    memory: Tensor,
    rows: Sequence[Tensor],
    pairs: Sequence[Tensor],
    heads: int,
    hidden: int,
    matrix: int,
    eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    check = Check("packed_flow")
    check.dims("x", x, 2, "[N, C]")
    check.dtype("x", x, (torch.float32,))
    check.cpu("x", x)
    check.dtype("weights", weights, (torch.float32, torch.bfloat16, torch.int8))
    count, dim = x.shape
    for name, size in (("hidden", hidden), ("matrix", matrix)):
        if size < 1:
            check.fail(name, "be at least 1", size)
    for kind in kinds:
        if not 0 <= kind <= _BY_POSITION + 1:
            check.fail("kinds", f"be in [0, {_BY_POSITION + 1}]", kind)
    couplings = any(kind >= 3 for kind in kinds)
    by_steps = any(_split(kind) == "steps" for kind in kinds)
    if couplings and dim % 2:
        check.fail("x", "have an even number of channels", dim)
    if by_steps and count % 2:
        check.fail("x", "have an even number of rows", count)
    if couplings and (heads < 1 or dim // 2 % heads):
        check.fail("heads", f"divide half the channels of `x` ({dim // 2})", heads)
    # What each map takes of each tensor.
    sizes = [_sizes(kind, dim, hidden, matrix, weights.dtype) for kind in kinds]
    totals = [sum(own) for own in zip(*sizes, strict=True)] if sizes else [0] * 7
    flat = (linear, weights, scales, column_sums, biases, norms)
    names = ("linear", "weights", "scales", "column_sums", "biases", "norms")
    types = (torch.float32, weights.dtype, torch.float32, torch.int32, *[torch.float32] * 2)
    for name, tensor, total, dtype in zip(names, flat, totals, types, strict=False):
        check.shape(name, tensor, [total], "numbers of all maps")
        check.dtype(name, tensor, (dtype,))
        check.cpu(name, tensor)
    check.dims("memory", memory, 2, "[S, M]")
    wanted = [memory.shape[0], totals[6]]
    check.shape("memory", memory, wanted, "keys and values of each coupling")
    check.dtype("memory", memory, (torch.float32,))
    check.cpu("memory", memory)
    if couplings:
        _check_rows(check, "rows", rows, count, dim // 2)
    if by_steps:
        _check_rows(check, "pairs", pairs, count // 2, dim)
    cut = [tensor.split([own[i] for own in sizes]) for i, tensor in enumerate(flat)]
    sources = memory.split([own[6] for own in sizes], 1)
    logdet = x.new_zeros(count)
    lengths = torch.tensor([count])
    order = range(len(kinds))
    for i in reversed(order) if inverse else order:
        kind, own_linear = kinds[i], cut[0][i]
        if kind == 0:
            x = reference.actnorm(x[None], lengths, *own_linear.chunk(2), inverse=inverse)[0][0]
        elif kind < 3:
            log_scale, bias, product = own_linear.split([dim, dim, matrix * matrix])
            norm, layout = (log_scale[None], bias[None]), _LAYOUTS[kind - 1]
            product = product.view(1, matrix, matrix)
            x = reference.flow_linear_map(x[None], lengths, *norm, product, layout, inverse)[0]
        else:
            split = _split(kind)
            own = pairs if split == "steps" else rows
            q, k, v = (h.unflatten(1, (heads, -1)) for h in (own[0], *sources[i].chunk(2, 1)))
            attention = Check("interval_attention")
            check_attention(attention, q, q, q, own[1])
            check_attention(attention, q, k, v, own[2])
            unpacked, own_biases, own_norms = _unpack(kind, dim, hidden, [c[i] for c in cut[1:]])
            x, by_row = reference.packed_coupling(
                *(x, unpacked, own_biases, own_norms, weights.dtype, sources[i]),
                *(own, heads, eps, split, kind % 2 == 1, inverse),
            )
            logdet = logdet + by_row
    return x.clone() if not kinds else x, logdet


def _split(kind: int) -> str:
    """Of a coupling; of other maps none of them."""
    if kind >= _BY_POSITION:
        return "features"
    return SPLITS[(kind - 3) // 2] if kind >= 3 else ""


def _shapes(kind: int, dim: int, hidden: int) -> list[tuple[int, int]]:
    """Outputs and inputs of a coupling's linear maps."""
    w = dim if _split(kind) == "steps" else dim // 2
    by_position = [(2 * w, w), (w, w)] if kind >= _BY_POSITION else []
    return [*by_position, (3 * w, w), (w, w), (hidden, w), (w, hidden), (2 * w, w)]


def _sizes(kind: int, dim: int, hidden: int, matrix: int, dtype: torch.dtype) -> list[int]:
    """How much a map takes of `linear` to `norms`, and of the columns of `memory`."""
    if kind < 3:
        return [2 * dim + (matrix * matrix if kind else 0), 0, 0, 0, 0, 0, 0]
    shapes, per_word = _shapes(kind, dim, hidden), 4 // dtype.itemsize
    columns = [-(-outputs // PANEL) * PANEL for outputs, _ in shapes]
    depths = [-(-inputs // per_word) * per_word for _, inputs in shapes]
    data = sum(c * d for c, d in zip(columns, depths, strict=True))
    sums = sum(columns) if dtype == torch.int8 else 0
    width = shapes[-1][1]
    norms = 8 if kind >= _BY_POSITION else 6
    return [0, data, sums, sums, sum(o for o, _ in shapes), norms * width, 2 * width]


def _unpack(
    kind: int, dim: int, hidden: int, tensors: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, biases and normalisations of a coupling."""
    data, scales, sums, biases, norms = tensors
    shapes, per_word = _shapes(kind, dim, hidden), 4 // data.dtype.itemsize
    weights, first, column = [], 0, 0
    for outputs, inputs in shapes:
        padded, steps = -(-outputs // PANEL) * PANEL, -(-inputs // per_word)
        size, columns = padded * steps * per_word, slice(column, column + padded)
        words = data[first : first + size].view(-1, steps, strip_columns(), per_word)
        own = (scales[columns], sums[columns]) if len(scales) else (None, None)
        weights.append(PackedWeight(words, own[0], own[1], outputs, inputs).unpack())
        first, column = first + size, columns.stop
    parts = biases.split([outputs for outputs, _ in shapes])
    return weights, list(parts), list(norms.split(shapes[-1][1]))


def _check_rows(check: Check, name: str, rows: Sequence[Tensor], count: int, width: int) -> None:
    if len(rows) != 3:
        check.fail(name, "have 3 tensors (positions, and what a row attends to)", len(rows))
    check.shape(name, rows[0], [count, width], "rows, channels of half the states")
    check.dtype(name, rows[0], (torch.float32,))
    check.cpu(name, rows[0])
    for sees in rows[1:]:
        check.dims(name, sees, 3, "[N, R, 2]")
        check.shape(name, sees, [count, sees.shape[1], 2], "rows, R, begin and end")
        check.dtype(name, sees, (torch.int32,))


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if x.dim() else 0
    return x.new_empty(x.shape), x.new_empty(rows)


_OPERATOR = Operator(
    "packed_flow(Tensor x, int[] kinds, Tensor linear, Tensor weights, Tensor scales, "
    "Tensor column_sums, Tensor biases, Tensor norms, Tensor memory, Tensor[] rows, "
    "Tensor[] pairs, int heads, int hidden, int matrix, float eps, bool inverse) "
    "-> (Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
    cpu_only="packed weights are for CPUs",
)
