from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pynar.ops import (
    causal_intervals,
    interval_attention,
    interval_mask,
    packed_intervals,
    padding_intervals,
    two_stream_intervals,
)

LONGEST = 8
SIZES = [(n, b) for n in range(LONGEST + 1) for b in range(n + 1)]
LENGTHS = torch.tensor([n for n, _ in SIZES])
MASKED = torch.tensor([b for _, b in SIZES])

# What a query sees, by the blocks in which the two stand and their places r, c in them. Columns
# are given as (block, place), "U" for a position that is given, "M" for a mask, "G" for a true
# value.
Rule = Callable[[str, int, str, int], bool]


def content_rule(row: str, r: int, column: str, c: int) -> bool:
    if row in "UM":
        return column in "UM"
    return column == "U" or (column == "M" and c > r) or (column == "G" and c <= r)


def query_rule(row: str, r: int, column: str, c: int) -> bool:
    return column == "U" or (column == "M" and c >= r) or (column == "G" and c < r)


def permuted_content_rule(row: str, r: int, column: str, c: int) -> bool:
    return column == "U" or (row == column == "G" and c <= r)


def permuted_query_rule(row: str, r: int, column: str, c: int) -> bool:
    return column == "U" or c < r


RULES: dict[str, tuple[str, str, Rule]] = {
    "nar": ("UM", "UM", content_rule),
    "aux_content": ("UMG", "UMG", content_rule),
    "aux_query": ("Q", "UMG", query_rule),
    "permuted_content": ("UG", "UG", permuted_content_rule),
    "permuted_query": ("Q", "UG", permuted_query_rule),
}


def places(blocks: str, n: int, b: int) -> list[tuple[str, int]]:
    return [(block, i) for block in blocks for i in range(n - b if block == "U" else b)]


@pytest.mark.parametrize("pattern", RULES)
def test_two_stream_patterns_follow_the_visibility_rule(pattern: str) -> None:
    rows, columns, rule = RULES[pattern]
    width = 2 * LONGEST
    intervals = two_stream_intervals(LENGTHS, MASKED, pattern, width=width)
    assert intervals.shape == (len(SIZES), width, 2, 2)
    assert intervals.dtype == torch.int32
    got = interval_mask(intervals, width)
    for i, (n, b) in enumerate(SIZES):
        want = torch.zeros(width, width, dtype=torch.bool)
        for r, row in enumerate(places(rows, n, b)):
            for c, column in enumerate(places(columns, n, b)):
                want[r, c] = rule(*row, *column)
        torch.testing.assert_close(got[i], want)


def test_every_compensated_row_sees_each_position_once() -> None:
    width = 2 * LONGEST
    content = interval_mask(
        two_stream_intervals(LENGTHS, MASKED, "aux_content", width=width), width
    )
    queries = interval_mask(two_stream_intervals(LENGTHS, MASKED, "aux_query", width=width), width)
    for i, (n, b) in enumerate(SIZES):
        for mask in (content[i, n : n + b], queries[i, :b]):
            given, masks, values = mask[:, : n + b].split([n - b, b, b], 1)
            assert given.all()
            assert torch.equal(masks ^ values, torch.ones(b, b, dtype=torch.bool))


def test_the_worked_example_of_six_positions() -> None:
    lengths, masked = torch.tensor([6]), torch.tensor([3])
    content = interval_mask(two_stream_intervals(lengths, masked, "aux_content", width=9), 9)
    want = ["111111000"] * 6 + ["111011100", "111001110", "111000111"]
    assert ["".join(str(int(x)) for x in row) for row in content[0]] == want
    queries = interval_mask(two_stream_intervals(lengths, masked, "aux_query", width=3), 9)
    want = ["111111000", "111011100", "111001110"]
    assert ["".join(str(int(x)) for x in row) for row in queries[0]] == want


