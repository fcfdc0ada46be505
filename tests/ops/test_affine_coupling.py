from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.ops import affine_coupling
from tests.ops.flow_checks import (
    DTYPES,
    assert_as_float64,
    assert_batch_mates_do_not_matter,
    assert_threads_do_not_matter,
    log_abs_det_of_jacobian,
    make_steps,
    without_padding,
)

BOTH = pytest.mark.parametrize("inverse", [False, True])
Arguments = tuple[Tensor, Tensor, Tensor]


def make_arguments(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> tuple[Arguments, Tensor]:
    """`z`, `shift`, `raw_scale`, all NaN in the padding; and lengths."""
    z, lengths = make_steps(*shape, dtype, device)
    return (z, make_steps(*shape, dtype, device)[0], 2 * make_steps(*shape, dtype, device)[0]), (
        lengths
    )


def assert_right(
    shape: tuple[int, int, int], dtype: torch.dtype, device: Any, inverse: bool
) -> None:
    arguments, lengths = make_arguments(shape, dtype, device)
    assert_as_float64(
        lambda z, b, r: affine_coupling(z, lengths, b, r, inverse=inverse),
        lambda *a: reference.affine_coupling(
            without_padding(a[0], lengths),
            lengths,
            *(without_padding(x, lengths) for x in a[1:]),
            inverse=inverse,
        ),
        arguments,
    )


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 33), (5, 40, 130)])
def test_matches_float64_autograd(
    shape: tuple[int, int, int], dtype: torch.dtype, inverse: bool, device: torch.device
) -> None:
    assert_right(shape, dtype, device, inverse)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_simd_level_matches(dtype: torch.dtype, inverse: bool, simd_level: str) -> None:
    assert_right((3, 9, 70), dtype, "cpu", inverse)


def test_by_hand(device: torch.device) -> None:
    # Scales of 1/2, 1/4 and 9/10.
    raw_scale = torch.tensor([[[0.0], [-math.log(3)], [math.log(9)]]], device=device) - 2
    z, shift = torch.full_like(raw_scale, 4), torch.ones_like(raw_scale)
    lengths = torch.tensor([3], device=device)
    y, logdet = affine_coupling(z, lengths, shift, raw_scale)
    torch.testing.assert_close(y, torch.tensor([[[3.0], [2.0], [4.6]]], device=device))
    torch.testing.assert_close(logdet, torch.tensor([math.log(0.1125)], device=device))


def test_scales_far_from_one(device: torch.device) -> None:
    """Where exponentials under- and overflow the logarithm is still the number that went in."""
    raw_scale = torch.tensor([[[-302.0], [-80.0], [80.0], [298.0]]], device=device)
    z = torch.ones_like(raw_scale)
    y, logdet = affine_coupling(z, torch.tensor([4], device=device), z * 0, raw_scale)
    torch.testing.assert_close(y.flatten().tolist(), [0.0, math.exp(-78.0), 1.0, 1.0])
    torch.testing.assert_close(logdet.tolist(), [-378.0])


@BOTH
def test_inversion_and_jacobian(inverse: bool, device: torch.device) -> None:
    (z, shift, raw_scale), lengths = make_arguments((4, 6, 5), torch.float64, device)
    y, logdet = affine_coupling(z, lengths, shift, raw_scale, inverse=inverse)
    back, negative = affine_coupling(y, lengths, shift, raw_scale, inverse=not inverse)
    torch.testing.assert_close(back, without_padding(z, lengths))
    torch.testing.assert_close(negative, -logdet)
    want = log_abs_det_of_jacobian(
        lambda v: affine_coupling(v, lengths[:1], shift[:1], raw_scale[:1], inverse=inverse)[0],
        z[:1],
    )
    torch.testing.assert_close(logdet[0], want)


