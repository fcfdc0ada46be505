"""`interval_attention` against SDPA with the mask as a matrix, and FlexAttention.

Ours is packed: the sentences of a batch follow each other without padding. The peers get what they
can take, a padded batch. Sentences are of L/2 to L tokens, and patterns those of decoding and of
two-stream training; every case holds the same sentences for all.
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
PATTERNS = ["bidirectional", "causal", "aux_content"]
MASKED = 0.57  # of a sentence's positions; the mean of JANUS's span masking


class Batch:
    """The same sentences packed and padded, with their intervals in both forms."""

    def __init__(self, batch: int, longest: int, pattern: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(longest // 2, longest + 1, (batch,), generator=generator)
        self.lengths[0] = longest
        rows = self.lengths
        if pattern == "aux_content":
            masked = (self.lengths * MASKED).long()
            rows = self.lengths + masked
            width = int(rows.max())
            self.padded = ops.two_stream_intervals(self.lengths, masked, pattern, width=width)
        elif pattern == "causal":
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
    "pattern", [pytest.param(p, marks=() if p == "aux_content" else GRID) for p in PATTERNS]
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
