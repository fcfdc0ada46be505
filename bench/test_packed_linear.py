"""`packed_linear` against PyTorch's linear layers, at the shapes of the models, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import FORMATS, Case, compiled
from pynar import ops, reference
from pynar.testing import Tolerance

# Rows are positions: one step of greedy decoding, of a beam, and whole batches.
ROWS = (1, 10, 32, 128, 960)
SHAPES = ((512, 1536), (512, 2048), (2048, 512), (512, 512), (256, 768), (256, 1024), (256, 256))
REPRESENTATIVE = {(rows, 512, 2048) for rows in (1, 32)}

# PyTorch rounds outputs to bfloat16, too, and inputs of int8 with one scale for all rows.
LIMITS: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.int8: {"rtol": 0.2, "atol": 0.2},
}


def onednn(weight: Tensor, bias: Tensor, rows: int, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """A weight in the layout that oneDNN wants for so many rows, as torch.compile would have it."""
    has = torch.backends.mkldnn.is_available() and dtype != torch.int8
    if dtype == torch.bfloat16:
        has = has and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not has:
        pytest.skip("oneDNN has no such linear layer here")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), rows)
    bias = bias.to(dtype)

    def call(x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
        return y.float()

    return call


def stock(weight: Tensor, bias: Tensor, rows: int, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """`F.linear`, or the dynamically quantised layer."""
    if dtype == torch.int8:
        layer = torch.nn.Linear(*weight.shape[::-1])
        layer.weight.data, layer.bias.data = weight, bias
        model = torch.nn.Sequential(layer)
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})  # type: ignore
    weight, bias = weight.to(dtype), bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias).float()


@pytest.mark.parametrize(
    "implementation", ["pynar", "reference", "F.linear", "oneDNN packed", "compiled reference"]
)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [
        pytest.param(
            *(rows, *shape),
            id=f"N{rows}-K{shape[0]}-M{shape[1]}",
            marks=() if (rows, *shape) in REPRESENTATIVE else pytest.mark.grid,
        )
        for shape in SHAPES
        for rows in ROWS
    ],
)
def test_packed_linear(
    run_case: Callable[..., None],
    rows: int,
    depth: int,
    columns: int,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(columns, depth, generator=generator).mul_(depth**-0.5)
    bias = torch.randn(columns, generator=generator)
    packed = ops.pack_linear(weight, dtype)
    unpacked = packed.unpack()

    def define(x: Tensor) -> Tensor:
        return reference.packed_linear(x, unpacked, bias, dtype, "none", None, None, None)

    functions: dict[str, Callable[[], Callable[..., Any]]] = {
        "pynar": lambda: lambda x: ops.packed_linear(x, packed, bias),
        "reference": lambda: define,
        "F.linear": lambda: stock(weight, bias, rows, dtype),
        "oneDNN packed": lambda: onednn(weight, bias, rows, dtype),
        "compiled reference": lambda: compiled(define),
    }
    case = Case(
        operator="packed_linear",
        shape=f"N={rows},K={depth},M={columns}",
        dtype=dtype,
        device=torch.device("cpu"),
        arguments=(x,),
        reference=define,
        bytes_moved=weight.numel() * packed.data.element_size() + 4 * rows * (depth + columns),
        flops=2 * rows * depth * columns,
        limits=LIMITS[dtype],
    )
    turns = None
    if implementation == "pynar" and dtype == torch.float32:
        turns = "F.linear", functions["F.linear"]()
    run_case(case, implementation, functions[implementation](), turns)