@BOTH
def test_gradcheck(inverse: bool, device: torch.device) -> None:
    arguments, lengths = make_arguments((3, 3, 2), torch.float64, device)
    torch.autograd.gradcheck(
        lambda z, b, r: affine_coupling(z, lengths, b, r, inverse=inverse),
        tuple(without_padding(x, lengths).requires_grad_() for x in arguments),
    )


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_do_not_matter(dtype: torch.dtype, inverse: bool, device: torch.device) -> None:
    arguments, lengths = make_arguments((5, 9, 33), dtype, device)

    def run(z: Tensor, b: Tensor, r: Tensor, g: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (z, b, r)]
        y, logdet = affine_coupling(leaves[0], lengths, *leaves[1:], inverse=inverse)
        grads = torch.autograd.grad((y, logdet), leaves, (g, torch.ones_like(logdet)))
        return y.detach(), logdet.detach(), *grads

    assert_batch_mates_do_not_matter(run, [*arguments, torch.randn_like(arguments[0])], lengths)


def test_threads_do_not_matter() -> None:
    arguments, lengths = make_arguments((9, 100, 70))
    leaves = [x.requires_grad_() for x in arguments]

    def run() -> tuple[Tensor, ...]:
        y, logdet = affine_coupling(leaves[0], lengths, *leaves[1:])
        return (y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), leaves))

    assert_threads_do_not_matter(run)


def test_strided_arguments_equal_their_copies(device: torch.device) -> None:
    wide, lengths = make_steps(3, 8, 60, device=device)
    shift, raw_scale = wide[..., :40].chunk(2, -1)
    for z in (wide[..., 40:], wide[..., 1:41:2], wide[:, :, :1].expand(3, 8, 20)):
        got = affine_coupling(z, lengths, shift, raw_scale)
        want = affine_coupling(z.contiguous(), lengths, shift.contiguous(), raw_scale.contiguous())
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
    y, logdet = affine_coupling(x, lengths, x, x)
    assert y.shape == shape
    assert logdet.tolist() == [0] * shape[0]
    (y.sum() + logdet.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_registered_rightly(device: torch.device) -> None:
    arguments, lengths = make_arguments((3, 4, 5), device=device)
    z, b, r = (without_padding(x, lengths) for x in arguments)
    torch.library.opcheck(torch.ops.pynar.affine_coupling.default, (z, lengths, b, r, False))
    backward = torch.ops.pynar.affine_coupling_backward.default
    torch.library.opcheck(backward, (z, torch.ones(3, device=device), b, r, lengths, True))


def test_compiles_into_one_graph(device: torch.device) -> None:
    arguments, lengths = make_arguments((3, 4, 5), device=device)
    leaves = [without_padding(x, lengths).requires_grad_() for x in arguments]

    def run(z: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(z, lengths, b, r, inverse=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    ones = [torch.ones_like(t) for t in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, ones), torch.autograd.grad(want, leaves, ones)
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"z": torch.zeros(2, 5)}, "`z` must have 3 dimensions [B, T, C], got shape [2, 5]"),
    ({"z": torch.zeros(2, 3, 0)}, "`z` must have at least one channel, got 0"),
    (
        {"lengths": torch.tensor([3, 4])},
        "`lengths` must have values in [0, 3], got 4 (sentence 1)",
    ),
    (
        {"shift": torch.zeros(2, 3, 4)},
        "`shift` must have shape [2, 3, 5] (that of `z`), got [2, 3, 4]",
    ),
    (
        {"raw_scale": torch.zeros(2, 3, 5).double()},
        "`raw_scale` must have dtype float32, got float64",
    ),
]


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "z": torch.zeros(2, 3, 5),
        "lengths": torch.tensor([3, 1]),
        "shift": torch.zeros(2, 3, 5),
        "raw_scale": torch.zeros(2, 3, 5),
    }
    with pytest.raises(ValueError) as error:
        affine_coupling(**(arguments | change))
    assert str(error.value) == f"affine_coupling: {message}"
