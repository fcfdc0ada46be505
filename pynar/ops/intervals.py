"""Intervals for `interval_attention`, made from lengths without waiting for a GPU.

All patterns are `[B, width, R, 2]`, int32, and count the keys of a sentence from 0; queries past
the last one of a sentence see nothing. `packed_intervals` makes the packed form of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pynar import reference
from pynar.ops._checks import Check

__all__ = [
    "Places",
    "causal_intervals",
    "interval_mask",
    "packed_intervals",
    "padding_intervals",
    "two_stream_intervals",
]


Pair = tuple[Tensor, Tensor]
Rows = tuple[Tensor, Pair, Pair]  # which queries there are, and what they see


@dataclass(frozen=True)
class Places:
    """Sentence of every packed row and its place there, `[N]`, and every sentence's first row."""

    sentence: Tensor
    place: Tensor
    start: Tensor  # [B]

    @staticmethod
    def of(lengths: Tensor, total: int) -> Places:
        start = lengths.cumsum(0) - lengths
        numbers = torch.arange(len(lengths), device=lengths.device)
        sentence = numbers.repeat_interleave(lengths, output_size=total)
        rows = torch.arange(total, device=lengths.device)
        return Places(sentence, rows - start[sentence], start)

    def intervals(self, padded: Tensor, start: Tensor) -> Tensor:
        """Those of `padded: [B, T, R, 2]`, counted from the `start: [B]` of their sentences."""
        first = start.int()[self.sentence, None, None]
        return padded[self.sentence, self.place] + first


def interval_mask(intervals: Tensor, key_length: int) -> Tensor:
    """Tells which keys each query sees, as a matrix.

    For what is not `interval_attention`, and for looking at patterns.

    Args:
        intervals: `[B, T, R, 2]`, or `[N, R, 2]` in the packed form.
        key_length: S, the number of keys; intervals are cut off there.

    Returns:
        `[B, T, S]` or `[N, S]`, boolean, true where a query sees a key.

    Example:
        >>> interval_mask(causal_intervals(torch.tensor([2]), 3), 3).int()
        tensor([[[1, 0, 0],
                 [1, 1, 0],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    return reference.interval_mask(intervals, key_length)


def padding_intervals(lengths: Tensor, width: int) -> Tensor:
    """Lets each query of a sentence see all of it: `[0, n)`.

    Args:
        lengths: `[B]`, n.
        width: the number of queries; those past a length see nothing.

    Returns:
        `[B, width, 1, 2]`, int32.
    """
    t, n = _grid("padding_intervals", lengths, width)
    return _stack(t < n, (torch.zeros_like(t), n))


def causal_intervals(lengths: Tensor, width: int, *, block: int = 1) -> Tensor:
    r"""Lets query :math:`t` see the keys up to its own: :math:`[0, t + 1)`.

    With ``block`` :math:`= K > 1`, up to the last of its block of K, as in semi-autoregressive
    decoding (Wang et al. 2018): :math:`[0, \min(n, K (\lfloor t / K \rfloor + 1)))`.

    Args:
        lengths: `[B]`, n.
        width: the number of queries; those past a length see nothing.
        block: K.

    Returns:
        `[B, width, 1, 2]`, int32.
    """
    if block < 1:
        Check("causal_intervals").fail("block", "be at least 1", block)
    t, n = _grid("causal_intervals", lengths, width)
    end = torch.minimum((t // block + 1) * block, n)
    return _stack(t < n, (torch.zeros_like(t), end))


def two_stream_intervals(lengths: Tensor, masked: Tensor, pattern: str, *, width: int) -> Tensor:
    r"""The visibility patterns of two-stream training, for a reordered sentence.

    A sentence of n positions, b of them masked, stands in the order (Liang et al. 2022, JANUS;
    Song et al. 2020, MPNet) U, the :math:`u = n - b` positions that are given; M, a mask for each
    of the others; G, their true values. Queries and what they see, by `pattern`:

    - ``"ar"``: position t of the sentence in its own order, :math:`[0, t + 1)`. Also for the AR
      query stream, whose query t predicts what follows key t.
    - ``"nar"``: U and M, :math:`[0, n)`.
    - ``"aux_content"``: U and M as before; :math:`G_r` the given positions, the true values up to
      its own and the masks after it: :math:`[0, u)` and :math:`[u + r + 1, n + r + 1)`.
    - ``"aux_query"``: a query for each masked position, which sees the true values before its own
      and the masks from its own on: :math:`[0, u)` and :math:`[u + r, n + r)`.
    - ``"permuted_content"``: U and G without masks (Yang et al. 2019, XLNet): U sees
      :math:`[0, u)`, :math:`G_r` sees :math:`[0, u + r + 1)`.
    - ``"permuted_query"``: a query for each position to predict: :math:`[0, u + r)`.

    In the AUX patterns every :math:`G_r` and every query sees exactly n keys, one for each position
    of the sentence. They are the content and query streams of MPNet too.

    Args:
        lengths: `[B]`, n.
        masked: `[B]`, b, each in `[0, n]`.
        pattern: one of the above.
        width: the number of queries; those past the last of a sentence see nothing. There are n of
            them, but :math:`n + b` in ``"aux_content"`` and b in the query patterns.

    Returns:
        `[B, width, 2, 2]`, int32.

    Example:
        >>> two_stream_intervals(torch.tensor([4]), torch.tensor([2]), "aux_query", width=2)
        tensor([[[[0, 2],
                  [2, 4]],
        <BLANKLINE>
                 [[0, 2],
                  [3, 5]]]], dtype=torch.int32)
    """
    check = Check("two_stream_intervals")
    if pattern not in _PATTERNS:
        check.fail("pattern", f"be one of {', '.join(_PATTERNS)}", pattern)
    t, n = _grid("two_stream_intervals", lengths, width)
    check.shape("masked", masked, list(lengths.shape), "that of `lengths`")
    b = masked.to(torch.int32)[:, None].expand_as(t)
    return _stack(*_PATTERNS[pattern](t, n, b))


def packed_intervals(
    intervals: Tensor, queries: Tensor, first_keys: Tensor, *, total: int | None = None
) -> Tensor:
    r"""Any of these patterns for sentences that follow each other without padding.

    For the packed form of `interval_attention`, or for several sentences in each row of the batched
    one: no query sees another sentence.

    Args:
        intervals: `[B, width, R, 2]`, of each sentence by itself.
        queries: `[B]`, how many of the `width` queries of a sentence there are.
        first_keys: `[B]`, where the keys of each sentence begin among all keys:
            ``keys.cumsum(0) - keys``.
        total: N, the sum of `queries`. Without it a GPU is asked and waited for.

    Returns:
        `[N, R, 2]`, int32.

    Example:
        >>> lengths = torch.tensor([2, 1])
        >>> packed = packed_intervals(causal_intervals(lengths, 2), lengths, torch.tensor([0, 2]))
        >>> interval_mask(packed, 3).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    check = Check("packed_intervals")
    check.dims("intervals", intervals, 4, "[B, width, R, 2]")
    check.shape("queries", queries, [len(intervals)], "one for each sentence of `intervals`")
    check.shape("first_keys", first_keys, [len(intervals)], "one for each sentence of `intervals`")
    width = intervals.shape[1]
    check.values("queries", queries, f"from 0 to the {width} of `intervals`", 0, width)
    if total is None or queries.is_cpu:
        found = int(queries.sum())
        if total not in (None, found):
            check.fail("total", f"be the sum of `queries`, {found}", total)
        total = found
    return Places.of(queries, total).intervals(intervals, first_keys)


