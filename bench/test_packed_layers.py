"""`packed_layers` against the operators it consists of, one sentence at a time, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.conftest import FORMATS, Case
from bench.test_packed_linear import LIMITS
from pynar import ops
from pynar.ops.packed_layers import _OPERATOR, layer_tensors

DIM, HIDDEN, HEADS = 512, 2048, 8
SHAPES = ((3 * DIM, DIM), (DIM, DIM), (DIM, DIM), (DIM, DIM), (HIDDEN, DIM), (DIM, HIDDEN))


@pytest.mark.parametrize("implementation", ["pynar", "pynar's parts", "reference"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [10, 30, 60])
def test_packed_layers(
    run_case: Callable[[Case, str, Callable[..., Any]], None],
    rows: int,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    """A decoder layer of the base size, alone."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = tuple(ops.pack_linear(draw(*shape) / shape[1] ** 0.5, dtype) for shape in SHAPES)
    biases = tuple(draw(shape[0]) for shape in SHAPES)
    norms = tuple(torch.ones(DIM) for _ in SHAPES)
    layer = ops.PackedLayer(weights, biases, norms, HEADS, "relu", 1e-5)
    x, keys, values = draw(rows, DIM), *draw(2, rows + 1, HEADS, DIM // HEADS)
    sees = torch.tensor([0, rows], dtype=torch.int32).expand(rows, 1, 2)
    reads = torch.tensor([0, rows + 1], dtype=torch.int32).expand(rows, 1, 2)
    memory = [keys], [values], reads

    def define(x: Tensor) -> Tensor:
        call = _OPERATOR.reference
        tensors, options = layer_tensors([layer]), layer.options()
        return call(x, *tensors, sees, *memory, None, rows, 1, *options)

    def whole(x: Tensor) -> Tensor:
        return ops.packed_layers(x, [layer], sees, memory=memory)

    def parts(x: Tensor) -> Tensor:
        def leave(index: int, h: Tensor, residual: Tensor) -> Tensor:
            norm = norms[index - 1], norms[index], 1e-5
            return ops.packed_linear(
                h, weights[index], biases[index], residual=residual, output_norm=norm
            )

        def attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
            return ops.interval_attention(q, k, v, intervals, scale=1.0).flatten(1)  # type: ignore[union-attr]

        qkv = ops.packed_linear(x, weights[0], biases[0]).view(rows, 3 * HEADS, -1)
        h = leave(1, attend(*qkv.split(HEADS, 1), sees), x)
        q = ops.packed_linear(h, weights[2], biases[2]).view(rows, HEADS, -1)
        h = leave(3, attend(q, keys, values, reads), h)
        return leave(5, ops.packed_linear(h, weights[4], biases[4], activation="relu"), h)

    size = sum(rows * columns for rows, columns in SHAPES)
    case = Case(
        operator="packed_layers",
        shape=f"N={rows},C={DIM},F={HIDDEN}",
        dtype=dtype,
        device=torch.device("cpu"),
        arguments=(x,),
        reference=define,
        bytes_moved=sum(w.data.numel() * w.data.element_size() for w in weights),
        flops=2 * rows * size + 8 * rows * rows * DIM,
        limits=LIMITS[dtype],
    )
    functions = {"pynar": whole, "pynar's parts": parts, "reference": define}
    run_case(case, implementation, functions[implementation])
