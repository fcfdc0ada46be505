from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.ops import squeeze, squeeze_split, unsqueeze, unsqueeze_join
from tests.ops.flow_checks import DTYPES, assert_threads_do_not_matter, make_steps, without_padding

SHAPES = pytest.mark.parametrize(
    ("shape", "factor", "kept"),
    [
        ((1, 1, 1), 2, 1),
        ((3, 7, 10), 2, 5),
        ((5, 9, 33), 3, 20),
        ((2, 8, 6), 4, 6),
        ((2, 5, 4), 1, 3),
    ],
)


def brute_force(x: Tensor, lengths: Tensor, factor: int, kept: int) -> tuple[Tensor, Tensor]:
    batch, steps, channels = x.shape
    y = x.new_zeros(batch, -(-steps // factor), factor * kept)
    dropped = x.new_zeros(batch, steps, channels - kept)
    for b in range(batch):
        for t in range(int(lengths[b])):
            at = t % factor * kept
            y[b, t // factor, at : at + kept] = x[b, t, :kept]
            dropped[b, t] = x[b, t, kept:]
    return y, dropped


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_brute_force_and_is_undone(
    shape: tuple[int, int, int], factor: int, kept: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, lengths = make_steps(*shape, dtype, device)
    y, dropped, new_lengths = squeeze_split(x, lengths, kept, factor)
    want = brute_force(x, lengths, factor, kept)
    exact: Any = {"rtol": 0, "atol": 0}
    torch.testing.assert_close((y, dropped), want, **exact)
    torch.testing.assert_close(reference.squeeze(x, lengths, factor, kept), want, **exact)
    assert new_lengths.tolist() == [-(-n // factor) for n in lengths.tolist()]
    back = unsqueeze_join(y, dropped, lengths, factor)
    torch.testing.assert_close(back, without_padding(x, lengths), **exact)
    torch.testing.assert_close(
        reference.unsqueeze(y, dropped, lengths, factor, shape[1]), back, **exact
    )


def test_padding_of_what_is_joined_is_inert(device: torch.device) -> None:
    x, lengths = make_steps(5, 8, 6, device=device)
    y, dropped, _ = squeeze_split(x, lengths, 4)
    want = unsqueeze_join(y, dropped, lengths)
    for b, n in enumerate(lengths.tolist()):
        y[b, -(-n // 2) :] = torch.nan
        dropped[b, n:] = torch.nan
        if n % 2:
            y[b, n // 2, 4:] = torch.nan
    torch.testing.assert_close(unsqueeze_join(y, dropped, lengths), want, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_without_a_split(factor: int, device: torch.device) -> None:
    x, lengths = make_steps(3, 7, 5, device=device)
    y, new_lengths = squeeze(x, lengths, factor)
    want, _, same_lengths = squeeze_split(x, lengths, 5, factor)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    torch.testing.assert_close(new_lengths, same_lengths)
    back = unsqueeze(y, lengths, factor)
    assert back.shape == (3, y.shape[1] * factor, 5)
    torch.testing.assert_close(back[:, :7], without_padding(x, lengths), rtol=0, atol=0)
    assert not back[:, 7:].any()


@pytest.mark.parametrize(("factor", "kept"), [(2, 2), (3, 3)])
def test_gradcheck(factor: int, kept: int, device: torch.device) -> None:
    x, lengths = make_steps(3, 4, 3, torch.float64, device)
    x = without_padding(x, lengths).requires_grad_()
    torch.autograd.gradcheck(lambda x: squeeze_split(x, lengths, kept, factor)[:2], (x,))
    y, dropped = (
        torch.randn_like(t).requires_grad_() for t in squeeze_split(x, lengths, kept, factor)[:2]
    )
    torch.autograd.gradcheck(lambda y, d: unsqueeze_join(y, d, lengths, factor), (y, dropped))


def test_threads_do_not_matter() -> None:
    x, lengths = make_steps(9, 101, 70)
    assert_threads_do_not_matter(lambda: squeeze_split(x, lengths, 40, 2)[:2])


def test_strided_arguments_equal_their_copies(device: torch.device) -> None:
    wide, lengths = make_steps(3, 8, 60, device=device)
    exact: Any = {"rtol": 0, "atol": 0}
    for x in (wide[..., 7:27], wide[..., ::3], wide[:, :, :1].expand(3, 8, 20)):
        want = squeeze_split(x.contiguous(), lengths, 12)
        torch.testing.assert_close(squeeze_split(x, lengths, 12), want, **exact)
    y, dropped = wide[:, :4, 3:27], wide[..., 10:20]
    want_x = unsqueeze_join(y.contiguous(), dropped.contiguous(), lengths)
    torch.testing.assert_close(unsqueeze_join(y, dropped, lengths), want_x, **exact)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
    x = torch.zeros(shape, device=device, requires_grad=True)
    y, dropped, _ = squeeze_split(x, lengths, 2)
    assert y.shape == (shape[0], shape[1] // 2, 4)
    back = unsqueeze_join(y, dropped, lengths)
    assert back.shape == shape
    back.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_registered_rightly(device: torch.device) -> None:
    x, lengths = make_steps(3, 5, 6, device=device)
    x = without_padding(x, lengths)
    torch.library.opcheck(torch.ops.pynar.squeeze.default, (x, lengths, 2, 4))
    y, dropped, _ = squeeze_split(x, lengths, 4)
    torch.library.opcheck(torch.ops.pynar.unsqueeze.default, ("u", y, dropped, lengths, 2, 5))


def test_compiles_into_one_graph(device: torch.device) -> None:
    x, lengths = make_steps(3, 5, 6, device=device)
    leaf = without_padding(x, lengths).requires_grad_()

    def run(x: Tensor) -> Tensor:
        y, dropped, _ = squeeze_split(x * 2, lengths, 4)
        return unsqueeze_join(y, dropped, lengths)

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(got, leaf * 2, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    torch.testing.assert_close(grad, without_padding(torch.full_like(x, 2), lengths))


X = torch.zeros(2, 4, 6)
LENGTHS = torch.tensor([4, 1])
REJECTED: list[tuple[Any, tuple[Any, ...], str]] = [
    (squeeze, (X[0], LENGTHS), "squeeze: `x` must have 3 dimensions [B, T, C], got shape [4, 6]"),
    (squeeze, (X, LENGTHS, 0), "squeeze: `factor` must be at least 1, got 0"),
    (
        squeeze_split,
        (X, LENGTHS, 7),
        "squeeze: `kept` must be in [1, 6] (channels of `x`), got 7",
    ),
    (
        squeeze,
        (X, LENGTHS + 1),
        "squeeze: `lengths` must have values in [0, 4], got 5 (sentence 0)",
    ),
    (
        unsqueeze,
        (X, LENGTHS, 4),
        "unsqueeze: `y` must have a multiple of 4 channels (`factor`), got 6",
    ),
    (
        unsqueeze_join,
        (X, X, LENGTHS),
        "unsqueeze_join: `y` must have shape [2, 2, 6] (batch and steps of `dropped`, joined), "
        "got [2, 4, 6]",
    ),
    (
        unsqueeze_join,
        (X[:, :2], X.double(), LENGTHS),
        "unsqueeze_join: `dropped` must have dtype float32, got float64",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), REJECTED)
def test_a_wrong_call_says_what_is_wanted(
    function: Any, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert str(error.value) == message