def _ar(t: Tensor, n: Tensor, b: Tensor) -> Rows:
    zero = torch.zeros_like(t)
    return t < n, (zero, t + 1), (zero, zero)


def _nar(t: Tensor, n: Tensor, b: Tensor) -> Rows:
    zero = torch.zeros_like(t)
    return t < n, (zero, n), (zero, zero)


def _aux_content(t: Tensor, n: Tensor, b: Tensor) -> Rows:
    true = t >= n  # r is t - n
    end = t + 1
    return t < n + b, (torch.zeros_like(t), n - b * true), ((end - b) * true, end * true)


def _aux_query(t: Tensor, n: Tensor, b: Tensor) -> Rows:
    return t < b, (torch.zeros_like(t), n - b), (n - b + t, n + t)


def _permuted_content(t: Tensor, n: Tensor, b: Tensor) -> Rows:
    zero = torch.zeros_like(t)
    return t < n, (zero, torch.maximum(t + 1, n - b)), (zero, zero)


def _permuted_query(t: Tensor, n: Tensor, b: Tensor) -> Rows:
    zero = torch.zeros_like(t)
    return t < b, (zero, n - b + t), (zero, zero)


_PATTERNS: dict[str, Callable[[Tensor, Tensor, Tensor], Rows]] = {
    "ar": _ar,
    "nar": _nar,
    "aux_content": _aux_content,
    "aux_query": _aux_query,
    "permuted_content": _permuted_content,
    "permuted_query": _permuted_query,
}


def _grid(operator: str, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the number of each query and the length of its sentence, `[B, width]`."""
    check = Check(operator)
    check.dims("lengths", lengths, 1, "[B]")
    if width < 0:
        check.fail("width", "be at least 0", width)
    t = torch.arange(width, dtype=torch.int32, device=lengths.device)
    n = lengths.to(torch.int32)[:, None]
    return t.expand(lengths.shape[0], width), n.expand(lengths.shape[0], width)


def _stack(live: Tensor, *pairs: Pair) -> Tensor:
    bounds = torch.stack([bound for pair in pairs for bound in pair], -1)
    return bounds.masked_fill_(~live[..., None], 0).unflatten(-1, (-1, 2))
