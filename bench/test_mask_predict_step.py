"""`mask_predict_step` against PyTorch, at the sizes of a decoder: one sentence, and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.conftest import DEVICES, Case, compiled, device_or_skip
from pynar import ops, reference
from pynar.symbols import BOS, EOS, MASK, PAD

SHAPES = {"cpu": [(1, 30), (64, 30)], "cuda": [(1, 30), (64, 30), (512, 30)]}
VOCABULARY = 32_000


def composition(
    logits: Tensor, tokens: Tensor, scores: Tensor, lengths: Tensor, num_masked: Tensor
) -> tuple[Tensor, Tensor]:
    """What one writes by hand in PyTorch for speed: few passes, no copy of float32 logits."""
    # In place, which spares a copy; the reference fills a copy.
    logits[..., PAD] = -torch.inf
    logits[..., MASK] = -torch.inf
    best, best_tokens = logits.max(-1)
    best_scores = best.to(scores.dtype) - logits.to(scores.dtype).logsumexp(-1)
    live = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    masked = live & (tokens == MASK)
    candidate = live & (tokens != PAD) & (tokens != BOS) & (tokens != EOS)
    tokens = torch.where(masked, best_tokens, tokens)
    scores = torch.where(masked, best_scores, scores)
    order = scores.masked_fill(~candidate, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    tokens = tokens.masked_fill(candidate & (rank < num_masked[:, None]), MASK)
    return tokens.masked_fill(~live, PAD), scores.masked_fill(~live, 0)


IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Any]]] = {
    "pynar": lambda: ops.mask_predict_step,
    "reference": lambda: reference.mask_predict_step,
    "composition": lambda: composition,
    "compiled reference": lambda: compiled(reference.mask_predict_step),
}


def make_case(batch: int, steps: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A first step of mask-predict: every slot is masked, so that every row must be read."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, steps, VOCABULARY, generator=generator).mul_(3).to(dtype)
    arguments = (
        logits,
        torch.full((batch, steps), MASK),
        torch.zeros(batch, steps),
        torch.full((batch,), steps),
        torch.full((batch,), steps // 2),
    )
    return Case(
        operator="mask_predict_step",
        shape=f"B={batch},T={steps},V={VOCABULARY}",
        dtype=dtype,
        device=device,
        arguments=tuple(argument.to(device) for argument in arguments),
        reference=reference.mask_predict_step,
        bytes_moved=logits.numel() * logits.element_size(),
        # torch.compile adds up a row one vector after another.
        limits={"rtol": 5e-5, "atol": 5e-5},
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES["cuda"], ids=lambda s: f"B{s[0]}-T{s[1]}")
@pytest.mark.parametrize("device", DEVICES)
def test_mask_predict_step(
    run_case: Callable[[Case, str, Callable[..., Any]], None],
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    implementation: str,
) -> None:
    if shape not in SHAPES[device]:
        pytest.skip("would take long on a CPU")
    case = make_case(*shape, dtype, device_or_skip(device))
    run_case(case, implementation, IMPLEMENTATIONS[implementation]())
