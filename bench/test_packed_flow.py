"""`packed_flow` against the operators it consists of, one sentence at a time, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.conftest import FORMATS, Case
from bench.test_packed_linear import LIMITS
from pynar import ops
from pynar.ops.packed_flow import _OPERATOR, SPLITS, FlowMap, FlowTensors

DIM, HIDDEN, HEADS = 256, 512, 8


def make_coupling(split: str, up: bool, dtype: torch.dtype) -> ops.PackedCoupling:
    w = DIM if split == "steps" else DIM // 2
    shapes = [(3 * w, w), (w, w), (HIDDEN, w), (w, HIDDEN)]
    layer = ops.PackedLayer(
        tuple(ops.pack_linear(torch.randn(shape) / shape[1] ** 0.5, dtype) for shape in shapes),
        tuple(torch.randn(shape[0]) for shape in shapes),
        tuple(torch.ones(w) for _ in range(6)),
        HEADS,
        "relu",
        1e-5,
    )
    output = ops.pack_linear(0.1 * torch.randn(2 * w, w) / w**0.5, dtype)
    return ops.PackedCoupling(layer, output, torch.zeros(2 * w), split, up)


def make_step(dtype: torch.dtype) -> list[FlowMap]:
    """A step below the top, twice a unit of six couplings."""
    maps: list[FlowMap] = []
    for layout in ("contiguous", "strided"):
        weight = torch.nn.init.orthogonal_(torch.empty(32, 32))
        norm = 0.05 * torch.randn(DIM), torch.zeros(DIM)
        maps.append(ops.PackedFlowLinear(*norm, weight, weight.T.contiguous(), 0.0, layout))
        for split in SPLITS:
            if split != SPLITS[0]:
                maps.append(ops.PackedActNorm(0.05 * torch.randn(DIM), torch.zeros(DIM)))
            maps += [make_coupling(split, True, dtype), make_coupling(split, False, dtype)]
    return maps


@pytest.mark.parametrize("implementation", ["pynar", "pynar, map by map", "reference"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [8, 32])
def test_packed_flow(
    run_case: Callable[[Case, str, Callable[..., Any]], None],
    rows: int,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    """One step of FlowSeq's base size, in the direction of decoding."""
    torch.manual_seed(0)
    maps = make_step(dtype)

    def sees(count: int) -> Tensor:
        return torch.tensor([0, count], dtype=torch.int32).expand(count, 1, 2).contiguous()

    def reads(count: int) -> Tensor:
        return torch.tensor([0, rows], dtype=torch.int32).expand(count, 1, 2).contiguous()

    half = rows // 2
    seen = [torch.randn(rows, DIM // 2), sees(rows), reads(rows)]
    pairs = [torch.randn(half, DIM), sees(half), reads(half)]
    whole, each = FlowTensors.each(maps)
    widths = [len(one.output_bias) if isinstance(one, ops.PackedCoupling) else 0 for one in maps]
    memory = torch.randn(rows, sum(widths))
    parts = memory.split(widths, 1)

    def run(call: Callable[..., Any], x: Tensor, tensors: FlowTensors, source: Tensor) -> Any:
        kinds, flat = tensors.arguments(True)
        return call(x, kinds, *flat, source, seen, pairs, *tensors.options, True)

    def define(x: Tensor) -> Tensor:
        return run(_OPERATOR.reference, x, whole, memory)[0]  # type: ignore[no-any-return]

    def at_once(x: Tensor) -> Tensor:
        return run(_OPERATOR, x, whole, memory)[0]  # type: ignore[no-any-return]

    def map_by_map(x: Tensor) -> Tensor:
        for tensors, source in zip(reversed(each), reversed(parts), strict=True):
            x, _ = run(_OPERATOR, x, tensors, source)
        return x

    products = sum(
        weight.out_features * weight.in_features * (half if one.split == "steps" else rows)
        for one in maps
        if isinstance(one, ops.PackedCoupling)
        for weight in (*one.layer.weights, one.output)
    )
    case = Case(
        operator="packed_flow",
        shape=f"N={rows},C={DIM},F={HIDDEN},12 couplings",
        dtype=dtype,
        device=torch.device("cpu"),
        arguments=(torch.randn(rows, DIM),),
        reference=define,
        bytes_moved=whole.weights[0].numel() * whole.weights[0].element_size(),
        flops=2 * products,
        limits={name: 4 * limit for name, limit in LIMITS[dtype].items()},
    )
    functions = {"pynar": at_once, "pynar, map by map": map_by_map, "reference": define}
    run_case(case, implementation, functions[implementation])
