"""`linear_argmax` against the vocabulary's logits and their argmax in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import DEVICES, Case, compiled, device_or_skip
from bench.test_packed_linear import LIMITS, onednn
from pynar import ops, reference

VOCABULARY = 32_000
# On the CPU float32 as it is and packed weights; on a GPU weights as they are.
FORMATS = {
    "cpu": ("float32", "packed float32", "packed bfloat16", "packed int8"),
    "cuda": ("float32", "bfloat16", "float16"),
}
SHAPES = [(rows, 512) for rows in (1, 10, 32, 128, 960)] + [(32, 256), (16_384, 512)]
REPRESENTATIVE = (32, 512)

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


def from_logits(logits: Callable[[Tensor], Tensor]) -> Function:
    """What one writes by hand: an argmax, and one more pass for the sum."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        z = logits(x)
        best, tokens = z.max(-1)
        return tokens, best.float() - z.float().logsumexp(-1)

    return call


@pytest.mark.parametrize(
    "implementation", ["pynar", "reference", "F.linear", "oneDNN packed", "compiled reference"]
)
@pytest.mark.parametrize("form", [*FORMATS["cpu"], *FORMATS["cuda"][1:]])
@pytest.mark.parametrize(
    ("rows", "channels"),
    [
        pytest.param(
            *s, id=f"N{s[0]}-C{s[1]}", marks=() if s == REPRESENTATIVE else pytest.mark.grid
        )
        for s in SHAPES
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_linear_argmax(
    run_case: Callable[[Case, str, Callable[..., Any]], None],
    device: str,
    rows: int,
    channels: int,
    form: str,
    implementation: str,
) -> None:
    place = device_or_skip(device)
    if form not in FORMATS[device] or (device == "cpu" and rows > 960):
        pytest.skip("not a case of this device")
    dtype = getattr(torch, form.split()[-1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator)
    weight = torch.randn(VOCABULARY, channels, generator=generator).mul_(3 * channels**-0.5)
    used: Any = weight
    if form.startswith("packed"):
        used = ops.pack_linear(weight, dtype)
        defined = used.unpack()
    else:
        x, weight = x.to(dtype).to(place), weight.to(dtype).to(place)
        used = defined = weight

    def define(x: Tensor) -> tuple[Tensor, Tensor]:
        if form.startswith("packed"):
            x = reference.round_rows(x, dtype)
        tokens, log_probs, _ = reference.linear_argmax(x, defined, None, 1)
        return tokens[:, 0], log_probs[:, 0]

    def packed_by_onednn() -> Function:
        if device == "cuda" or not form.startswith("packed"):
            pytest.skip("for packed weights")
        return from_logits(onednn(weight, torch.zeros(VOCABULARY), rows, dtype))

    def stock() -> Function:
        if dtype == torch.int8:
            pytest.skip("PyTorch has no such linear layer")
        own = weight.to(dtype)
        return from_logits(lambda x: F.linear(x.to(dtype), own))

    functions: dict[str, Callable[[], Function]] = {
        "pynar": lambda: lambda x: ops.linear_argmax(x, used),  # type: ignore[return-value]
        "reference": lambda: define,
        "F.linear": stock,
        "oneDNN packed": packed_by_onednn,
        "compiled reference": lambda: compiled(define),
    }
    moved = VOCABULARY * channels * torch.empty(0, dtype=dtype).element_size()
    case = Case(
        operator="linear_argmax" + (" packed" if form.startswith("packed") else ""),
        shape=f"N={rows},C={channels},V={VOCABULARY}",
        dtype=dtype,
        device=place,
        arguments=(x,),
        reference=define,
        bytes_moved=moved + x.numel() * x.element_size(),
        flops=2 * rows * channels * VOCABULARY,
        limits=LIMITS[torch.bfloat16 if dtype == torch.float16 else dtype],
        exact_integers=False,
    )
    run_case(case, implementation, functions[implementation]())
