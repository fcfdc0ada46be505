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
from pynar.ops.packed_layers import PackedLayer
from pynar.ops.packed_linear import PackedWeight, check_packed

__all__ = ["PackedActNorm", "PackedCoupling", "PackedFlowLinear", "packed_flow"]

SPLITS = ("features", "alternate", "steps")
_LAYOUTS = ("contiguous", "strided")
_MAPS, _NORMS = 5, 6  # of a coupling


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
class PackedCoupling:
    """An affine coupling: `layer` and `output: [2 W, W]` make shift and scale of the half given.

    The layer is one of relu, with normalisations behind its sub-layers and attention without
    output maps. The halves are the first and last channels ("features"), even and odd channels
    ("alternate"), or even and odd rows ("steps"); `up`, the first half decides about the second.
    """

    layer: PackedLayer
    output: PackedWeight
    output_bias: Tensor
    split: str
    up: bool

    logdet = 0.0  # it depends on the rows


FlowMap = PackedActNorm | PackedFlowLinear | PackedCoupling
RowsOf = tuple[Tensor, Tensor, Tensor]


def flow_tensors(maps: Sequence[FlowMap], inverse: bool) -> tuple[list[int], list[list[Tensor]]]:
    """The operator's `kinds`, and its arguments from `linear` to `norms`."""
    kinds: list[int] = []
    linear: list[Tensor] = []
    weights: list[PackedWeight] = []
    biases: list[Tensor] = []
    norms: list[Tensor] = []
    for one in maps:
        if isinstance(one, PackedCoupling):
            kinds.append(3 + 2 * SPLITS.index(one.split) + (not one.up))
            weights += *one.layer.weights, one.output
            biases += *one.layer.biases, one.output_bias
            norms += one.layer.norms
        elif isinstance(one, PackedFlowLinear):
            kinds.append(1 + _LAYOUTS.index(one.layout))
            matrix = one.inverse if inverse else one.weight
            linear += one.log_scale[None], one.bias[None], matrix[None].contiguous()
        else:
            kinds.append(0)
            linear += one.log_scale, one.bias
    scales = [w.scales for w in weights if w.scales is not None]
    sums = [w.column_sums for w in weights if w.column_sums is not None]
    return kinds, [linear, [w.data for w in weights], scales, sums, biases, norms]


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
    layers: list[PackedLayer] = []
    for one in maps:
        if isinstance(one, PackedCoupling):
            layers.append(one.layer)
            if one.split not in SPLITS:
                check.fail("split", f"be one of {', '.join(SPLITS)}", repr(one.split))
        elif isinstance(one, PackedFlowLinear):
            if one.layout not in _LAYOUTS:
                check.fail("layout", f"be one of {', '.join(_LAYOUTS)}", repr(one.layout))
        elif not isinstance(one, PackedActNorm):
            check.fail("maps", "be packed maps of a flow", type(one).__name__)
    heads, eps = (layers[0].heads, layers[0].eps) if layers else (1, 0.0)
    for layer in layers:
        if (layer.heads, layer.eps, layer.activation) != (heads, eps, "relu"):
            got = f"{layer.heads}, {layer.eps}, {layer.activation}"
            check.fail("maps", f"agree in heads, eps, activation ({heads}, {eps}, relu)", got)
    kinds, tensors = flow_tensors(maps, inverse)
    y, logdet = _OPERATOR(
        x.detach(),
        kinds,
        *([tensor.detach() for tensor in part] for part in tensors),
        [part.detach() for part in memory],
        list(rows or ()),
        list(pairs or ()),
        heads,
        eps,
        inverse,
    )
    constant = sum(one.logdet for one in maps)
    return y, logdet + (-constant if inverse else constant)


def _native(
    extension: Any,
    x: Tensor,
    kinds: Sequence[int],
    linear: Sequence[Tensor],
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    column_sums: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    memory: Sequence[Tensor],
    rows: Sequence[Tensor],
    pairs: Sequence[Tensor],
    heads: int,
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
        data,
        scales,
        column_sums,
        biases,
        norms,
        memory,
        rows,
        pairs,
        heads,
        eps,
        inverse,
        y,
        logdet,
    )
    return y, logdet


