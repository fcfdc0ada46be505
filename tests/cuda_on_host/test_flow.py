from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.ops._operator import OPERATORS
from pynar.testing import tolerance
from tests.cuda_on_host.files import read, write
from tests.ops.flow_checks import DTYPES, accumulation, make_steps, without_padding
from tests.ops.test_flow_linear import make_parameters
from tests.ops.test_squeezed_maps import make_input

LAYOUTS = ("contiguous", "strided", "alternating")


class Runner:
    """Runs an operator's kernels on tensors; results have the shape and dtype of those given."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder

    def __call__(
        self,
        operator: str,
        dtype: torch.dtype,
        inputs: dict[str, Tensor],
        numbers: tuple[int, ...],
        results: dict[str, Tensor],
        seed: int = 1,
    ) -> list[Tensor]:
        for name, tensor in inputs.items():
            write(self.folder / name, tensor)
        kind = str(dtype).removeprefix("torch.")
        command = [str(self.program), operator, kind, str(seed), str(self.folder)]
        command += [str(int(n)) for n in numbers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [
            read(self.folder / name, like) if like.numel() else like
            for name, like in results.items()
        ]


@pytest.fixture
def runner(compile_on_host: Callable[[str], Path], tmp_path: Path) -> Runner:
    return Runner(compile_on_host("flow"), tmp_path)


def assert_close(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    limits = tolerance("cuda", got.dtype)
    scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(
        got, want, rtol=factor * limits["rtol"], atol=factor * scale * limits["atol"]
    )


# 1000 channels leave 3 steps to a block, 70 are too wide a matrix for shared memory.
@pytest.mark.parametrize(
    ("shape", "matrices", "dim", "layout", "normed", "inverse", "dtype"),
    [
        ((3, 7, 30), 0, 0, "contiguous", 1, False, torch.bfloat16),
        ((3, 7, 30), 0, 0, "contiguous", 1, True, torch.float32),
        ((3, 7, 30), 3, 5, "alternating", 3, False, torch.float32),
        ((3, 7, 30), 3, 5, "alternating", 3, True, torch.float16),
        ((3, 3, 30), 3, 5, "alternating", 3, True, torch.float64),
        ((2, 4, 1000), 1, 8, "strided", 0, False, torch.bfloat16),
        ((1, 2, 140), 2, 70, "alternating", 2, True, torch.float32),
    ],
)
def test_chains_match_reference(
    runner: Runner,
    shape: tuple[int, int, int],
    matrices: int,
    dim: int,
    layout: str,
    normed: int,
    inverse: bool,
    dtype: torch.dtype,
) -> None:
    x, lengths = make_steps(*shape, dtype)
    grad_y, _ = make_steps(*shape, dtype)
    log_scale, bias, weight = make_parameters(max(matrices, 1), shape[2], max(dim, 1), dtype)
    weight = weight[:matrices]
    inputs = {"x": x, "grad_y": grad_y, "lengths": lengths, "weight": weight}
    inputs |= {"log_scale": log_scale[:normed], "bias": bias[:normed]}
    like = {"y": x, "grad_x": x, "grad_weight": weight}
    like |= {"grad_log_scale": log_scale[:normed], "grad_bias": bias[:normed]}
    numbers = (*shape, matrices, dim, LAYOUTS.index(layout), inverse, normed, 1)
    y, grad_x, *grads = runner("chain", dtype, inputs, numbers, like)
    if matrices == 0:
        want = reference.actnorm(x, lengths, log_scale[0], bias[0], inverse=inverse)[0]
        wanted = reference.actnorm_backward(grad_y, x, lengths, log_scale[0], bias[0], inverse)
        want_grads = [wanted[0], weight, wanted[1][None], wanted[2][None]]
    else:
        norm = (log_scale, bias) if normed else (None, None)
        arguments = (x, lengths, *norm, weight, layout, inverse)
        want = reference.flow_linear_map(*arguments)
        wanted = reference.flow_linear_map_backward(grad_y, *arguments)
        want_grads = [wanted[0], wanted[3], *wanted[1:3]]
    assert_close(y, want, 4.0)
    for got, wanted_grad in zip((grad_x, *grads), want_grads, strict=True):
        if got.numel():
            assert_close(got, wanted_grad, 4.0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("matrices", "factor", "dtype"),
    [(0, 2, torch.float32), (0, 3, torch.bfloat16), (2, 2, torch.float32), (1, 3, torch.float64)],
)
def test_maps_of_squeezed_steps_match_reference(
    runner: Runner, matrices: int, factor: int, inverse: bool, dtype: torch.dtype
) -> None:
    x, lengths, channels = make_input(inverse, factor, dtype)
    grad_y, _, _ = make_input(not inverse, factor, dtype)
    dim, steps = 4, x.shape[1] if inverse else x.shape[1] // factor
    log_scale, bias, weight = make_parameters(max(matrices, 1), channels, dim, dtype)
    weight = weight[:matrices]
    inputs = {"x": x, "grad_y": grad_y, "lengths": lengths, "weight": weight}
    inputs |= {"log_scale": log_scale, "bias": bias}
    like = {"y": grad_y, "grad_x": x, "grad_weight": weight}
    like |= {"grad_log_scale": log_scale, "grad_bias": bias}
    numbers = (5, steps, channels, matrices, dim, 2, inverse, len(log_scale), factor)
    y, grad_x, grad_weight, *grads = runner("chain", dtype, inputs, numbers, like)
    if matrices == 0:
        arguments = lengths, log_scale[0], bias[0], inverse, factor
        want = OPERATORS["actnorm"].reference(x, *arguments)
        wanted = [*OPERATORS["actnorm_backward"].reference(grad_y, x, *arguments), weight]
    else:
        chain = lengths, log_scale, bias, weight, "alternating", inverse, factor
        want = OPERATORS["flow_linear"].reference("f", x, *chain)
        wanted = [*OPERATORS["flow_linear_backward"].reference("f", grad_y, x, *chain)]
    for got, wanted_one in zip((y, grad_x, *grads, grad_weight), (want, *wanted), strict=True):
        if got.numel():
            assert_close(got, wanted_one.view_as(got), 4.0)


@pytest.mark.parametrize(
    ("shape", "factor", "kept", "dtype"),
    [
        ((3, 7, 10), 2, 5, torch.float32),
        ((5, 9, 70), 3, 40, torch.bfloat16),
        ((2, 5, 4), 4, 4, torch.float64),
    ],
)
def test_squeeze_matches_reference(
    runner: Runner,
    shape: tuple[int, int, int],
    factor: int,
    kept: int,
    dtype: torch.dtype,
) -> None:
    x, lengths = make_steps(*shape, dtype)
    want = reference.squeeze(x, lengths, factor, kept)
    like = {"y": want[0], "dropped": want[1], "back": x}
    inputs = {"x": x, "lengths": lengths}
    y, dropped, back = runner("squeeze", dtype, inputs, (*shape, factor, kept), like)
    torch.testing.assert_close((y, dropped), want, rtol=0, atol=0)
    torch.testing.assert_close(back, without_padding(x, lengths), rtol=0, atol=0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_coupling_matches_reference(runner: Runner, dtype: torch.dtype, inverse: bool) -> None:
    shape = (5, 5, 70)
    names = ("z", "shift", "raw_scale", "grad_y")
    lengths = make_steps(*shape)[1]
    inputs = {name: make_steps(*shape, dtype)[0] for name in names}
    grad_logdet = torch.randn(5, dtype=accumulation(dtype))
    z, shift, raw_scale, grad_y = inputs.values()
    want = reference.affine_coupling(z, lengths, shift, raw_scale, inverse=inverse)
    grads = reference.affine_coupling_backward(
        grad_y, grad_logdet, want[0] if inverse else z, raw_scale, lengths, inverse
    )
    like = {"y": z, "logdet": grad_logdet, "grad_z": z, "grad_shift": z, "grad_raw_scale": z}
    inputs |= {"lengths": lengths, "grad_logdet": grad_logdet}
    got = runner("coupling", dtype, inputs, (*shape, inverse), like)
    for g, w in zip(got, (*want, *grads), strict=True):
        assert_close(g, w)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(1, torch.float32), (33, torch.float32), (64, torch.float64)]
)
def test_logdet_matches_float64(runner: Runner, dim: int, dtype: torch.dtype) -> None:
    weights = torch.linalg.qr(torch.randn(5, dim, dim, dtype=dtype))[0]
    weights[1:] += 0.05 * torch.randn(4, dim, dim, dtype=dtype)
    weights[2] = 0
    weights[3, -1, 0] = torch.nan
    like = {"logdet": weights[:, 0, 0], "inverse": weights}
    results = [runner("logdet", dtype, {"weights": weights}, (5, dim), like, s) for s in (1, 2)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    logdet, inverse = results[0]
    regular = torch.tensor([0, 1, 4])
    exact = weights.double()[regular]
    limit = 20 * tolerance("cuda", dtype)["rtol"]  # the condition of the matrices
    for got, want in (
        (logdet, torch.linalg.slogdet(exact)[1]),
        (inverse, torch.linalg.inv(exact)),
    ):
        torch.testing.assert_close(got[regular].double(), want, rtol=limit, atol=limit)
    assert logdet[2] == -torch.inf
    assert inverse[2].isnan().all()
    assert logdet[3].isnan()
