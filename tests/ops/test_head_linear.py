from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.ops import batched_logdet, head_linear
from tests.ops.flow_checks import (
    DTYPES,
    assert_as_float64,
    assert_batch_mates_do_not_matter,
    log_abs_det_of_jacobian,
    make_steps,
    without_padding,
)
from tests.ops.test_flow_linear import make_parameters

BOTH = pytest.mark.parametrize("inverse", [False, True])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "strided"])


def make_weight(dim: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    return make_parameters(1, dim, dim, dtype, device)[2][0]


@BOTH
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_autograd(
    dtype: torch.dtype, layout: str, inverse: bool, device: torch.device
) -> None:
    for shape, dim in (((3, 7, 30), 5), ((2, 20, 48), 16)):
        x, lengths = make_steps(*shape, dtype, device)
        options: dict[str, Any] = {"layout": layout, "inverse": inverse}
        assert_as_float64(
            lambda x, w, n=lengths, o=options: head_linear(x, n, w, **o),
            lambda x, w, n=lengths, o=options: reference.head_linear(
                without_padding(x, n), n, w, **o
            ),
            (x, make_weight(dim, dtype, device)),
            factor=8.0,  # the condition of the matrix
        )


def test_by_hand(device: torch.device) -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [math.nan] * 4]], device=device)
    lengths = torch.tensor([1], device=device)
    weight = torch.tensor([[0.0, 1.0], [3.0, 0.0]], device=device)
    for layout, want in (
        ("contiguous", [2.0, 3.0, 4.0, 9.0]),  # heads (1, 2) and (3, 4)
        ("strided", [3.0, 4.0, 3.0, 6.0]),  # heads (1, 3) and (2, 4)
    ):
        y, logdet = head_linear(x, lengths, weight, layout=layout)
        torch.testing.assert_close(y, torch.tensor([[want, [0.0] * 4]], device=device))
        torch.testing.assert_close(logdet, torch.tensor([2 * math.log(3)], device=device))


@LAYOUTS
def test_inversion_and_jacobian(layout: str, device: torch.device) -> None:
    x, lengths = make_steps(4, 4, 12, torch.float64, device)
    weight = make_weight(4, torch.float64, device)
    y, logdet = head_linear(x, lengths, weight, layout=layout)
    back, negative = head_linear(y, lengths, weight, layout=layout, inverse=True)
    torch.testing.assert_close(back, without_padding(x, lengths))
    torch.testing.assert_close(negative, -logdet)
    want = log_abs_det_of_jacobian(
        lambda v: head_linear(v, lengths[:1], weight, layout=layout)[0], x[:1]
    )
    torch.testing.assert_close(logdet[0], want)


@BOTH
@LAYOUTS
def test_gradcheck(layout: str, inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(3, 3, 6, torch.float64, device)
    inputs = (without_padding(x, lengths), make_weight(3, torch.float64, device))
    torch.autograd.gradcheck(
        lambda x, w: head_linear(x, lengths, w, layout=layout, inverse=inverse),
        tuple(t.requires_grad_() for t in inputs),
    )


def test_given_factors_are_used(device: torch.device) -> None:
    x, lengths = make_steps(3, 5, 8, device=device)
    weights = make_parameters(3, 8, 4, device=device)[2]
    logdets, inverses = batched_logdet(weights)
    for inverse in (False, True):
        got = head_linear(
            x, lengths, weights[1], inverse=inverse, factors=(logdets[1], inverses[1])
        )
        want = head_linear(x, lengths, weights[1], inverse=inverse)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_do_not_matter(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    x, lengths = make_steps(5, 45, 24, dtype, device)
    weight = make_weight(12, dtype, device)
    assert_batch_mates_do_not_matter(
        lambda x, n: head_linear(x, n, weight, layout=layout), [x], lengths
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 6)}, "`x` must have 3 dimensions [B, T, C], got shape [2, 6]"),
    ({"weight": torch.zeros(3)}, "`weight` must have 2 dimensions [d, d], got shape [3]"),
    (
        {"weight": torch.eye(4)},
        "`weight` must be of a size that divides the 6 channels of `x`, got 4",
    ),
    ({"layout": "alternating"}, "`layout` must be one of contiguous, strided, got 'alternating'"),
]


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, 6),
        "lengths": torch.tensor([3, 1]),
        "weight": torch.eye(3),
    }
    with pytest.raises(ValueError) as error:
        head_linear(**(arguments | change))
    assert str(error.value) == f"head_linear: {message}"
