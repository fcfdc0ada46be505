"""What the tests of the flow's operators have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pynar.ops._operator import implementation
from pynar.testing import tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_bits(device: torch.device | str) -> Any:
    """Limits for results that must be equal; PyTorch's own products may round elsewhere."""
    if implementation(torch.device(device).type).name == "reference":
        return {"rtol": 1e-4, "atol": 1e-4}
    return {"rtol": 0, "atol": 0}


def make_steps(
    batch: int,
    steps: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Steps with NaN for the padding, and lengths from none to all."""
    lengths = torch.tensor([steps, 0, (steps + 1) // 2, 1, steps - 1] * batch)[:batch].clamp_min(0)
    x = torch.randn(batch, steps, channels).to(dtype)
    x[torch.arange(steps) >= lengths[:, None]] = torch.nan
    return x.to(device), lengths.to(device)


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    live = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(live[..., None], x, 0)


def assert_as_float64(
    function: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    factor: float = 1.0,
) -> None:
    """Compares results and gradients with those of autograd through the definition in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = function(*leaves), definition(*exact)
    factors = [torch.randn_like(g) for g in got]
    grads = torch.autograd.grad(got, leaves, factors)
    exact_grads = torch.autograd.grad(want, exact, [f.double() for f in factors])
    names = [f"result {i}" for i in range(len(got))] + [f"gradient {i}" for i in range(len(grads))]
    for name, g, w in zip(names, (*got, *grads), (*want, *exact_grads), strict=True):
        limits = tolerance(g.device, g.dtype)
        # Sums over all steps are as exact as their terms are great.
        scale = factor * max(1.0, float(w.detach().abs().max()) if w.numel() else 1.0)
        torch.testing.assert_close(
            g.double(),
            w,
            rtol=factor * limits["rtol"],
            atol=scale * limits["atol"],
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_batch_mates_do_not_matter(
    function: Callable[..., Any], per_step: Sequence[Tensor], lengths: Tensor
) -> None:
    """Each sentence alone, at its own width, gives the same bits as in the batch.

    `per_step` are `[B, T, C]`, results `[B, T, ...]` or `[B]`.
    """
    batched = function(*per_step, lengths)
    exact: Any = {"rtol": 0, "atol": 0}
    if implementation(lengths.device.type).name == "reference":
        exact = tolerance(lengths.device, batched[0].dtype)
    for b, length in enumerate(lengths.tolist()):
        alone = function(*(x[b : b + 1, :length] for x in per_step), lengths[b : b + 1])
        for one, all_of_them in zip(alone, batched, strict=True):
            mine = all_of_them[b : b + 1]
            if one.dim() == 3:
                assert not mine[:, one.shape[1] :].any()
                mine = mine[:, : one.shape[1]]
            torch.testing.assert_close(one, mine, **exact)


def assert_threads_do_not_matter(function: Callable[[], Sequence[Tensor]]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = function()
        torch.set_num_threads(3)
        three = function()
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(list(one), list(three), **same_bits("cpu"))


def log_abs_det_of_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of one sentence: the logarithm of the absolute determinant of autograd's Jacobian."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]
