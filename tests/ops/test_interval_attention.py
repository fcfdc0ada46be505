from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pynar import _backend, reference
from pynar.ops import interval_attention
from pynar.ops._operator import implementation
from pynar.testing import tolerance

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["any", "shared", "causal", "shifting"]


def make_intervals(kind: str, batch: int, queries: int, keys: int, count: int) -> Tensor:
    """Draws intervals `[batch, queries, count, 2]`; they overlap, touch and can be empty."""
    if kind == "causal":
        end = torch.arange(1, queries + 1).clamp(max=keys)
        pairs = torch.stack([torch.zeros(queries, dtype=torch.int64), end], -1)
        pairs = pairs.expand(batch, queries, 2)[:, :, None]
        empty = torch.zeros(batch, queries, count - 1, 2, dtype=torch.int64)
        return torch.cat([pairs, empty], 2).int()
    if kind == "shifting":
        begin = (torch.arange(queries)[:, None] + torch.arange(count) * (keys // 2)).clamp(max=keys)
        pairs = torch.stack([begin, (begin + keys // 3 + 1).clamp(max=keys)], -1)
        return pairs.expand(batch, queries, count, 2).int().contiguous()
    rows = 1 if kind == "shared" else queries
    pairs = torch.randint(0, keys + 1, (batch, rows, count, 2))
    return pairs.expand(batch, queries, count, 2).int().contiguous()


def poison_unseen(k: Tensor, v: Tensor, intervals: Tensor) -> None:
    """Fills the keys `[B, H, S, D]` that nobody sees with NaN."""
    unseen = ~reference.interval_mask(intervals, k.shape[2]).any(1)
    k.transpose(1, 2)[unseen] = torch.nan
    v.transpose(1, 2)[unseen] = torch.nan


def make_arguments(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    *,
    count: int = 1,
    kind: str = "any",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Makes a batched call; whatever must not be read is NaN."""
    q = torch.randn(batch, heads, queries, dim).to(dtype)
    k = torch.randn(batch, heads, keys, dim).to(dtype)
    v = torch.randn(batch, heads, keys, dim).to(dtype)
    intervals = make_intervals(kind, batch, queries, keys, count)
    poison_unseen(k, v, intervals)
    return q.to(device), k.to(device), v.to(device), intervals.to(device)


def packed(arguments: Arguments) -> Arguments:
    """Returns the same call in the packed form."""
    q, k, v, intervals = arguments
    first = torch.arange(q.shape[0], dtype=torch.int32, device=q.device) * k.shape[2]
    shifted = intervals + first[:, None, None, None]
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    return q, k, v, shifted.flatten(0, 1)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance(w.device, w.dtype), equal_nan=True)


def assert_identical(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_invariant(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Asserts that results agree in every bit, where that is promised, and else within rounding."""
    device, dtype = want[0].device.type, want[0].dtype
    on_tensor_cores = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if implementation(device).name == "reference" or on_tensor_cores:
        assert_same(got, want)  # type: ignore[arg-type]
    else:
        assert_identical(got, want)


def attend(*arguments: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return interval_attention(*arguments, scale=scale, return_lse=True)  # type: ignore[return-value]


def gradients(function: Any, arguments: Arguments, grad_out: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in arguments[:3])
    return torch.autograd.grad(function(q, k, v, arguments[3]), (q, k, v), grad_out)


def differentiate(*arguments: Tensor) -> Tensor:
    """The operation in functions that PyTorch differentiates itself."""
    q, k, v, intervals = arguments
    visible = reference.interval_mask(intervals, k.shape[-2])[:, None]
    unseen = ~visible.any(-2)[..., None]
    scores = q @ k.masked_fill(unseen, 0).transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -1e30).softmax(-1).masked_fill(~visible, 0)
    return weights @ v.masked_fill(unseen, 0)


def define(*arguments: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    return reference.interval_attention(*arguments, scale=scale, return_lse=True)  # type: ignore[return-value]


@pytest.fixture
def extension() -> Iterator[Any]:
    module = _backend.extension()
    if module is None:
        pytest.skip(_backend.why_not_extension())
    level = module.simd_level()
    yield module
    module.set_simd_level(level)


# Blocks of 6 queries and groups of 16 keys, tiles of 64 queries; channels beside whole vectors.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 33),
    (3, 2, 3, 33, 20),
    (2, 1, 33, 40, 64),
    (1, 2, 70, 130, 128),
    (1, 1, 130, 70, 8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    for kind in KINDS:
        for count in (1, 3):
            arguments = make_arguments(*shape, count=count, kind=kind, dtype=dtype, device=device)
            want = define(*arguments)
            assert_same(attend(*arguments), want)
            out, lse = attend(*packed(arguments))
            out, lse = (x.unflatten(0, (shape[0], -1)).transpose(1, 2) for x in (out, lse))
            assert_same((out, lse), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("simd_level")
def test_every_simd_level_matches_reference(dtype: torch.dtype) -> None:
    for queries, keys, dim in ((1, 17, 16), (4, 33, 64), (9, 70, 24), (66, 66, 64), (5, 3, 7)):
        for kind in KINDS:
            arguments = make_arguments(2, 2, queries, keys, dim, count=2, kind=kind, dtype=dtype)
            assert_same(attend(*arguments), define(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 150, 90, 16)], ids=str)
def test_gradients_match_reference(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    for kind in KINDS:
        arguments = make_arguments(*shape, count=2, kind=kind, dtype=dtype, device=device)
        grad_out = torch.randn(arguments[0].shape).to(arguments[0])
        got = gradients(interval_attention, arguments, grad_out)
        wide = tuple(x.double() for x in arguments[:3])
        want = gradients(differentiate, (*wide, arguments[3]), grad_out.double())
        limit = tolerance(device, dtype)
        # The sums of a key's gradient are as long as there are queries.
        limit["atol"] *= max(1.0, shape[2] ** 0.5)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w.to(dtype), **limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("simd_level")
def test_gradients_match_reference_at_every_simd_level(dtype: torch.dtype) -> None:
    for kind in KINDS:
        for queries, keys, dim in ((1, 17, 16), (70, 33, 24), (5, 3, 7)):
            arguments = make_arguments(2, 2, queries, keys, dim, count=2, kind=kind, dtype=dtype)
            out, lse = attend(*arguments)
            grad_out = torch.randn(out.shape).to(dtype)
            saved = (grad_out, *arguments, out, lse, dim**-0.5)
            got = torch.ops.pynar.interval_attention_backward(*saved)
            want = reference.interval_attention_backward(*saved)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, **tolerance("cpu", dtype))


L2, L3 = math.log(2), math.log(3)
# With scores log 1, log 2, ... a weight is a ratio of small numbers. One head, one channel.
CASES = {
    "one key": {"scores": [L2], "values": [7.0], "intervals": [[0, 1]], "want": (7.0, L2)},
    "weights are normalised": {
        "scores": [0, L2, 0],
        "values": [1.0, 2.0, 3.0],
        "intervals": [[0, 3]],
        "want": (2.0, math.log(4)),
    },
    "two intervals with a gap": {
        "scores": [0, 50, L3],
        "values": [4.0, math.nan, 8.0],
        "intervals": [[0, 1], [2, 3]],
        "want": (7.0, math.log(4)),
    },
    "the order of intervals makes no difference": {
        "scores": [0, 50, L3],
        "values": [4.0, math.nan, 8.0],
        "intervals": [[2, 3], [0, 1]],
        "want": (7.0, math.log(4)),
    },
    "a key in two intervals counts once": {
        "scores": [0, 0, 0],
        "values": [1.0, 2.0, 3.0],
        "intervals": [[0, 2], [1, 3]],
        "want": (2.0, L3),
    },
    "an empty interval adds nothing": {
        "scores": [0, L2],
        "values": [1.0, 5.0],
        "intervals": [[1, 2], [1, 1], [2, 0]],
        "want": (5.0, L2),
    },
    "no key: zero, and a sum of nothing": {
        "scores": [math.nan, math.nan],
        "values": [math.nan, math.nan],
        "intervals": [[1, 1]],
        "want": (0.0, -math.inf),
    },
    "great scores do not overflow": {
        "scores": [3e4, 3e4],
        "values": [2.0, 4.0],
        "intervals": [[0, 2]],
        "want": (3.0, 3e4 + L2),
    },
    "small scores do not vanish": {
        "scores": [-3e4, -3e4],
        "values": [2.0, 4.0],
        "intervals": [[0, 2]],
        "want": (3.0, -3e4 + L2),
    },
    "a score of -inf has no weight": {
        "scores": [-math.inf, 0],
        "values": [2.0, 4.0],
        "intervals": [[0, 2]],
        "want": (4.0, 0.0),
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", [attend, define])
def test_cases_worked_by_hand(name: str, function: Any, device: torch.device) -> None:
    case = CASES[name]
    keys = len(case["scores"])
    out, lse = function(
        torch.ones(1, 1, 1, device=device),
        torch.tensor(case["scores"], dtype=torch.float32, device=device).view(keys, 1, 1),
        torch.tensor(case["values"], device=device).view(keys, 1, 1),
        torch.tensor([case["intervals"]], dtype=torch.int32, device=device),
        scale=1.0,
    )
    want_out, want_lse = case["want"]
    assert_same(
        (out, lse),
        (torch.tensor([[[want_out]]], device=device), torch.tensor([[want_lse]], device=device)),
    )


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.3, 2.0])
def test_scale_multiplies_the_scores(scale: float, device: torch.device) -> None:
    arguments = make_arguments(2, 2, 9, 33, 24, device=device)
    assert_same(attend(*arguments, scale=scale), define(*arguments, scale=scale))
    q, k, v, intervals = arguments
    assert_same(attend(*arguments, scale=scale), define(q * scale, k, v, intervals, scale=1.0))


def brute_force(
    q: list[list[float]],
    k: list[list[float]],
    v: list[list[float]],
    intervals: list[list[list[int]]],
) -> tuple[list[list[float]], list[float]]:
    """The definition for one head with scale 1, in Python's own numbers."""
    out, lse = [], []
    for i, row in enumerate(q):
        seen = sorted({j for begin, end in intervals[i] for j in range(begin, end)})
        weights = [math.exp(sum(a * b for a, b in zip(row, k[j], strict=True))) for j in seen]
        total = sum(weights)
        lse.append(math.log(total) if seen else -math.inf)
        out.append(
            [
                sum(w * v[j][c] for w, j in zip(weights, seen, strict=True)) / (total or 1)
                for c in range(len(row))
            ]
        )
    return out, lse


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_matches_brute_force(data: st.DataObject) -> None:
    queries, keys = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    dim, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    number = st.integers(-4, 4).map(lambda i: i / 2)
    matrix = lambda n: [[data.draw(number) for _ in range(dim)] for _ in range(n)]  # noqa: E731
    q, k, v = matrix(queries), matrix(keys), matrix(keys)
    index = st.integers(0, keys)
    intervals = [
        [[data.draw(index), data.draw(index)] for _ in range(count)] for _ in range(queries)
    ]
    want_out, want_lse = brute_force(q, k, v, intervals)
    out, lse = attend(
        *(torch.tensor(x, dtype=torch.float64)[:, None] for x in (q, k, v)),
        torch.tensor(intervals, dtype=torch.int32),
        scale=1.0,
    )
    assert_same(
        (out[:, 0], lse[:, 0]),
        (
            torch.tensor(want_out, dtype=torch.float64),
            torch.tensor(want_lse, dtype=torch.float64),
        ),
    )


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(0, 2, 3, 5), (2, 0, 3, 5), (2, 3, 0, 5), (2, 3, 4, 0)]
)
def test_empty(batch: int, heads: int, queries: int, keys: int, device: torch.device) -> None:
    arguments = make_arguments(batch, heads, queries, keys, 8, device=device)
    out, lse = attend(*arguments)
    assert_identical((out, lse), define(*arguments))
    assert out.shape == (batch, heads, queries, 8)
    attend(*packed(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_equal_copies(dtype: torch.dtype, device: torch.device) -> None:
    heads, dim, batch, capacity = 3, 16, 4, 21
    qkv = torch.randn(batch * 7, 3 * heads * dim, device=device).to(dtype)
    q, k, v = (x.view(-1, heads, dim) for x in qkv.chunk(3, -1))
    intervals = packed(make_arguments(batch, heads, 7, 7, dim, count=2, device=device))[3]
    copies = tuple(x.contiguous() for x in (q, k, v))
    assert_invariant(attend(q, k, v, intervals), attend(*copies, intervals))
    # A cache of keys and values, one query a sentence; and the batched form with heads inside.
    cache = torch.randn(batch, capacity, 2, heads, dim, device=device).to(dtype)
    k, v = cache.flatten(0, 1).unbind(1)
    begin = torch.arange(batch, device=device) * capacity
    intervals = torch.stack([begin, begin + 5], -1)[:, None].int()
    assert_invariant(
        attend(q[:batch], k, v, intervals),
        attend(q[:batch].contiguous(), k.contiguous(), v.contiguous(), intervals),
    )
    k, v = (x.transpose(1, 2) for x in cache.unbind(2))
    q, _, _, intervals = make_arguments(batch, heads, 9, capacity, dim, dtype=dtype, device=device)
    assert_invariant(
        attend(q, k, v, intervals), attend(q, k.contiguous(), v.contiguous(), intervals)
    )


def test_strided_channels_and_intervals_equal_their_copies(device: torch.device) -> None:
    q, k, v, intervals = packed(make_arguments(2, 3, 7, 9, 16, count=4, device=device))
    want = attend(q, k, v, intervals[:, ::2].contiguous())
    assert_invariant(attend(q, k, v, intervals[:, ::2]), want)
    strided = tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v))
    assert strided[0].stride(-1) != 1
    swapped = intervals[:, ::2].transpose(0, 2).contiguous().transpose(0, 2)
    assert_invariant(attend(*strided, swapped), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_a_query_does_not_see_have_no_influence(
    dtype: torch.dtype, device: torch.device
) -> None:
    for kind in KINDS:
        arguments = make_arguments(1, 2, 37, 50, 24, count=2, kind=kind, dtype=dtype, device=device)
        q, k, v, intervals = arguments
        k, v = k.nan_to_num(), v.nan_to_num()
        want = attend(q, k, v, intervals)
        visible = reference.interval_mask(intervals, 50)[0]
        for j in (0, 20, 49):
            for value in (math.nan, math.inf, 3e38):
                bad_k, bad_v = k.clone(), v.clone()
                bad_k[:, :, j] = value
                bad_v[:, :, j] = value
                got = attend(q, bad_k, bad_v, intervals)
                blind = ~visible[:, j]
                assert_invariant(
                    tuple(x[:, :, blind] for x in got), tuple(x[:, :, blind] for x in want)
                )


@pytest.mark.parametrize("queries", range(1, 8))
@pytest.mark.usefixtures("simd_level")
def test_an_infinite_key_of_no_weight_has_finite_gradients(queries: int) -> None:
    """Blocks are filled up with queries of zeros, whose products with infinities are NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        q = (torch.rand(1, 1, queries, 8) + 0.1).to(dtype)
        k, v = torch.randn(2, 1, 1, 4, 8).to(dtype)
        k[0, 0, 1] = -torch.inf
        intervals = torch.tensor([0, 4], dtype=torch.int32).expand(1, queries, 1, 2)
        leaves = [x.requires_grad_() for x in (k, v)]
        out = interval_attention(q, k, v, intervals.contiguous())
        for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
            assert grad.isfinite().all()
            assert (grad[0, 0, 1].abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("simd_level")
def test_values_are_summed_in_order(dtype: torch.dtype) -> None:
    """With all scores 0, of values that leave another sum in any other order."""
    keys = 41
    large = torch.randint(-9, 10, (keys, 20)) * 2.0**21
    v = torch.where(torch.rand(keys, 20) < 0.5, large, torch.randn(keys, 20)).to(dtype)
    begin, end = torch.randint(0, keys, (2, 60))
    middle = torch.randint(0, keys, (60,)).clamp(begin, end.maximum(begin))
    intervals = torch.stack([begin, middle, middle + 1, end.maximum(middle + 1)], -1)
    q = torch.zeros(1, 1, 60, 20, dtype=dtype)
    arguments = q, torch.zeros_like(v)[None, None], v[None, None], intervals.view(1, 60, 2, 2).int()
    want = torch.zeros(60, 20)
    for row, seen in enumerate(reference.interval_mask(arguments[3], keys)[0]):
        for j in seen.nonzero()[:, 0]:
            want[row] += v[j].float()
        want[row] *= 1 / seen.sum().float()
    blind = want.isnan()
    want = want.masked_fill(blind, 0).to(dtype)
    assert_identical((attend(*arguments)[0][0, 0],), (want,))
    # Where another key is NaN, a sum is made once more, of a query's own keys.
    v = v.clone()
    v[20] = torch.nan
    unaffected = ~reference.interval_mask(arguments[3], keys)[0, :, 20]
    got = attend(*arguments[:2], v[None, None], arguments[3])[0][0, 0]
    assert_identical((got[unaffected],), (want[unaffected],))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_queries_do_not_depend_on_their_batch(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = make_arguments(3, 2, 37, 50, 24, count=2, kind=kind, dtype=dtype, device=device)
    batched = attend(*arguments)
    q, k, v, intervals = packed(arguments)
    out, lse = attend(q, k, v, intervals)
    as_batched = tuple(x.unflatten(0, (3, -1)).transpose(1, 2) for x in (out, lse))
    assert_invariant(tuple(x.contiguous() for x in as_batched), batched)
    for i in range(0, q.shape[0], 5):
        one = slice(i, i + 1)
        assert_invariant(attend(q[one], k, v, intervals[one]), (out[one], lse[one]))
    # Other neighbours, so that queries fall into other tiles; other keys before a query's own.
    order = torch.randperm(q.shape[0], device=device)
    assert_invariant(attend(q[order], k, v, intervals[order]), (out[order], lse[order]))
    shifted = (torch.cat([x[-5:], x]) for x in (k, v))
    assert_invariant(attend(q, *shifted, intervals + 5), (out, lse))


def everything(arguments: Arguments) -> tuple[Tensor, ...]:
    """Returns outputs, lse and gradients."""
    out, lse = attend(*arguments)
    grad_out = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view_as(out)
    return (out, lse, *gradients(interval_attention, arguments, grad_out))


def test_threads_make_no_difference() -> None:
    threads = torch.get_num_threads()
    for kind in KINDS:
        arguments = make_arguments(5, 3, 65, 70, 64, count=2, kind=kind)
        try:
            torch.set_num_threads(1)
            one = everything(arguments)
            torch.set_num_threads(3)
            three = everything(arguments)
        finally:
            torch.set_num_threads(threads)
        assert_identical(one, three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_batch(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = make_arguments(3, 2, 70, 50, 24, count=2, kind=kind, dtype=dtype, device=device)
    grad_out = torch.randn(arguments[0].shape).to(arguments[0])
    batched = gradients(interval_attention, arguments, grad_out)
    in_line = gradients(
        interval_attention, packed(arguments), grad_out.transpose(1, 2).flatten(0, 1)
    )
    for one, other in zip(in_line, batched, strict=True):
        assert_invariant((one.unflatten(0, (3, -1)).transpose(1, 2),), (other,))
    alone = gradients(interval_attention, tuple(x[1:2] for x in arguments), grad_out[1:2])  # type: ignore[arg-type]
    assert_invariant(alone, tuple(x[1:2] for x in batched))


@pytest.mark.parametrize("form", ["batched", "packed"])
def test_gradcheck(form: str, device: torch.device) -> None:
    arguments = make_arguments(2, 2, 5, 7, 3, count=2, dtype=torch.float64, device=device)
    q, k, v, intervals = arguments if form == "batched" else packed(arguments)
    # Finite differences move every key, those too that nobody sees.
    q, k, v = (x.nan_to_num().requires_grad_() for x in (q, k, v))
    torch.autograd.gradcheck(
        lambda *x: interval_attention(*x, intervals, scale=0.7), (q, k, v), fast_mode=False
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("simd_level")
def test_a_key_that_a_query_does_not_see_leaves_its_gradient_alone(dtype: torch.dtype) -> None:
    for kind in KINDS:
        q, k, v, intervals = make_arguments(1, 2, 37, 50, 24, count=2, kind=kind, dtype=dtype)
        k, v = k.nan_to_num(), v.nan_to_num()
        grad_out = torch.randn(q.shape).to(dtype)
        want = gradients(interval_attention, (q, k, v, intervals), grad_out)[0]
        for j in (0, 20, 49):
            bad = k.clone()
            bad[:, :, j] = torch.nan
            got = gradients(interval_attention, (q, bad, v, intervals), grad_out)[0]
            blind = ~reference.interval_mask(intervals, 50)[0, :, j]
            assert_identical((got[:, :, blind],), (want[:, :, blind],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_seen_gets_no_gradient(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, intervals = make_arguments(2, 2, 9, 20, 8, dtype=dtype, device=device)
    intervals[:, 2:4] = 5
    k, v = torch.randn_like(k), torch.randn_like(v)
    poison_unseen(k, v, intervals)
    q[:, :, 2:4] = torch.nan
    grad_out = torch.randn_like(q)
    grad_out[:, :, 2:4] = torch.nan
    grad_q, grad_k, grad_v = gradients(interval_attention, (q, k, v, intervals), grad_out)
    assert not grad_q[:, :, 2:4].any()
    unseen = ~reference.interval_mask(intervals, 20).any(1)
    assert unseen.any()
    for grad in (grad_q, grad_k, grad_v):
        assert grad.isfinite().all()
    assert not grad_k.transpose(1, 2)[unseen].any()
    assert not grad_v.transpose(1, 2)[unseen].any()


@pytest.mark.parametrize("queries", [0, 3])
def test_no_keys_or_no_queries_give_zero_gradients(queries: int, device: torch.device) -> None:
    arguments = make_arguments(2, 2, queries, 5 if queries == 0 else 0, 8, device=device)
    q, k, v, intervals = arguments
    k, v = k.nan_to_num(), v.nan_to_num()
    grads = gradients(interval_attention, (q, k, v, intervals), torch.ones_like(q))
    assert_identical(grads, tuple(torch.zeros_like(x) for x in (q, k, v)))


def test_gradients_of_views_and_expanded_gradients(device: torch.device) -> None:
    qkv = torch.randn(14, 3 * 2 * 16, device=device)
    intervals = packed(make_arguments(2, 2, 7, 7, 16, count=2, device=device))[3]
    views = tuple(x.view(14, 2, 16) for x in qkv.chunk(3, -1))
    ones = torch.ones(1, 1, 1, device=device)
    got = gradients(interval_attention, (*views, intervals), ones.expand(14, 2, 16))
    copies = tuple(x.contiguous() for x in views)
    want = gradients(interval_attention, (*copies, intervals), torch.ones_like(copies[0]))
    assert_invariant(got, want)
    only_q = copies[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        interval_attention(only_q, copies[1], copies[2], intervals).sum(), only_q
    )
    assert_invariant((grad,), want[:1])


def test_lse_carries_no_gradient(device: torch.device) -> None:
    q, k, v, intervals = make_arguments(1, 1, 3, 4, 2, device=device)
    _, lse = attend(q.requires_grad_(), k, v, intervals)
    assert not lse.requires_grad


def test_registered_rightly(device: torch.device) -> None:
    q, k, v, intervals = make_arguments(2, 2, 5, 9, 8, count=2, device=device)
    arguments = (q, k.nan_to_num(), v.nan_to_num(), intervals)
    torch.library.opcheck(torch.ops.pynar.interval_attention.default, (*arguments, 0.5))
    out, lse = attend(*arguments, scale=0.5)
    lse = lse.masked_fill(lse.isinf(), 0)
    torch.library.opcheck(
        torch.ops.pynar.interval_attention_backward.default,
        (torch.randn_like(out), *arguments, out, lse, 0.5),
    )


def test_gradients_compile_into_one_graph(device: torch.device) -> None:
    compiled = torch.compile(interval_attention, fullgraph=True, backend="aot_eager")
    arguments = make_arguments(2, 2, 7, 33, 20, device=device)
    grad_out = torch.randn_like(arguments[0])
    assert_identical(
        gradients(compiled, arguments, grad_out),
        gradients(interval_attention, arguments, grad_out),
    )


def test_arguments_are_left_alone(device: torch.device) -> None:
    arguments = make_arguments(2, 2, 7, 33, 20, device=device)
    copies = tuple(argument.clone() for argument in arguments)
    attend(*arguments)
    torch.testing.assert_close(arguments, copies, rtol=0, atol=0, equal_nan=True)


def test_compiles_into_one_graph(device: torch.device) -> None:
    compiled = torch.compile(interval_attention, fullgraph=True, backend="aot_eager")
    arguments = make_arguments(2, 2, 7, 33, 20, device=device)
    assert_identical((compiled(*arguments),), (interval_attention(*arguments),))


def test_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return interval_attention(*arguments)

    arguments = make_arguments(2, 2, 7, 33, 20)
    program = torch.export.export(Attention(), arguments)
    assert_identical((program.module()(*arguments),), (interval_attention(*arguments),))


REJECTED = [
    (
        "q",
        lambda a: a[0][0, 0],
        "interval_attention: `q` must have 4 dimensions [B, H, T, D], or 3 [N, H, D], "
        "got shape [7, 20]",
    ),
    (
        "q",
        lambda a: a[0].int(),
        "interval_attention: `q` must have dtype float32 or bfloat16 or float16 or float64, "
        "got int32",
    ),
    (
        "q",
        lambda a: a[0].repeat(1, 1, 1, 7),
        "interval_attention: `q` must have 1 to 128 channels a head, got 140",
    ),
    (
        "k",
        lambda a: a[1][:, :1],
        "interval_attention: `k` must have shape [2, 3, 9, 20] (batch, heads and channels of `q`), "
        "got [2, 1, 9, 20]",
    ),
    (
        "v",
        lambda a: a[2][:, :, :-1],
        "interval_attention: `v` must have shape [2, 3, 9, 20] (that of `k`), got [2, 3, 8, 20]",
    ),
    (
        "v",
        lambda a: a[2].double(),
        "interval_attention: `v` must have dtype float32, got float64",
    ),
    (
        "intervals",
        lambda a: a[3].long(),
        "interval_attention: `intervals` must have dtype int32, got int64",
    ),
    (
        "intervals",
        lambda a: a[3][:, :-1],
        "interval_attention: `intervals` must have shape [2, 7, 1, 2] "
        "(batch and queries of `q`, R, begin and end), got [2, 6, 1, 2]",
    ),
    (
        "intervals",
        lambda a: a[3].repeat(1, 1, 5, 1),
        "interval_attention: `intervals` must have 1 to 4 intervals a query, got 5",
    ),
    (
        "intervals",
        lambda a: torch.tensor([3, 10]).int().expand(2, 7, 1, 2),
        "interval_attention: `intervals` must lie in [0, 9], got [3, 10) (sentence 0, query 0)",
    ),
    (
        "intervals",
        lambda a: torch.tensor([-1, 2]).int().expand(2, 7, 1, 2),
        "interval_attention: `intervals` must lie in [0, 9], got [-1, 2) (sentence 0, query 0)",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), REJECTED)
def test_a_wrong_call_says_what_is_wanted(name: str, change: Any, message: str) -> None:
    arguments = list(make_arguments(2, 3, 7, 9, 20))
    arguments[("q", "k", "v", "intervals").index(name)] = change(arguments)
    with pytest.raises(ValueError) as error:
        interval_attention(*arguments)
    assert str(error.value) == message


def test_a_wrong_packed_call_says_what_is_wanted() -> None:
    q, k, v, intervals = packed(make_arguments(2, 3, 7, 9, 20))
    with pytest.raises(ValueError, match=r"`k` must have shape \[18, 3, 20\] \(heads and channels"):
        interval_attention(q, k[:, :2], v, intervals)
    with pytest.raises(ValueError, match=r"`intervals` must have shape \[14, 1, 2\]"):
        interval_attention(q, k, v, intervals[:-1])
    intervals[3] = torch.tensor([17, 19])
    with pytest.raises(ValueError, match=r"lie in \[0, 18\], got \[17, 19\) \(sentence 0, query 3"):
        interval_attention(q, k, v, intervals)
