"""`packed_step` against the operators it consists of, called one by one, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.conftest import FORMATS, Case
from bench.test_packed_layers import DIM, HEADS, HIDDEN, SHAPES
from bench.test_packed_linear import LIMITS
from pynar import ops
from pynar.ops.packed_layers import _STEP, layer_tensors

POSITION, CAPACITY = 15, 16


@pytest.mark.parametrize("implementation", ["pynar", "pynar's parts", "reference"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_packed_step(
    run_case: Callable[..., None], rows: int, dtype: torch.dtype, implementation: str
) -> None:
    """The sixteenth step of a decoder layer of the base size, which is alone: greedy or a beam."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = tuple(ops.pack_linear(draw(*shape) / shape[1] ** 0.5, dtype) for shape in SHAPES)
    biases = tuple(draw(shape[0]) for shape in SHAPES)
    layer = ops.PackedLayer(weights, biases, (), HEADS, "relu", 1e-5)
    x, keys, values = draw(rows, DIM), *draw(2, 30, HEADS, DIM // HEADS)
    cache = draw(rows, CAPACITY, 2 * HEADS, DIM // HEADS)
    slots = torch.arange(rows) * CAPACITY + POSITION
    sees = torch.stack([slots - POSITION, slots + 1], 1).int()[:, None]
    reads = torch.tensor([0, 30], dtype=torch.int32).expand(rows, 1, 2)
    memory = [keys], [values], reads

    def define(x: Tensor) -> Tensor:
        tensors, options = layer_tensors([layer]), layer.options()
        return _STEP.reference(x, *tensors, sees, *memory, None, [cache], slots, 1, *options)

    def whole(x: Tensor) -> Tensor:
        return ops.packed_step(x, [layer], sees, [cache], slots, memory=memory)

    def parts(x: Tensor) -> Tensor:
        def enter(index: int, h: Tensor, activation: str = "none") -> Tensor:
            return ops.packed_linear(
                h, weights[index], biases[index], activation=activation, input_norm=1e-5
            )

        def attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
            return ops.interval_attention(q, k, v, intervals, scale=1.0).flatten(1)  # type: ignore[union-attr]

        def leave(index: int, h: Tensor, residual: Tensor) -> Tensor:
            return ops.packed_linear(h, weights[index], biases[index], residual=residual)

        qkv = enter(0, x).view(rows, 3 * HEADS, -1)
        cache[:, POSITION] = qkv[:, HEADS:]
        seen = cache.flatten(0, 1)
        h = leave(1, attend(qkv[:, :HEADS], seen[:, :HEADS], seen[:, HEADS:], sees), x)
        h = leave(3, attend(enter(2, h).view(rows, HEADS, -1), keys, values, reads), h)
        return leave(5, enter(4, h, "relu"), h)

    case = Case(
        operator="packed_step",
        shape=f"N={rows},C={DIM},F={HIDDEN}",
        dtype=dtype,
        device=torch.device("cpu"),
        arguments=(x,),
        reference=define,
        bytes_moved=sum(w.data.numel() * w.data.element_size() for w in weights),
        flops=2 * rows * sum(outputs * inputs for outputs, inputs in SHAPES),
        limits=LIMITS[dtype],
    )
    functions = {"pynar": whole, "pynar's parts": parts, "reference": define}
    run_case(case, implementation, functions[implementation])
