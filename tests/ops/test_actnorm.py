from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.ops import actnorm
from tests.ops.flow_checks import (
    DTYPES,
    accumulation,
    assert_as_float64,
    assert_batch_mates_do_not_matter,
    assert_threads_do_not_matter,
    log_abs_det_of_jacobian,
    make_steps,
    without_padding,
)

BOTH = pytest.mark.parametrize("inverse", [False, True])


def make_parameters(
    channels: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    log_scale = torch.randn(channels, dtype=accumulation(dtype)) / 2
    return log_scale.to(device), torch.randn_like(log_scale).to(device)


def assert_right(
    batch: int, steps: int, channels: int, dtype: torch.dtype, device: Any, inverse: bool
) -> None:
    x, lengths = make_steps(batch, steps, channels, dtype, device)
    assert_as_float64(
        lambda *a: actnorm(a[0], lengths, *a[1:], inverse=inverse),
        lambda *a: reference.actnorm(
            without_padding(a[0], lengths), lengths, *a[1:], inverse=inverse
        ),
        (x, *make_parameters(channels, dtype, device)),
    )


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 33), (5, 70, 130)])
def test_matches_float64_autograd(
    shape: tuple[int, int, int], dtype: torch.dtype, inverse: bool, device: torch.device
) -> None:
    assert_right(*shape, dtype, device, inverse)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_simd_level_matches(dtype: torch.dtype, inverse: bool, simd_level: str) -> None:
    assert_right(3, 9, 37, dtype, "cpu", inverse)


def test_by_hand(device: torch.device) -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [math.nan, math.inf]]], device=device)
    lengths = torch.tensor([2], device=device)
    log_scale = torch.tensor([2.0, 0.5], device=device).log()
    bias = torch.tensor([1.0, -1.0], device=device)
    y, logdet = actnorm(x, lengths, log_scale, bias)
    torch.testing.assert_close(y, torch.tensor([[[3.0, 0.0], [7.0, 1.0], [0, 0]]], device=device))
    torch.testing.assert_close(logdet, torch.zeros(1, device=device))
    back, _ = actnorm(y, lengths, log_scale, bias, inverse=True)
    torch.testing.assert_close(back[:, :2], x[:, :2])


@BOTH
def test_inversion_and_jacobian(inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(4, 6, 5, torch.float64, device)
    parameters = make_parameters(5, torch.float64, device)
    y, logdet = actnorm(x, lengths, *parameters, inverse=inverse)
    back, negative = actnorm(y, lengths, *parameters, inverse=not inverse)
    torch.testing.assert_close(back, without_padding(x, lengths))
    torch.testing.assert_close(negative, -logdet)
    one = lengths[:1]
    want = log_abs_det_of_jacobian(
        lambda v: actnorm(v, one, *parameters, inverse=inverse)[0], x[:1]
    )
    torch.testing.assert_close(logdet[0], want)


@BOTH
def test_gradcheck(inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(3, 4, 3, torch.float64, device)
    inputs = (without_padding(x, lengths), *make_parameters(3, torch.float64, device))
    torch.autograd.gradcheck(
        lambda *a: actnorm(a[0], lengths, *a[1:], inverse=inverse),
        tuple(t.requires_grad_() for t in inputs),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_do_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    x, lengths = make_steps(5, 9, 33, dtype, device)
    parameters = make_parameters(33, dtype, device)
    assert_batch_mates_do_not_matter(lambda x, n: actnorm(x, n, *parameters), [x], lengths)


def test_threads_do_not_matter() -> None:
    x, lengths = make_steps(9, 200, 64)
    leaves = [t.requires_grad_() for t in (x, *make_parameters(64))]

    def run() -> tuple[Tensor, ...]:
        y, logdet = actnorm(leaves[0], lengths, *leaves[1:])
        return (y, *torch.autograd.grad(y.square().sum() + logdet.sum(), leaves))

    assert_threads_do_not_matter(run)


def test_strided_arguments_equal_their_copies(device: torch.device) -> None:
    x, lengths = make_steps(3, 8, 40, device=device)
    log_scale, bias = make_parameters(40, device=device)
    for view in (x[:, :, 3:20], x[..., ::2], x[:, :, :1].expand(3, 8, 20)):
        c = view.shape[2]
        got = actnorm(view, lengths, log_scale[:c], bias[:c])
        want = actnorm(view.contiguous(), lengths, log_scale[:c], bias[:c])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
    log_scale, bias = (t.requires_grad_() for t in make_parameters(3, device=device))
    y, logdet = actnorm(x, lengths, log_scale, bias)
    assert y.shape == shape
    assert logdet.tolist() == [0] * shape[0]
    (y.sum() + logdet.sum()).backward()
    assert bias.grad is not None
    assert not bias.grad.any()


def test_registered_rightly(device: torch.device) -> None:
    x, lengths = make_steps(3, 4, 5, device=device)
    x, parameters = without_padding(x, lengths), make_parameters(5, device=device)
    torch.library.opcheck(torch.ops.pynar.actnorm.default, (x, lengths, *parameters, False, 1))
    torch.library.opcheck(
        torch.ops.pynar.actnorm_backward.default, (x, x, lengths, *parameters, True, 1)
    )


def test_compiles_into_one_graph(device: torch.device) -> None:
    x, lengths = make_steps(3, 4, 5, device=device)
    leaves = [t.requires_grad_() for t in (without_padding(x, lengths), *make_parameters(5))]

    def run(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return actnorm(x, lengths, log_scale, bias)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    ones = [torch.ones_like(t) for t in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, ones), torch.autograd.grad(want, leaves, ones)
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 5)}, "`x` must have 3 dimensions [B, T, C], got shape [2, 5]"),
    (
        {"x": torch.zeros(2, 3, 5, dtype=torch.int64)},
        "`x` must have dtype float32 or bfloat16 or float16 or float64, got int64",
    ),
    ({"lengths": torch.zeros(3).long()}, "`lengths` must have shape [2] (batch of `x`), got [3]"),
    ({"lengths": torch.zeros(2).int()}, "`lengths` must have dtype int64, got int32"),
    (
        {"lengths": torch.tensor([3, 4])},
        "`lengths` must have values in [0, 3], got 4 (sentence 1)",
    ),
    ({"log_scale": torch.zeros(4)}, "`log_scale` must have shape [5] (channels of `x`), got [4]"),
    ({"bias": torch.zeros(5).double()}, "`bias` must have dtype float32, got float64"),
]


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, 5),
        "lengths": torch.tensor([3, 1]),
        "log_scale": torch.zeros(5),
        "bias": torch.zeros(5),
    }
    with pytest.raises(ValueError) as error:
        actnorm(**(arguments | change))
    assert str(error.value) == f"actnorm: {message}"
