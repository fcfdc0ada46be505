"""`divergence_cross_entropy` against its composition in PyTorch, forward and backward, with memory.

The losses of JANUS: three heads, label smoothing, all three divergences. The logits of all heads
are one tensor, as one product makes them; "separate heads" takes them as three, "slices" as slices
of the one. `peak_bytes` is what a call allocates at most beside its arguments, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import DEVICES, Case, compiled, device_or_skip, peak_bytes
from pynar import ops

HEADS, SMOOTHING = 3, 0.1
WEIGHTS = (1.0, 0.5, 0.5)
PAIRS = {(0, 1): 1.0, (1, 2): 1.0, (0, 2): 3.0}
SHAPES = {"cpu": [(500, 32000), (2000, 32000)], "cuda": [(2000, 32000), (8000, 32000)]}
GRID = pytest.mark.grid


def _composition(heads: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    exact = [x.float() for x in heads]
    loss = sum(
        w * F.cross_entropy(x, targets, label_smoothing=SMOOTHING, reduction="sum")
        for w, x in zip(WEIGHTS, exact, strict=True)
    )
    log_probs = [x.log_softmax(-1) for x in exact]
    for (p, q), w in PAIRS.items():
        for a, b in ((p, q), (q, p)):
            divergence = F.kl_div(log_probs[a], log_probs[b], reduction="sum", log_target=True)
            loss = loss + w / 2 * divergence
    return loss  # type: ignore[return-value]


def _fused(logits: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
    cross_entropy, divergence = ops.divergence_cross_entropy(
        logits, targets, list(PAIRS), label_smoothing=SMOOTHING
    )
    weights = torch.tensor([*WEIGHTS, *PAIRS.values()], device=targets.device)
    return weights @ torch.cat([cross_entropy, divergence]).sum(1)


def _slices(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return rows.split(len(targets))


def _implementation(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the gradient by the rows of all heads, `[C N, V]`."""

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(rows: Tensor, targets: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                return torch.autograd.grad(loss(leaf, targets), leaf)[0]

        return run

    def separate(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in _slices(rows, targets))
            return torch.autograd.grad(_fused(leaves, targets), leaves)

    by_slices = lambda rows, targets: _composition(_slices(rows, targets), targets)  # noqa: E731
    if name == "pynar":
        return gradient(lambda rows, t: _fused(rows.view(HEADS, len(t), -1), t))
    if name == "pynar, slices":
        return gradient(lambda rows, t: _fused(_slices(rows, t), t))
    if name == "pynar, separate heads":
        return separate  # type: ignore[return-value]
    return gradient(compiled(by_slices) if name == "compile" else by_slices)


IMPLEMENTATIONS = ["pynar", "pynar, slices", "pynar, separate heads", "reference", "compile"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (500, 32000),
        pytest.param((2000, 32000), marks=GRID),
        pytest.param((8000, 32000), marks=GRID),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_divergence_cross_entropy(
    run_case: Callable[[Case, str, Callable[..., Any]], None],
    benchmark: Any,
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    implementation: str,
) -> None:
    if shape not in SHAPES[device]:
        pytest.skip("is of the other device")
    place = device_or_skip(device)
    num_rows, vocabulary = shape
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(HEADS * num_rows, vocabulary, generator=generator) * 2
    rows = rows.to(place, dtype)
    targets = torch.randint(0, vocabulary, (num_rows,), generator=generator).to(place)
    run = _implementation(implementation)
    want: Any = _implementation("reference")(rows, targets)
    if implementation == "pynar, separate heads":
        want = want.split(num_rows)
    case = Case(
        operator="divergence_cross_entropy",
        shape=f"C={HEADS},N={num_rows},V={vocabulary}",
        dtype=dtype,
        device=place,
        arguments=(rows, targets),
        reference=lambda *_: want,
        bytes_moved=3 * rows.numel() * rows.element_size(),
        direction="both",
        # The factors add up to 4.5, and the worst of 48 million gradients counts.
        limits={"rtol": 5e-5, "atol": 5e-5} if dtype == torch.float32 else None,
        graph=False,
    )
    run_case(case, implementation, run)
    benchmark.extra_info["peak_bytes"] = peak_bytes(place, lambda: run(rows, targets))