def _reference(
    x: Tensor,
    kinds: Sequence[int],
    linear: Sequence[Tensor],
    data: Sequence[Tensor],
    scales: Sequence[Tensor],
    column_sums: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    memory: Sequence[Tensor],
    rows: Sequence[Tensor],
    pairs: Sequence[Tensor],
    heads: int,
    eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    check = Check("packed_flow")
    check.dims("x", x, 2, "[N, C]")
    check.dtype("x", x, (torch.float32,))
    check.cpu("x", x)
    count, dim = x.shape
    for kind in kinds:
        if not 0 <= kind <= 8:
            check.fail("kinds", "be in [0, 8]", kind)
    couplings = sum(kind >= 3 for kind in kinds)
    by_steps = any(kind >= 7 for kind in kinds)
    if couplings and dim % 2:
        check.fail("x", "have an even number of channels", dim)
    if by_steps and count % 2:
        check.fail("x", "have an even number of rows", count)
    numbers = sum(2 if kind == 0 else 3 for kind in kinds if kind < 3)
    quantised = bool(scales or column_sums)
    each = "five for each coupling"
    for name, tensors, wanted, meaning in (
        ("linear", linear, numbers, "two for each actnorm, three for each flow_linear"),
        ("weights", data, _MAPS * couplings, each),
        ("biases", biases, _MAPS * couplings, each),
        ("scales", scales, _MAPS * couplings * quantised, f"{each}, or none"),
        ("column_sums", column_sums, _MAPS * couplings * quantised, f"{each}, or none"),
        ("norms", norms, _NORMS * couplings, "six for each coupling"),
        ("memory", memory, couplings, "one for each coupling"),
    ):
        if len(tensors) != wanted:
            check.fail(name, f"have {wanted} tensors ({meaning})", len(tensors))
    if couplings and (heads < 1 or dim // 2 % heads):
        check.fail("heads", f"divide half the channels of `x` ({dim // 2})", heads)
    if couplings:
        _check_rows(check, "rows", rows, count, dim // 2)
    if by_steps:
        _check_rows(check, "pairs", pairs, count // 2, dim)
    logdet = x.new_zeros(count)
    lengths = torch.tensor([count])
    coupling, number = (couplings, numbers) if inverse else (0, 0)
    for kind in reversed(kinds) if inverse else kinds:
        if kind >= 3:
            coupling -= inverse
            split, up = SPLITS[(kind - 3) // 2], kind % 2 == 1
            width = dim if split == "steps" else dim // 2
            source = memory[coupling]
            check.dims("memory", source, 2, "[S, 2 W]")
            check.shape("memory", source, [source.shape[0], 2 * width], "keys and values")
            own = slice(_MAPS * coupling, _MAPS * (coupling + 1))
            own_norms = norms[_NORMS * coupling : _NORMS * (coupling + 1)]
            weights, inputs = [], width
            for index in range(own.start, own.stop):
                outputs = len(biases[index])
                scale, total = (scales[index], column_sums[index]) if quantised else (None, None)
                check_packed(Check("packed_linear"), data[index], scale, total, inputs, outputs)
                packed = PackedWeight(data[index], scale, total, outputs, inputs)
                weights.append(packed.unpack())
                inputs = outputs if index == own.start + 2 else width
            x, by_row = reference.packed_coupling(
                *(x, weights, biases[own], own_norms, data[0].dtype, source),
                *(pairs if split == "steps" else rows, heads, eps, split, up, inverse),
            )
            logdet = logdet + by_row
            coupling += not inverse
            continue
        size = 2 if kind == 0 else 3
        number -= size * inverse
        part = linear[number : number + size]
        number += size * (not inverse)
        if kind == 0:
            x = reference.actnorm(x[None], lengths, *part, inverse=inverse)[0][0]
            continue
        log_scale, bias, matrix = part
        norm, layout = (log_scale, bias), _LAYOUTS[kind - 1]
        x = reference.flow_linear_map(x[None], lengths, *norm, matrix, layout, inverse)[0]
    return x.clone() if not kinds else x, logdet


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
    "packed_flow(Tensor x, int[] kinds, Tensor[] linear, Tensor[] data, Tensor[] scales, "
    "Tensor[] column_sums, Tensor[] biases, Tensor[] norms, Tensor[] memory, Tensor[] rows, "
    "Tensor[] pairs, int heads, float eps, bool inverse) -> (Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
    cpu_only="packed weights are for CPUs",
)