def test_causal_and_padding_patterns() -> None:
    t = torch.arange(10)
    live = (t < LENGTHS[:, None])[:, :, None] & (t < LENGTHS[:, None])[:, None]
    want = live & (t <= t[:, None])
    torch.testing.assert_close(interval_mask(causal_intervals(LENGTHS, 10), 10), want)
    ar = two_stream_intervals(LENGTHS, MASKED, "ar", width=10)
    torch.testing.assert_close(interval_mask(ar, 10), want)
    torch.testing.assert_close(interval_mask(padding_intervals(LENGTHS, 10), 10), live)
    for block in (2, 3, 20):
        got = interval_mask(causal_intervals(LENGTHS, 10, block=block), 10)
        torch.testing.assert_close(got, live & (t // block <= t[:, None] // block))


def test_no_sentences_and_no_queries() -> None:
    none = LENGTHS[:0]
    assert padding_intervals(none, 3).shape == (0, 3, 1, 2)
    assert two_stream_intervals(none, none, "aux_content", width=3).shape == (0, 3, 2, 2)
    assert causal_intervals(LENGTHS, 0).shape == (len(SIZES), 0, 1, 2)


def test_streams_share_one_packed_call() -> None:
    n, b = 6, 3
    lengths, masked = torch.tensor([n]), torch.tensor([b])
    content = two_stream_intervals(lengths, masked, "aux_content", width=n + b)
    queries = two_stream_intervals(lengths, masked, "aux_query", width=b)
    q, kv = torch.randn(1, 2, n + 2 * b, 8), torch.randn(1, 2, n + b, 8)
    both = interval_attention(q, kv, kv, torch.cat([content, queries], 1))
    assert isinstance(both, Tensor)
    apart = [
        interval_attention(q[:, :, : n + b], kv, kv, content),
        interval_attention(q[:, :, n + b :], kv, kv, queries),
    ]
    torch.testing.assert_close(both, torch.cat(apart, 2))


@pytest.mark.parametrize("pattern", RULES)
def test_packed_sentences_see_themselves_alone(pattern: str) -> None:
    rows, columns, _ = RULES[pattern]
    some = torch.tensor([i for i, n in enumerate(LENGTHS.tolist()) if n in (0, 1, 5, 6)])
    lengths, masked = LENGTHS[some], MASKED[some]
    sizes = list(zip(lengths.tolist(), masked.tolist(), strict=True))
    queries = torch.tensor([len(places(rows, n, b)) for n, b in sizes])
    keys = torch.tensor([len(places(columns, n, b)) for n, b in sizes])
    intervals = two_stream_intervals(lengths, masked, pattern, width=12)
    packed = packed_intervals(intervals, queries, keys.cumsum(0) - keys)
    alone = interval_mask(intervals, int(keys.max()))
    blocks = [alone[i, :q, :k] for i, (q, k) in enumerate(zip(queries, keys, strict=True))]
    torch.testing.assert_close(interval_mask(packed, int(keys.sum())), torch.block_diag(*blocks))
    known = packed_intervals(intervals, queries, keys.cumsum(0) - keys, total=int(queries.sum()))
    torch.testing.assert_close(known, packed)


def test_sentences_in_one_row_of_a_batch_attend_as_alone() -> None:
    lengths = torch.tensor([3, 1, 4])
    first = lengths.cumsum(0) - lengths
    packed = packed_intervals(causal_intervals(lengths, 4), lengths, first, total=8)
    q, k, v = torch.randn(3, 1, 2, 8, 16).unbind()
    got = interval_attention(q, k, v, packed[None])
    for start, n in zip(first.tolist(), lengths.tolist(), strict=True):
        own = [x[:, :, start : start + n] for x in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True)
        torch.testing.assert_close(got[:, :, start : start + n], want)  # type: ignore[index]


def test_compile_into_one_graph() -> None:
    def streams(lengths: Tensor, masked: Tensor) -> Tensor:
        return two_stream_intervals(lengths, masked, "aux_content", width=16)

    compiled = torch.compile(streams, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LENGTHS, MASKED), streams(LENGTHS, MASKED))


def test_wrong_calls_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match="`pattern` must be one of ar, nar, aux_content, aux_quer"):
        two_stream_intervals(LENGTHS, MASKED, "aux", width=3)
    with pytest.raises(ValueError, match="`masked` must have shape .* .that of `lengths`."):
        two_stream_intervals(LENGTHS, MASKED[1:], "nar", width=3)
    with pytest.raises(ValueError, match="causal_intervals: `block` must be at least 1, got 0"):
        causal_intervals(LENGTHS, 3, block=0)
    with pytest.raises(ValueError, match="`lengths` must have 1 dimensions .B., got shape"):
        padding_intervals(LENGTHS[None], 3)
    causal = causal_intervals(LENGTHS, 3)
    with pytest.raises(ValueError, match="`queries` must have shape .* .one for each sentence"):
        packed_intervals(causal, LENGTHS[1:], LENGTHS)
    with pytest.raises(ValueError, match=r"`queries` must have values from 0 to the 3 of `inter"):
        packed_intervals(causal, LENGTHS, LENGTHS)
    with pytest.raises(ValueError, match="`total` must be the sum of `queries`, 45, got 44"):
        packed_intervals(causal, torch.ones_like(LENGTHS), LENGTHS, total=44)
