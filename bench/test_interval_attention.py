"""`interval_attention` against SDPA with the mask as a matrix, and FlexAttention.

Ours is packed: the sentences of a batch follow each other without padding. The peers get what they
can take, a padded batch. Every case holds the same sentences for all.

The patterns of decoding have sentences of L/2 to L tokens, and masks and intervals from before. In
two-stream training every batch has masks of its own, and making them is part of what is timed
(except in "masks kept"): for JANUS's content and query stream, b tokens of each sentence masked by
spans, ours takes one call with intervals made from n and b, SDPA a boolean mask and a call for each
stream, FlexAttention a BlockMask and a compiled call for each. Sentences are all of L tokens, or of
L/2 to L ("ragged").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import DEVICES, Case, compiled, device_or_skip
from pynar import ops, reference

HEADS, DIM = 8, 64
SHAPES = {"cpu": [(1, 32), (32, 64), (32, 128)], "cuda": [(1, 32), (32, 128), (128, 128)]}
GRID = pytest.mark.grid
PATTERNS = ["bidirectional", "causal"]


class Batch:
    """The same sentences packed and padded, with their intervals in both forms."""

    def __init__(self, batch: int, longest: int, pattern: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(longest // 2, longest + 1, (batch,), generator=generator)
        self.lengths[0] = longest
        rows = self.lengths
        if pattern == "causal":
            self.padded = ops.causal_intervals(self.lengths, longest)
        else:
            self.padded = ops.padding_intervals(self.lengths, longest)
        self.width = self.padded.shape[1]
        self.live = torch.arange(self.width) < rows[:, None]
        first = rows.cumsum(0) - rows
        self.packed = (self.padded + first[:, None, None, None].int())[self.live].to(device)
        self.padded = self.padded.to(device)
        self.live = self.live.to(device)
        self.mask = ops.interval_mask(self.padded, self.width)[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """`[N, H, D] -> [B, H, T, D]`"""
        padded = x.new_zeros(*self.live.shape, *x.shape[1:])
        padded[self.live] = x
        return padded.transpose(1, 2).contiguous()

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[self.live]


def _forward(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    return attend


def _both(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """Runs forward and backward; returns the gradients."""

    def run(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
            return torch.autograd.grad(attend(*inputs), inputs, grad_out)

    return run


def _flex(batch: Batch) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    intervals = batch.padded

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (intervals[b, i, 0, 0] <= j) & (j < intervals[b, i, 0, 1])
        for r in range(1, intervals.shape[2]):
            seen = seen | ((intervals[b, i, r, 0] <= j) & (j < intervals[b, i, r, 1]))
        return seen

    mask = create_block_mask(
        visible, len(batch.lengths), None, batch.width, batch.width, device=str(intervals.device)
    )
    return compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))


def _implementation(name: str, batch: Batch) -> tuple[Callable[..., Tensor], bool]:
    """Returns an attention of q, k and v, and whether it takes them padded."""
    if name == "pynar":
        return lambda q, k, v: ops.interval_attention(q, k, v, batch.packed), False  # type: ignore[return-value]
    if name == "pynar padded":
        return lambda q, k, v: ops.interval_attention(q, k, v, batch.padded), True  # type: ignore[return-value]
    if name == "reference":
        return _differentiable_reference(batch), True
    if name == "sdpa, mask":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask), True
    return _flex(batch), True


def _differentiable_reference(batch: Batch) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).float() * DIM**-0.5
        weights = scores.masked_fill(~batch.mask, -1e30).softmax(-1).masked_fill(~batch.mask, 0)
        return weights.to(v.dtype) @ v

    return attend


IMPLEMENTATIONS = ["pynar", "pynar padded", "reference", "sdpa, mask", "flex"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=GRID)], ids=str
)
@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=() if p == "bidirectional" else GRID) for p in PATTERNS]
)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(s, marks=() if s == (32, 64) else GRID)
        for s in ((1, 32), (32, 64), (32, 128), (128, 128))
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_interval_attention(
    run_case: Callable[[Case, str, Callable[..., Any]], None],
    device: str,
    shape: tuple[int, int],
    pattern: str,
    dtype: torch.dtype,
    direction: str,
    implementation: str,
) -> None:
    if shape not in SHAPES[device]:
        pytest.skip("is of the other device")
    if device == "cpu" and implementation == "flex" and direction == "both":
        pytest.skip("FlexAttention has no backward on CPU")
    place = device_or_skip(device)
    batch = Batch(*shape, pattern, place)
    attend, padded = _implementation(implementation, batch)
    generator = torch.Generator().manual_seed(1)
    size = (int(batch.live.sum()), HEADS, DIM)
    count = 3 if direction == "forward" else 4
    tensors = [torch.randn(size, generator=generator).to(place, dtype) for _ in range(count)]
    run = _forward if direction == "forward" else _both
    arguments = tuple(map(batch.pad, tensors)) if padded else tuple(tensors)

    # What the definition gives for the live rows, in the form of the implementation.
    define: Callable[..., Tensor] = lambda q, k, v: reference.interval_attention(  # noqa: E731
        q, k, v, batch.padded
    )
    define = define if direction == "forward" else _differentiable_reference(batch)
    want = run(define)(*(batch.pad(x).float() for x in tensors))
    want = tuple(x.to(dtype) for x in want) if isinstance(want, tuple) else want.to(dtype)
    if not padded:
        want = tuple(map(batch.pack, want)) if isinstance(want, tuple) else batch.pack(want)
    moved = sum(t.numel() * t.element_size() for t in tensors) * (1 if count == 3 else 2)
    case = Case(
        operator="interval_attention",
        shape=f"B={shape[0]},L={shape[1]},{pattern}",
        dtype=dtype,
        device=place,
        arguments=arguments,
        reference=lambda *_: want,
        bytes_moved=moved,
        direction=direction,
        graph=direction == "forward",
    )
    run_case(case, implementation, run(attend))


def count_masked(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Draws how many tokens JANUS's span masking masks in each sentence, `[B]`.

    Spans of Poisson(2) tokens until they sum up to 0.7 n, at random positions; they overlap, one
    that would leave the sentence is cut to a token, and its ends stay (Liang et al. 2022, code).
    """
    k = torch.arange(15.0)
    table = torch.exp(k * torch.log(torch.tensor(2.0)) - 2 - torch.lgamma(k + 1))
    counts = []
    for n in lengths.tolist():
        budget = -(-7 * n // 10)
        spans = torch.multinomial(table, 8 * budget, replacement=True, generator=generator)
        total = spans.cumsum(0)
        spans = (spans - (total - budget).clamp(min=0)).clamp(min=0)[
            : int((total < budget).sum()) + 1
        ]
        hit = torch.zeros(n, dtype=torch.bool)
        for first, size in zip(
            torch.randperm(n, generator=generator).tolist(), spans, strict=False
        ):
            hit[first : first + (int(size) if first + size <= n else 1)] = True
        hit[[0, -1]] = False
        counts.append(int(hit.sum()))
    return torch.tensor(counts)


class Streams:
    """A batch of the content and query stream of JANUS, packed and padded."""

    def __init__(self, batch: int, longest: int, ragged: bool, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.full((batch,), longest)
        if ragged:
            lengths = torch.randint(longest // 2, longest + 1, (batch,), generator=generator)
            lengths[0] = longest
        masked = count_masked(lengths, generator)
        self.content_width, self.query_width = int((lengths + masked).max()), int(masked.max())
        self.lengths, self.masked = lengths.to(device), masked.to(device)
        content = torch.arange(self.content_width) < (lengths + masked)[:, None]
        query = torch.arange(self.query_width) < masked[:, None]
        self.content, self.query = content.to(device), query.to(device)
        # Of the packed rows in the padded ones.
        self.rows = [x.flatten().nonzero()[:, 0] for x in (self.content, self.query)]
        # Pairs of a query and a key that it sees: each sees a whole sentence, masked or true.
        self.pairs = int(((lengths + 2 * masked) * lengths).sum())

    def intervals(self) -> tuple[Tensor, Tensor]:
        n, b = self.lengths, self.masked
        return (
            ops.two_stream_intervals(n, b, "aux_content", width=self.content_width),
            ops.two_stream_intervals(n, b, "aux_query", width=self.query_width),
        )

    def packed_intervals(self) -> Tensor:
        rows = self.lengths + self.masked
        first = (rows.cumsum(0) - rows).int()[:, None, None, None]
        each = zip(self.intervals(), self.rows, strict=True)
        return torch.cat([(x + first).flatten(0, 1).index_select(0, rows) for x, rows in each])

    def random(self, dtype: torch.dtype) -> list[Tensor]:
        """Packed queries, keys, values and gradients of the outputs."""
        generator = torch.Generator().manual_seed(1)
        keys, rows = int(self.content.sum()), int(self.content.sum() + self.query.sum())
        return [
            torch.randn(count, HEADS, DIM, generator=generator).to(self.lengths.device, dtype)
            for count in (rows, keys, keys, rows)
        ]

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, H, D] -> [B, H, T, D]` for each stream."""
        count = int(self.content.sum())
        return _pad(x[:count], self.content), _pad(x[count:], self.query)

    def pack(self, content: Tensor, query: Tensor) -> Tensor:
        return torch.cat([content.transpose(1, 2)[self.content], query.transpose(1, 2)[self.query]])


def _pad(x: Tensor, live: Tensor) -> Tensor:
    padded = x.new_zeros(*live.shape, *x.shape[1:])
    padded[live] = x
    return padded.transpose(1, 2).contiguous()


# Attention of both streams, of padded tensors: content and query, keys, values.
TwoStreams = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _streams_by_sdpa(streams: Streams) -> TwoStreams:
    def attend(content: Tensor, query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        masks = (ops.interval_mask(x, streams.content_width)[:, None] for x in streams.intervals())
        first, second = (
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            for q, mask in zip((content, query), masks, strict=True)
        )
        return first, second

    return attend


def _streams_by_flex(streams: Streams, keep: bool) -> TwoStreams:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, b = streams.lengths, streams.masked

    def content_sees(s: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        given = n[s] - b[s]
        true = (j < given) | ((j > i - b[s]) & (j <= i))
        return torch.where(i < n[s], j < n[s], true & (i < n[s] + b[s]))

    def query_sees(s: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        given = n[s] - b[s]
        return ((j < given) | ((j >= given + i) & (j < n[s] + i))) & (i < b[s])

    flex = compiled(flex_attention)
    batch, width, device = len(n), streams.content_width, str(n.device)

    # Not compiled: of PyTorch 2.13 the C++ compiler rejects what becomes of it on a CPU.
    def make() -> tuple[Any, Any]:
        return (
            create_block_mask(content_sees, batch, None, width, width, device=device),
            create_block_mask(query_sees, batch, None, streams.query_width, width, device=device),
        )

    kept = make()

    def attend(content: Tensor, query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        masks = kept if keep else make()
        first, second = (
            flex(q, k, v, block_mask=mask) for q, mask in zip((content, query), masks, strict=True)
        )
        return first, second

    return attend


def _streams_by_definition(streams: Streams) -> TwoStreams:
    def attend(content: Tensor, query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for q, intervals in zip((content, query), streams.intervals(), strict=True):
            mask = ops.interval_mask(intervals, k.shape[2])[:, None]
            scores = (q @ k.transpose(-1, -2)) * DIM**-0.5
            outputs.append(scores.masked_fill(~mask, -1e30).softmax(-1).masked_fill(~mask, 0) @ v)
        return outputs[0], outputs[1]

    return attend


def _streams_by_us(streams: Streams, padded: bool) -> Callable[..., Any]:
    if not padded:
        return lambda q, k, v: ops.interval_attention(q, k, v, streams.packed_intervals())

    def attend(content: Tensor, query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (
            ops.interval_attention(q, k, v, intervals)
            for q, intervals in zip((content, query), streams.intervals(), strict=True)
        )
        return first, second  # type: ignore[return-value]

    return attend


def _gradients(attend: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Runs forward and backward on inputs followed by the gradients of the outputs."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        outputs = 1 if len(arguments) == 4 else 2
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in arguments[:-outputs]]
            return torch.autograd.grad(attend(*inputs), inputs, arguments[-outputs:])

    return run


STREAM_IMPLEMENTATIONS = ["pynar", "pynar padded", "sdpa, masks", "flex", "flex, masks kept"]


@pytest.mark.parametrize("implementation", STREAM_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=GRID)], ids=str
)
@pytest.mark.parametrize("ragged", [False, pytest.param(True, marks=GRID)], ids=["equal", "ragged"])
@pytest.mark.parametrize("longest", [64, pytest.param(128, marks=GRID)])
@pytest.mark.parametrize("device", DEVICES)
def test_two_streams(
    run_case: Callable[..., None],
    device: str,
    longest: int,
    ragged: bool,
    dtype: torch.dtype,
    direction: str,
    implementation: str,
) -> None:
    if device == "cpu" and implementation.startswith("flex") and direction == "both":
        pytest.skip("FlexAttention has no backward on CPU")
    place = device_or_skip(device)
    streams = Streams(32, longest, ragged, place)
    q, k, v, grad_out = streams.random(dtype)
    padded = (*streams.pad(q), _pad(k, streams.content), _pad(v, streams.content))
    both = direction == "both"
    if both:
        padded = (*padded, *streams.pad(grad_out))
    wanted = _streams_by_definition(streams)
    want = (_gradients(wanted) if both else wanted)(*(x.float() for x in padded))
    arguments: tuple[Tensor, ...] = padded
    if implementation == "pynar":
        arguments = (q, k, v, grad_out) if both else (q, k, v)
        first = streams.pack(want[0], want[1])
        want = (first, *(x.transpose(1, 2)[streams.content] for x in want[2:]))
    attend = {
        "pynar": lambda: _streams_by_us(streams, padded=False),
        "pynar padded": lambda: _streams_by_us(streams, padded=True),
        "sdpa, masks": lambda: _streams_by_sdpa(streams),
        "flex": lambda: _streams_by_flex(streams, keep=False),
        "flex, masks kept": lambda: _streams_by_flex(streams, keep=True),
    }[implementation]()
    result = tuple(x.to(dtype) for x in want)
    case = Case(
        operator="interval_attention",
        shape=f"B=32,L={longest},{'ragged ' if ragged else ''}two streams",
        dtype=dtype,
        device=place,
        arguments=arguments,
        reference=lambda *_: result if len(result) > 1 else result[0],
        bytes_moved=sum(t.numel() * t.element_size() for t in (q, q, k, v)) * (2 if both else 1),
        direction=direction,
        flops=4 * streams.pairs * HEADS * DIM * 7 // 2 if both else 4 * streams.pairs * HEADS * DIM,
        graph=False,
    )
    own = _streams_by_us(streams, padded=False)
    ours = (_gradients(own), (q, k, v, grad_out)) if both else (own, (q, k, v))
    turns = None if implementation == "pynar" else ("pynar", lambda *_: ours[0](*ours[1]))
    run_case(case, implementation, _gradients(attend) if both else attend, turns)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.mT), v)


def _all_products(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Those of the forward pass, and of a backward pass that makes the scores again."""
    out = _products(q, k, v)
    scores, grad_scores = torch.bmm(q, k.mT), torch.bmm(grad_out, v.mT)
    grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q)
    return out, grad_q, grad_k, torch.bmm(scores.mT, grad_out)


@pytest.mark.parametrize("implementation", ["torch.bmm"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=GRID)], ids=str
)
@pytest.mark.parametrize("longest", [64, pytest.param(128, marks=GRID)])
@pytest.mark.parametrize("device", DEVICES)
def test_products(
    run_case: Callable[..., None],
    device: str,
    longest: int,
    dtype: torch.dtype,
    direction: str,
    implementation: str,
) -> None:
    """Attention's products alone, by PyTorch, of as many pairs as two streams see, not more.

    In turns with all of interval attention: no mask, no softmax, dense and contiguous operands.
    """
    place = device_or_skip(device)
    streams = Streams(32, longest, False, place)
    q, k, v, grad_out = streams.random(dtype)
    queries = len(q) // 32
    seen = round(streams.pairs / (32 * queries))
    dense = [
        torch.randn(32 * HEADS, count, DIM).to(place, dtype)
        for count in (queries, seen, seen, queries)
    ]
    both = direction == "both"
    products: Callable[..., Any] = _all_products if both else _products
    arguments = tuple(dense if both else dense[:3])
    expected = products(*arguments)
    case = Case(
        operator="products of two streams",
        shape=f"B=32,L={longest}",
        dtype=dtype,
        device=place,
        arguments=arguments,
        reference=lambda *_: expected,
        bytes_moved=sum(t.numel() * t.element_size() for t in (q, q, k, v)) * (2 if both else 1),
        direction=direction,
        flops=4 * 32 * queries * seen * HEADS * DIM * (7 if both else 2) // 2,
        graph=False,
    )
    own = _streams_by_us(streams, padded=False)
    ours = (_gradients(own), (q, k, v, grad_out)) if both else (own, (q, k, v))
    run_case(case, implementation, products, ("pynar", lambda *_: ours[0](*ours[1])))
