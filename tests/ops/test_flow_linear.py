from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.ops import actnorm, batched_logdet, flow_linear, head_linear
from tests.ops.flow_checks import (
    DTYPES,
    accumulation,
    assert_as_float64,
    assert_batch_mates_do_not_matter,
    assert_threads_do_not_matter,
    log_abs_det_of_jacobian,
    make_steps,
    same_bits,
    without_padding,
)

BOTH = pytest.mark.parametrize("inverse", [False, True])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "strided", "alternating"])


def make_parameters(
    steps: int, channels: int, dim: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices whose singular values lie between 1/2 and 3/2, as those of a trained flow would."""
    kind = {"dtype": accumulation(dtype)}
    log_scale = torch.randn(steps, channels, **kind) / 4
    left, right = (torch.linalg.qr(torch.randn(steps, dim, dim, **kind))[0] for _ in "lr")
    weight = left * (0.5 + torch.rand(steps, 1, dim, **kind)) @ right
    return tuple(t.to(device) for t in (log_scale, torch.randn_like(log_scale), weight))  # type: ignore[return-value]


def assert_right(
    shape: tuple[int, int, int],
    dim: int,
    steps: int,
    dtype: torch.dtype,
    device: Any,
    layout: str,
    inverse: bool,
) -> None:
    x, lengths = make_steps(*shape, dtype, device)
    options: dict[str, Any] = {"layout": layout, "inverse": inverse}
    assert_as_float64(
        lambda *a: flow_linear(a[0], lengths, *a[1:], **options),
        lambda *a: reference.flow_linear(
            without_padding(a[0], lengths), lengths, *a[1:], **options
        ),
        (x, *make_parameters(steps, shape[2], dim, dtype, device)),
        # The condition of the matrices, times as many as there are.
        factor=8.0,
    )


# 1, 5 and 12 are no whole vectors, 32 steps of a batch are one block.
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim", "steps", "layout"),
    [
        ((1, 1, 1), 1, 1, "contiguous"),
        ((3, 7, 30), 5, 2, "alternating"),
        ((5, 20, 24), 12, 3, "strided"),
        ((2, 40, 64), 32, 2, "alternating"),
    ],
)
def test_matches_float64_autograd(
    shape: tuple[int, int, int],
    dim: int,
    steps: int,
    layout: str,
    dtype: torch.dtype,
    inverse: bool,
    device: torch.device,
) -> None:
    assert_right(shape, dim, steps, dtype, device, layout, inverse)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_simd_level_matches(dtype: torch.dtype, inverse: bool, simd_level: str) -> None:
    for dim in (3, 8):
        assert_right((3, 15, 24), dim, 2, dtype, "cpu", "alternating", inverse)


@BOTH
@LAYOUTS
def test_equals_its_steps_one_by_one(layout: str, inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(3, 9, 32, device=device)
    scale, bias, weight = make_parameters(4, 32, 8, device=device)
    got, logdet = flow_linear(x, lengths, scale, bias, weight, layout=layout, inverse=inverse)
    want, total = x, torch.zeros_like(logdet)
    for k in reversed(range(4)) if inverse else range(4):
        name = layout if layout != "alternating" else ("contiguous", "strided")[k % 2]
        norm = lambda h, k=k: actnorm(h, lengths, scale[k], bias[k], inverse=inverse)  # noqa: E731
        linear = lambda h, k=k, name=name: head_linear(  # noqa: E731
            h, lengths, weight[k], layout=name, inverse=inverse
        )
        for step in (linear, norm) if inverse else (norm, linear):
            want, part = step(want)
            total = total + part
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logdet, total, rtol=1e-4, atol=1e-4)


@LAYOUTS
def test_inversion_and_jacobian(layout: str, device: torch.device) -> None:
    x, lengths = make_steps(4, 4, 12, torch.float64, device)
    parameters = make_parameters(3, 12, 4, torch.float64, device)
    y, logdet = flow_linear(x, lengths, *parameters, layout=layout)
    back, negative = flow_linear(y, lengths, *parameters, layout=layout, inverse=True)
    torch.testing.assert_close(back, without_padding(x, lengths))
    torch.testing.assert_close(negative, -logdet)
    one = lengths[:1]
    want = log_abs_det_of_jacobian(
        lambda v: flow_linear(v, one, *parameters, layout=layout)[0], x[:1]
    )
    torch.testing.assert_close(logdet[0], want)


@BOTH
def test_gradcheck(inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(3, 3, 6, torch.float64, device)
    inputs = (without_padding(x, lengths), *make_parameters(2, 6, 3, torch.float64, device))
    torch.autograd.gradcheck(
        lambda *a: flow_linear(a[0], lengths, *a[1:], inverse=inverse),
        tuple(t.requires_grad_() for t in inputs),
    )


def test_given_factors_are_used_and_carry_gradients(device: torch.device) -> None:
    x, lengths = make_steps(2, 5, 16, device=device)
    scale, bias, weight = make_parameters(2, 16, 8, device=device)
    grads = []
    for given in (False, True):
        leaf = weight.clone().requires_grad_()
        factors = batched_logdet(leaf) if given else None
        y, logdet = flow_linear(x, lengths, scale, bias, leaf, inverse=True, factors=factors)
        grads.append(torch.autograd.grad(y.square().sum() + logdet.sum(), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    wrong = (torch.zeros(2, device=device), torch.zeros_like(weight))
    y, logdet = flow_linear(x, lengths, scale * 0, bias * 0, weight, inverse=True, factors=wrong)
    assert not y.any()
    assert not logdet.any()


def test_memory_of_gradients_does_not_grow_with_the_steps() -> None:
    x, lengths = make_steps(2, 16, 32)
    saved = []
    for steps in (1, 20):
        parameters = make_parameters(steps, 32, 8)
        by_step: list[int] = []

        def pack(t: Tensor, by_step: list[int] = by_step) -> Tensor:
            by_step.extend([t.numel()] if t.dim() == 3 and t.shape[:2] == x.shape[:2] else [])
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            flow_linear(x.requires_grad_(), lengths, *parameters)
        saved.append(sum(by_step))
    assert saved == [x.numel()] * 2


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_do_not_matter(dtype: torch.dtype, inverse: bool, device: torch.device) -> None:
    x, lengths = make_steps(5, 45, 24, dtype, device)
    parameters = make_parameters(3, 24, 12, dtype, device)

    def run(x: Tensor, g: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y, logdet = flow_linear(leaf, lengths, *parameters, inverse=inverse)
        return y.detach(), logdet.detach(), *torch.autograd.grad(y, leaf, g)

    assert_batch_mates_do_not_matter(run, [x, torch.randn_like(x)], lengths)


def test_threads_do_not_matter() -> None:
    x, lengths = make_steps(9, 90, 32)
    leaves = [t.requires_grad_() for t in (x, *make_parameters(2, 32, 8))]

    def run() -> tuple[Tensor, ...]:
        y, logdet = flow_linear(leaves[0], lengths, *leaves[1:])
        return (y, *torch.autograd.grad(y.square().sum() + logdet.sum(), leaves))

    assert_threads_do_not_matter(run)


def test_strided_arguments_equal_their_copies(device: torch.device) -> None:
    x, lengths = make_steps(3, 8, 40, device=device)
    scale, bias, weight = (t[::2] for t in make_parameters(4, 16, 8, device=device))
    for view in (x[:, :, 3:19], x[..., :32:2], x[:, :, :1].expand(3, 8, 16)):
        got = flow_linear(view, lengths, scale, bias, weight.mT)
        copies = [t.contiguous() for t in (view, scale, bias, weight.mT)]
        want = flow_linear(copies[0], lengths, *copies[1:])
        torch.testing.assert_close(got[0], want[0], **same_bits(device))
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize(("shape", "steps"), [((0, 4, 4), 2), ((2, 0, 4), 2), ((2, 3, 4), 0)])
@BOTH
def test_nothing_to_do(
    shape: tuple[int, ...], steps: int, inverse: bool, device: torch.device
) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    lengths = torch.full(shape[:1], shape[1], device=device)
    parameters = [t.requires_grad_() for t in make_parameters(steps, 4, 2, device=device)]
    y, logdet = flow_linear(x, lengths, *parameters, inverse=inverse)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    (y.sum() + logdet.sum()).backward()
    assert parameters[2].grad is not None
    assert x.grad is not None
    assert (x.grad == 1).all()


def test_registered_rightly(device: torch.device) -> None:
    x, lengths = make_steps(3, 4, 8, device=device)
    x, parameters = without_padding(x, lengths), make_parameters(2, 8, 4, device=device)
    for parts in (parameters, (None, None, parameters[2])):
        arguments = (lengths, *parts, "alternating", True, 1)
        torch.library.opcheck(torch.ops.pynar.flow_linear.default, ("f", x, *arguments))
        backward = torch.ops.pynar.flow_linear_backward.default
        torch.library.opcheck(backward, ("f", x, x, *arguments))


def test_compiles_into_one_graph(device: torch.device) -> None:
    x, lengths = make_steps(3, 4, 8, device=device)
    parameters = make_parameters(2, 8, 4, device=device)
    leaves = [t.requires_grad_() for t in (without_padding(x, lengths), *parameters)]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return flow_linear(leaves[0], lengths, *leaves[1:])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, want)
    ones = [torch.ones_like(t) for t in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, ones), torch.autograd.grad(want, leaves, ones)
    )


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 6)}, "`x` must have 3 dimensions [B, T, C], got shape [2, 6]"),
    (
        {"lengths": torch.tensor([3, -1])},
        "`lengths` must have values in [0, 3], got -1 (sentence 1)",
    ),
    ({"weight": torch.zeros(3, 3)}, "`weight` must have 3 dimensions [K, d, d], got shape [3, 3]"),
    (
        {"weight": torch.eye(4).expand(2, 4, 4)},
        "`weight` must be of a size that divides the 6 channels of `x`, got 4",
    ),
    (
        {"x": torch.zeros(2, 3, 6).double()},
        "`weight` must have dtype float64, got float32",
    ),
    (
        {"log_scale": torch.zeros(1, 6)},
        "`log_scale` must have shape [2, 6] (steps of `weight`, channels of `x`), got [1, 6]",
    ),
    (
        {"layout": "interleaved"},
        "`layout` must be one of contiguous, strided, alternating, got 'interleaved'",
    ),
]


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, 6),
        "lengths": torch.tensor([3, 1]),
        "log_scale": torch.zeros(2, 6),
        "bias": torch.zeros(2, 6),
        "weight": torch.eye(3).expand(2, 3, 3),
    }
    with pytest.raises(ValueError) as error:
        flow_linear(**(arguments | change))
    assert str(error.value) == f"flow_linear: {message}"
