"""`actnorm` and `flow_linear` of squeezed steps: the same as `squeeze` and they, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pynar import reference
from pynar.ops import actnorm, flow_linear, squeeze, unsqueeze
from tests.ops.flow_checks import (
    DTYPES,
    assert_as_float64,
    assert_batch_mates_do_not_matter,
    assert_threads_do_not_matter,
    log_abs_det_of_jacobian,
    make_steps,
    same_bits,
    without_padding,
)
from tests.ops.test_flow_linear import make_parameters

BOTH = pytest.mark.parametrize("inverse", [False, True])
# The number of matrices; none is actnorm. 10 channels are no whole vector, 12 are a block of four.
MAPS = pytest.mark.parametrize("matrices", [0, 1, 3])

Map = Callable[..., tuple[Tensor, Tensor]]


def make_map(
    matrices: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    dim: int = 4,
) -> tuple[Map, Map, tuple[Tensor, ...]]:
    """The operator, its definition and its parameters."""
    parameters = make_parameters(max(matrices, 1), channels, dim, dtype, device)
    if matrices == 0:
        return actnorm, reference.actnorm, (parameters[0][0], parameters[1][0])
    return flow_linear, reference.flow_linear, parameters


def make_input(
    inverse: bool, factor: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> tuple[Tensor, Tensor, int]:
    """Steps apart, or joined ones for the inverse direction; lengths apart; joined channels.

    Of some sentences the last joined step is not full. What is beyond is NaN.
    """
    channels, steps = 12, 10
    apart, lengths = make_steps(5, steps * factor, channels // factor, dtype, device)
    if not inverse:
        return apart, lengths, channels
    joined = torch.randn(5, steps, channels).to(dtype)
    live = torch.arange(steps) < ((lengths.cpu() + factor - 1) // factor)[:, None]
    joined[~live] = torch.nan
    return joined.to(device), lengths, channels


def composed(function: Map, inverse: bool, factor: int) -> Map:
    def run(x: Tensor, lengths: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        joined = (lengths + factor - 1) // factor
        if not inverse:
            return function(squeeze(x, lengths, factor)[0], joined, *parameters)
        y, logdet = function(x, joined, *parameters, inverse=True)
        return unsqueeze(y, lengths, factor), logdet

    return run


def defined(function: Map, inverse: bool, factor: int) -> Map:
    """The same from definitions, for autograd."""

    def run(x: Tensor, lengths: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        joined = (lengths + factor - 1) // factor
        if not inverse:
            x = reference.squeeze(without_padding(x, lengths), lengths, factor, x.shape[2])[0]
            return function(x, joined, *parameters)
        y, logdet = function(without_padding(x, joined), joined, *parameters, inverse=True)
        steps = x.shape[1] * factor
        nothing = y.new_empty(len(y), steps, 0)
        return reference.unsqueeze(y, nothing, lengths, factor, steps), logdet

    return run


def assert_right(
    matrices: int, factor: int, dtype: torch.dtype, device: Any, inverse: bool
) -> None:
    x, lengths, channels = make_input(inverse, factor, dtype, device)
    function, definition, parameters = make_map(matrices, channels, dtype, device)
    assert_as_float64(
        lambda *a: function(a[0], lengths, *a[1:], inverse=inverse, squeeze=factor),
        lambda *a: defined(definition, inverse, factor)(a[0], lengths, *a[1:]),
        (x, *parameters),
        factor=8.0,
    )


@BOTH
@MAPS
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_autograd(
    dtype: torch.dtype, factor: int, matrices: int, inverse: bool, device: torch.device
) -> None:
    assert_right(matrices, factor, dtype, device, inverse)


@BOTH
@MAPS
def test_each_simd_level_matches(matrices: int, inverse: bool, simd_level: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(matrices, 2, dtype, "cpu", inverse)


@BOTH
@MAPS
def test_equals_the_two_one_after_the_other(
    matrices: int, inverse: bool, device: torch.device
) -> None:
    x, lengths, channels = make_input(inverse, 2, device=device)
    function, _, parameters = make_map(matrices, channels, device=device)
    got = function(x, lengths, *parameters, inverse=inverse, squeeze=2)
    want = composed(function, inverse, 2)(x, lengths, *parameters)
    # Without a chain the channels at the end of a row, or a single matrix, round in another place.
    exact = same_bits(device) if matrices == 3 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0], want[0], **exact)
    torch.testing.assert_close(got[1], want[1])


@MAPS
def test_inversion_and_jacobian(matrices: int, device: torch.device) -> None:
    x, lengths = make_steps(4, 6, 6, torch.float64, device)
    lengths = lengths // 2 * 2  # else a joined step has channels that are not in x
    function, _, parameters = make_map(matrices, 12, torch.float64, device)
    y, logdet = function(x, lengths, *parameters, squeeze=2)
    back, negative = function(y, lengths, *parameters, inverse=True, squeeze=2)
    assert y.shape == (4, 3, 12)
    torch.testing.assert_close(back, without_padding(x, lengths))
    torch.testing.assert_close(negative, -logdet)
    want = log_abs_det_of_jacobian(
        lambda v: function(v, lengths[:1], *parameters, squeeze=2)[0], x[:1]
    )
    torch.testing.assert_close(logdet[0], want)


@BOTH
@MAPS
def test_gradcheck(matrices: int, inverse: bool, device: torch.device) -> None:
    x, lengths, channels = make_input(inverse, 2, torch.float64, device)
    x, lengths = x[:3, :4], lengths[:3].clamp_max(8 if inverse else 3)
    x = without_padding(x, (lengths + 1) // 2 if inverse else lengths)
    function, _, parameters = make_map(matrices, channels, torch.float64, device)
    torch.autograd.gradcheck(
        lambda *a: function(a[0], lengths, *a[1:], inverse=inverse, squeeze=2),
        tuple(t.requires_grad_() for t in (x, *parameters)),
    )


@BOTH
@MAPS
def test_batch_mates_do_not_matter(matrices: int, inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(5, 8, 12, device=device)
    lengths = lengths // 2 * 2
    function, _, parameters = make_map(matrices, 24, device=device)
    if inverse:
        x = squeeze(without_padding(x, lengths), lengths)[0]

    def run(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        # Cut to its length, in whichever steps they come.
        return function(
            x[:, : x.shape[1] // 2] if inverse and len(x) == 1 else x,
            lengths,
            *parameters,
            inverse=inverse,
            squeeze=2,
        )

    if inverse:
        x = torch.cat([x, torch.full_like(x, torch.nan)], 1)  # as wide as the lengths say

    assert_batch_mates_do_not_matter(run, [x], lengths)


@MAPS
def test_threads_do_not_matter(matrices: int) -> None:
    x, lengths = make_steps(9, 90, 16)
    function, _, parameters = make_map(matrices, 32)
    leaves = [t.requires_grad_() for t in (x, *parameters)]

    def run() -> tuple[Tensor, ...]:
        y, logdet = function(leaves[0], lengths, *leaves[1:], squeeze=2)
        return (y, *torch.autograd.grad(y.square().sum() + logdet.sum(), leaves))

    assert_threads_do_not_matter(run)


@MAPS
def test_reads_a_part_of_the_channels(matrices: int, device: torch.device) -> None:
    """As between levels: of each step the first channels go on."""
    x, lengths = make_steps(3, 8, 12, device=device)
    function, _, parameters = make_map(matrices, 12, device=device)
    for view in (x[..., :6], x[..., ::2], x[:, :, :1].expand(3, 8, 6)):
        got = function(view, lengths, *parameters, squeeze=2)
        want = function(view.contiguous(), lengths, *parameters, squeeze=2)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@BOTH
@MAPS
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)])
def test_nothing_to_do(
    shape: tuple[int, ...], matrices: int, inverse: bool, device: torch.device
) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
    function, _, parameters = make_map(matrices, 6 if inverse else 12, device=device, dim=2)
    parameters = tuple(t.requires_grad_() for t in parameters)
    y, logdet = function(x, lengths, *parameters, inverse=inverse, squeeze=2)
    batch, steps, channels = shape
    assert y.shape == ((batch, 2 * steps, 3) if inverse else (batch, steps // 2, 12))
    assert logdet.tolist() == [0] * batch
    (y.sum() + logdet.sum()).backward()
    assert parameters[1].grad is not None
    assert not parameters[1].grad.any()


@BOTH
def test_registered_rightly(inverse: bool, device: torch.device) -> None:
    x, lengths, channels = make_input(inverse, 2, device=device)
    joined = (lengths + 1) // 2
    x = without_padding(x, joined if inverse else lengths)
    y = squeeze(x, lengths)[0] if not inverse else unsqueeze(x, lengths)
    log_scale, bias, weight = make_parameters(2, channels, 4, device=device)
    norm = lengths, log_scale[0], bias[0], inverse, 2
    torch.library.opcheck(torch.ops.pynar.actnorm.default, (x, *norm))
    torch.library.opcheck(torch.ops.pynar.actnorm_backward.default, (y, x, *norm))
    chain = lengths, log_scale, bias, weight, "alternating", inverse, 2
    torch.library.opcheck(torch.ops.pynar.flow_linear.default, ("f", x, *chain))
    torch.library.opcheck(torch.ops.pynar.flow_linear_backward.default, ("f", y, x, *chain))


@BOTH
@MAPS
def test_compiles_into_one_graph(matrices: int, inverse: bool, device: torch.device) -> None:
    x, lengths, channels = make_input(inverse, 2, device=device)
    x = without_padding(x, (lengths + 1) // 2 if inverse else lengths)
    function, _, parameters = make_map(matrices, channels, device=device)
    leaves = [t.requires_grad_() for t in (x, *parameters)]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return function(leaves[0], lengths, *leaves[1:], inverse=inverse, squeeze=2)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, want)
    ones = [torch.ones_like(t) for t in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, ones), torch.autograd.grad(want, leaves, ones)
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"squeeze": 0}, "`squeeze` must be at least 1, got 0"),
    ({"squeeze": 3}, "`x` must have a multiple of 3 steps (`squeeze`), got 4"),
    ({"squeeze": 2**62}, f"`x` must have a multiple of {2**62} steps (`squeeze`), got 4"),
    (
        {"x": torch.zeros(2, 4, 9), "inverse": True},
        "`x` must have a multiple of 2 channels (`squeeze`), got 9",
    ),
    (
        {"x": torch.zeros(2, 4, 12), "inverse": True, "lengths": torch.tensor([9, 8])},
        "`lengths` must have values in [0, 8], got 9 (sentence 0)",
    ),
    (
        {"lengths": torch.tensor([3, 5])},
        "`lengths` must have values in [0, 4], got 5 (sentence 1)",
    ),
]


@MAPS
def test_a_wrong_call_is_seen_when_compiled(matrices: int) -> None:
    function, _, parameters = make_map(matrices, 12)
    for factor in (0, 3):
        with FakeTensorMode() as mode, pytest.raises(ValueError, match="`(squeeze|x)` must"):
            tensors = map(
                mode.from_tensor, (torch.zeros(2, 4, 6), torch.tensor([4, 1]), *parameters)
            )
            function(*tensors, squeeze=factor)


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[m for _, m in REJECTED])
@pytest.mark.parametrize("matrices", [0, 2])
def test_a_wrong_call_says_what_is_wanted(
    matrices: int, change: dict[str, Any], message: str
) -> None:
    function, _, parameters = make_map(matrices, 12)
    arguments = {"x": torch.zeros(2, 4, 6), "lengths": torch.tensor([4, 1]), "squeeze": 2} | change
    with pytest.raises(ValueError) as error:
        function(arguments.pop("x"), arguments.pop("lengths"), *parameters, **arguments)
    assert str(error.value) == f"{function.__name__}: {message}"
