"""The operators of the flow against PyTorch, alone and as the per-step maps of a whole FlowSeq.

"flow" is all that is no coupling of FlowSeq's base flow: actnorm and head_linear, alternating
layouts, 48 + 48 + 16 steps, half of the channels split off and the rest squeezed in between, with
the gradients by states and parameters. "reference" is what one writes by hand in PyTorch; it
factors its matrices one by one. "normflows" are the modules of that library, which know no lengths,
"zuko" the transforms of that one, among which there is no linear map by any invertible matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.conftest import DEVICES, Case, compiled, device_or_skip
from pynar import ops, reference

GRID = pytest.mark.grid
LEVELS = (48, 48, 16)
Run = Callable[..., None]


def _live(x: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None].to(x.dtype)


def _composed_steps(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    live = _live(x, lengths)
    heads = x.shape[2] // weight.shape[2]
    total = x.new_zeros(())
    for k, matrix in enumerate(weight):
        x = (x * log_scale[k].exp() + bias[k]) * live
        if k % 2 == 0:
            x = (x.unflatten(2, (heads, -1)) @ matrix.T).flatten(2)
        else:
            x = (x.unflatten(2, (-1, heads)).mT @ matrix.T).mT.flatten(2)
        total = total + log_scale[k].sum() + heads * torch.linalg.slogdet(matrix)[1]
    return x, lengths * total


def _composed_split(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half, steps = x.shape[2] // 2, x.shape[1] // 2
    kept = x[..., :half].reshape(x.shape[0], steps, x.shape[2])
    return kept, x[..., half:], (lengths + 1) // 2


def _single_steps(
    x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """One call of an operator for each map."""
    logdets, inverses = ops.batched_logdet(weight)
    total = x.new_zeros(len(lengths))
    for k, matrix in enumerate(weight):
        x, norm = ops.actnorm(x, lengths, log_scale[k], bias[k])
        layout = "strided" if k % 2 else "contiguous"
        factors = (logdets[k], inverses[k])
        x, linear = ops.head_linear(x, lengths, matrix, layout=layout, factors=factors)
        total = total + norm + linear
    return x, total


class _Normflows:
    """normflows on sequences whose steps are all live, with our parameters in its modules."""

    def __init__(self) -> None:
        flows = pytest.importorskip("normflows").flows
        # A size of 1 would count as a batch's.
        self.norm = flows.affine.coupling.AffineConstFlow((2,))
        self.linear = flows.InvertibleAffine(1, use_lu=False)
        # Its forward pass is by the inverse matrix.
        self.linear.forward = self.linear.inverse
        self.coupling = flows.AffineCoupling(nn.Identity(), scale_map="sigmoid_inv")

    def actnorm(self, x: Tensor, n: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = functional_call(self.norm, {"s": s[None], "t": b[None]}, (x.flatten(0, 1),))
        return y.view_as(x), n * logdet

    def head_linear(
        self, x: Tensor, n: Tensor, w: Tensor, layout: str = "contiguous"
    ) -> tuple[Tensor, Tensor]:
        dim, heads = w.shape[0], x.shape[2] // w.shape[0]
        parts = x.unflatten(2, (heads, dim) if layout == "contiguous" else (dim, heads))
        parts = parts if layout == "contiguous" else parts.mT
        rows = parts.reshape(-1, dim)
        y, logdet = functional_call(self.linear, {"W": w.T}, (rows,))
        y = y.view(parts.shape)
        return (y if layout == "contiguous" else y.mT).flatten(2), n * heads * logdet

    def affine_coupling(
        self, x: Tensor, n: Tensor, shift: Tensor, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        parameters = torch.stack([shift, raw], 2).flatten(1, 2)
        (_, y), logdet = self.coupling([parameters, x])
        return y, logdet

    def steps(
        self, x: Tensor, lengths: Tensor, log_scale: Tensor, bias: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(lengths))
        for k, matrix in enumerate(weight):
            x, norm = self.actnorm(x, lengths, log_scale[k], bias[k])
            layout = "strided" if k % 2 else "contiguous"
            x, linear = self.head_linear(x, lengths, matrix, layout)
            total = total + norm + linear
        return x, total


class _Zuko:
    """zuko on sequences whose steps are all live."""

    def __init__(self) -> None:
        transforms = pytest.importorskip("zuko").transforms
        self.transform = transforms.MonotonicAffineTransform

    def affine(self, x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        transform = self.transform(shift, log_scale)
        # Without the bound that it puts on scales.
        transform.log_scale, transform.scale = log_scale, log_scale.exp()
        y, logdet = transform.call_and_ladj(x)
        return y, logdet.sum((1, 2))

    def actnorm(self, x: Tensor, n: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.affine(x, b, s)

    def affine_coupling(
        self, x: Tensor, n: Tensor, shift: Tensor, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.affine(x, shift, F.logsigmoid(raw + 2))


def _flow(steps: Callable[..., Any], split: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Without a `split` steps squeeze what they are given in their own pass."""

    def forward(x: Tensor, lengths: Tensor, *parameters: Tensor) -> list[Tensor]:
        results, total, options = [], x.new_zeros(len(lengths)), {}
        for level in range(len(LEVELS)):
            x, logdet = steps(x, lengths, *parameters[3 * level : 3 * level + 3], **options)
            total = total + logdet
            if level + 1 == len(LEVELS):
                break
            if split is not None:
                x, dropped, lengths = split(x, lengths)
            else:
                lengths = lengths // options.get("squeeze", 1)
                x, dropped = x.chunk(2, -1)
                options = {"squeeze": 2}
            results.append(dropped)
        return [*results, x, total]

    def both(x: Tensor, lengths: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
            results = forward(leaves[0], lengths, *leaves[1:])
            # The gradients of a standard normal prior.
            grads = [t.detach() for t in results[:-1]] + [-torch.ones_like(results[-1])]
            return torch.autograd.grad(results, leaves, grads)

    return both


FLOWS = {
    "pynar": _flow(ops.flow_linear),
    "pynar, squeeze apart": _flow(
        ops.flow_linear, lambda x, n: ops.squeeze_split(x, n, x.shape[2] // 2)
    ),
    "pynar, one call a map": _flow(
        _single_steps, lambda x, n: ops.squeeze_split(x, n, x.shape[2] // 2)
    ),
    "reference": _flow(_composed_steps, _composed_split),
    "normflows": lambda *a: _flow(_Normflows().steps, _composed_split)(*a),
}


@pytest.mark.parametrize("implementation", [*FLOWS, pytest.param("compile", marks=GRID)])
@pytest.mark.parametrize("device", DEVICES)
def test_flow(run_case: Run, device: str, implementation: str) -> None:
    place = device_or_skip(device)
    batch, steps, channels, dim = 64, 32, 256, 32
    generator = torch.Generator().manual_seed(1)
    parameters = []
    for count in LEVELS:
        square = torch.randn(count, dim, dim, generator=generator)
        parameters += [
            torch.randn(count, channels, generator=generator) * 0.05,
            torch.zeros(count, channels),
            torch.linalg.qr(square)[0],
        ]
    x = torch.randn(batch, steps, channels, generator=generator)
    arguments = tuple(t.to(place) for t in (x, torch.full((batch,), steps), *parameters))
    products = sum(count / 2**level for level, count in enumerate(LEVELS))
    case = Case(
        operator="flow_linear",
        shape=f"B={batch},T={steps},C={channels},K=48+48+16",
        dtype=torch.float32,
        device=place,
        arguments=arguments,
        reference=FLOWS["reference"],
        bytes_moved=5 * x.numel() * 4,
        direction="both",
        # Forward, by states and by matrices; what goes into each is computed again in addition.
        flops=int(3 * 2 * x.numel() * dim * products),
        # Sums over 2,048 steps of what went through 112 matrices; the greatest is some thousands.
        limits={"rtol": 1e-3, "atol": 5e-2},
        graph=False,
    )
    function = FLOWS.get(implementation) or compiled(FLOWS["reference"])
    turns = ("reference", FLOWS["reference"]) if implementation == "pynar" else None
    run_case(case, implementation, function, turns)


def _loop(weights: Tensor) -> tuple[Tensor, Tensor]:
    logdets = torch.stack([torch.linalg.slogdet(w)[1] for w in weights])
    return logdets, torch.stack([torch.linalg.inv(w) for w in weights])


LOGDETS: dict[str, Callable[..., Any]] = {
    "pynar": ops.batched_logdet,
    "reference": reference.batched_logdet,
    "loop": _loop,
}


@pytest.mark.parametrize("implementation", LOGDETS)
@pytest.mark.parametrize(("count", "dim"), [(20, 32), (112, 32), (20, 64), (112, 64)])
@pytest.mark.parametrize("device", DEVICES)
def test_batched_logdet(
    run_case: Run, device: str, count: int, dim: int, implementation: str
) -> None:
    place = device_or_skip(device)
    generator = torch.Generator().manual_seed(1)
    weights = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator))[0]
    weights = (weights + 0.05 * torch.randn(weights.shape, generator=generator)).to(place)
    case = Case(
        operator="batched_logdet",
        shape=f"N={count},d={dim}",
        dtype=torch.float32,
        device=place,
        arguments=(weights,),
        reference=reference.batched_logdet,
        bytes_moved=2 * weights.numel() * 4,
        flops=2 * count * dim**3,
        limits={"rtol": 1e-3, "atol": 1e-3},
        graph=False,
    )
    run_case(case, implementation, LOGDETS[implementation])


def _parameters(channels: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "log_scale": torch.randn(channels, generator=generator) * 0.05,
        "bias": torch.zeros(channels),
        "weight": torch.linalg.qr(torch.randn(32, 32, generator=generator))[0],
    }


def _squeeze_split(m: Any, x: Tensor, n: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[2] // 2
    return m.squeeze_split(x, n, half)[:2] if m is ops else m.squeeze(x, n, 2, half)


def _actnorm_of_squeezed(
    m: Any, x: Tensor, n: Tensor, s: Tensor, b: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    norm = s.repeat(2), b.repeat(2)
    if m is ops:
        return m.actnorm(x, n, *norm, squeeze=2)
    return m.actnorm(m.squeeze(x, n, 2, x.shape[2])[0], n // 2, *norm)


def _unsqueeze(m: Any, x: Tensor, n: Tensor, *_: Tensor) -> tuple[Tensor]:
    if m is ops:
        return (m.unsqueeze(x, 2 * n),)
    nothing = x.new_empty(x.shape[0], 2 * x.shape[1], 0)
    return (m.unsqueeze(x, nothing, 2 * n, 2, 2 * x.shape[1]),)


# How an operator is called on states, their lengths, and parameters.
SINGLE: dict[str, Callable[..., Any]] = {
    "actnorm": lambda m, x, n, s, b, w: m.actnorm(x, n, s, b),
    "head_linear": lambda m, x, n, s, b, w: m.head_linear(x, n, w),
    "affine_coupling": lambda m, x, n, s, b, w: m.affine_coupling(x, n, x, x),
    "actnorm, inverse": lambda m, x, n, s, b, w: m.actnorm(x, n, s, b, inverse=True),
    "head_linear, inverse": lambda m, x, n, s, b, w: m.head_linear(x, n, w, inverse=True),
    "affine_coupling, inverse": lambda m, x, n, s, b, w: m.affine_coupling(
        x, n, x, x, inverse=True
    ),
    "squeeze_split": _squeeze_split,
    "unsqueeze": _unsqueeze,
    "actnorm of squeezed steps": _actnorm_of_squeezed,
}
# What each library has. There is no linear map by any invertible matrix in zuko.
IN_LIBRARIES = {
    "normflows": ("actnorm", "head_linear", "affine_coupling"),
    "zuko": ("actnorm", "affine_coupling"),
}


# The libraries take states and parameters of one type alone; PyTorch has no slogdet in bfloat16.
CASES = [
    (operator, dtype, implementation)
    for operator in SINGLE
    for dtype in (torch.float32, torch.bfloat16)
    for implementation in ("pynar", "reference", "compiled reference", *IN_LIBRARIES)
    if implementation not in IN_LIBRARIES
    or (dtype == torch.float32 and operator in IN_LIBRARIES[implementation])
]


def _gradients(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """By states and parameters, of the sum of all results."""

    def run(x: Tensor, lengths: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
            results = function(leaves[0], lengths, *leaves[1:])
            ones = [torch.ones_like(t) for t in results]
            grads = torch.autograd.grad(results, leaves, ones, allow_unused=True)
            return tuple(grad for grad in grads if grad is not None)

    return run


@pytest.mark.parametrize(("operator", "dtype", "implementation"), CASES, ids=str)
@pytest.mark.parametrize("direction", ["forward", pytest.param("both", marks=GRID)])
@pytest.mark.parametrize("batch", [1, 64, pytest.param(2048, marks=GRID)], ids=lambda b: f"B{b}")
@pytest.mark.parametrize("device", DEVICES)
def test_one_operator(
    run_case: Run,
    device: str,
    operator: str,
    batch: int,
    direction: str,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    place = device_or_skip(device)
    generator = torch.Generator().manual_seed(1)
    steps, channels = 32, 256
    x = torch.randn(batch, steps, channels, generator=generator).to(place, dtype)
    lengths = torch.full((batch,), steps, device=place)
    parameters = [t.to(place) for t in _parameters(channels, generator).values()]
    call = SINGLE[operator]
    ours, defined = (lambda *a, m=module: call(m, *a) for module in (ops, reference))
    case = Case(
        operator=operator,
        shape=f"B={batch},T={steps},C={channels}",
        dtype=dtype,
        device=place,
        arguments=(x, lengths, *parameters),
        reference=_gradients(defined) if direction == "both" else defined,
        # States are read and written, and so are their gradients.
        bytes_moved=(4 if direction == "both" else 2) * x.numel() * x.element_size(),
        direction=direction,
        # Log-determinants are sums of thousands of terms.
        limits={"rtol": 1e-3 if dtype == torch.float32 else 1.6e-2, "atol": 2e-2},
    )
    peers = {"normflows": _Normflows, "zuko": _Zuko}
    peer = peers[implementation]() if implementation in peers else None
    functions = {
        "pynar": lambda: ours,
        "reference": lambda: defined,
        **dict.fromkeys(peers, lambda: lambda *a: call(peer, *a)),
    }
    function = functions.get(implementation, lambda: compiled(defined))()
    run_case(case, implementation, _gradients(function) if direction == "both" else function)
