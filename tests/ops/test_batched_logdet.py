from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pynar.ops import batched_logdet
from pynar.testing import tolerance
from tests.ops.flow_checks import assert_threads_do_not_matter, same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def assert_right(weights: Tensor) -> None:
    logdet, inverse = batched_logdet(weights)
    exact = weights.double()
    # The error of an inverse is that of the matrix times its condition.
    condition = float(torch.linalg.cond(exact).max()) if weights.numel() else 1.0
    limit = tolerance(weights.device, weights.dtype)["rtol"] * condition
    want = torch.linalg.inv(exact)
    scale = float(want.abs().max()) if weights.numel() else 1.0
    torch.testing.assert_close(
        logdet.double(), torch.linalg.slogdet(exact)[1], rtol=limit, atol=limit
    )
    torch.testing.assert_close(inverse.double(), want, rtol=limit, atol=limit * scale)


@DTYPES
@pytest.mark.parametrize(("count", "dim"), [(1, 1), (7, 2), (5, 7), (3, 33), (2, 64), (1, 130)])
def test_matches_float64(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    # Well conditioned, but with rows that have to be exchanged.
    orthogonal = torch.linalg.qr(torch.randn(count, dim, dim))[0]
    assert_right((orthogonal + 0.05 * torch.randn(count, dim, dim)).to(device, dtype))


@DTYPES
def test_each_simd_level_matches(dtype: torch.dtype, simd_level: str) -> None:
    for dim in (5, 16, 33):
        assert_right(torch.linalg.qr(torch.randn(3, dim, dim))[0].to(dtype))


def test_by_hand(device: torch.device) -> None:
    weights = torch.tensor(
        [[[0.0, 2.0], [-4.0, 0.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [2.0, 4.0]]],
        device=device,
    )
    logdet, inverse = batched_logdet(weights)
    want = torch.tensor([math.log(8), math.log(2), -math.inf], device=device)
    torch.testing.assert_close(logdet, want)
    want = torch.tensor([[[0.0, -0.25], [0.5, 0.0]], [[-2.0, 1.0], [1.5, -0.5]]], device=device)
    torch.testing.assert_close(inverse[:2], want)
    assert inverse[2].isnan().all()


def test_nan_stays_with_its_matrix(device: torch.device) -> None:
    weights = torch.eye(5, device=device).repeat(3, 1, 1)
    weights[1, 3, 2] = torch.nan
    logdet, inverse = batched_logdet(weights)
    assert logdet.isnan().tolist() == [False, True, False]
    assert inverse[1].isnan().any()
    torch.testing.assert_close(inverse[::2], weights[::2])


def test_gradcheck(device: torch.device) -> None:
    weights = torch.randn(3, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(batched_logdet, (weights,))
    torch.autograd.gradcheck(lambda w: batched_logdet(w)[0], (weights,))
    torch.autograd.gradcheck(lambda w: batched_logdet(w)[1], (weights,))


def test_matrices_do_not_depend_on_their_batch(device: torch.device) -> None:
    weights = torch.randn(20, 32, 32, device=device)
    logdet, inverse = batched_logdet(weights)
    for n in (0, 7, 19):
        alone = batched_logdet(weights[n : n + 1])
        torch.testing.assert_close(
            alone, (logdet[n : n + 1], inverse[n : n + 1]), **same_bits(device)
        )


def test_threads_do_not_matter() -> None:
    weights = torch.randn(50, 32, 32)
    assert_threads_do_not_matter(lambda: batched_logdet(weights))


def test_strided_matrices_equal_their_copies(device: torch.device) -> None:
    weights = torch.randn(4, 6, 6, device=device)
    for view in (weights.mT, weights[::2], weights[:, :3, ::2], weights[:1].expand(3, 6, 6)):
        got, want = batched_logdet(view), batched_logdet(view.contiguous())
        torch.testing.assert_close(got, want, **same_bits(device))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0)])
def test_nothing_to_do(shape: tuple[int, int, int], device: torch.device) -> None:
    weights = torch.zeros(shape, device=device, requires_grad=True)
    logdet, inverse = batched_logdet(weights)
    assert logdet.tolist() == [0] * shape[0]
    assert inverse.shape == shape
    (logdet.sum() + inverse.sum()).backward()
    assert weights.grad is not None


def test_registered_rightly(device: torch.device) -> None:
    torch.library.opcheck(
        torch.ops.pynar.batched_logdet.default, (torch.randn(3, 4, 4, device=device),)
    )


def test_compiles_into_one_graph(device: torch.device) -> None:
    weights = torch.randn(3, 4, 4, device=device, requires_grad=True)
    compiled = torch.compile(batched_logdet, fullgraph=True, backend="aot_eager")
    got, want = compiled(weights), batched_logdet(weights)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got[0].sum(), weights), torch.autograd.grad(want[0].sum(), weights)
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(3, 3), "`weights` must have 3 dimensions [N, d, d], got shape [3, 3]"),
        (
            torch.zeros(2, 3, 4),
            "`weights` must have shape [2, 3, 3] (square matrices), got [2, 3, 4]",
        ),
        (torch.zeros(1, 2, 2).half(), "`weights` must have dtype float32 or float64, got float16"),
    ],
)
def test_a_wrong_call_says_what_is_wanted(weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        batched_logdet(weights)
    assert str(error.value) == f"batched_logdet: {message}"
