"""The packed rows of two-stream training (Liang et al. 2022, JANUS).

Nothing here waits for a GPU: how many rows there are is known from numbers that are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.nn.packed import PackedRows, bounds
from pynar.ops import two_stream_intervals
from pynar.ops.intervals import Places
from pynar.symbols import BOS, EOS, MASK

__all__ = ["TwoStreams", "ar_rows", "two_streams"]


@dataclass(frozen=True)
class TwoStreams:
    """All decoder rows of an update: content rows first, then queries.

    Contents are, for all sentences each, `<s> y` (AR), and U, M and G: the given positions, masks
    for the others, and their true values. Queries are masks at the positions of the AR contents,
    or at the next ones, and masks at the masked positions (AUX). Streams that nobody asked for are
    left out.
    """

    rows: PackedRows  # the intervals are of contents
    content: int  # so many rows have keys and values
    source: Tensor  # int32 [N, 1, 2], the source rows that each row reads
    ar: Tensor  # int64 [sum(T + 1)], AR queries: of masked tokens first, then of others
    nar: Tensor  # int64 [b], M
    aux: Tensor  # int64 [b], AUX queries
    ar_labels: Tensor  # int64 [sum(T + 1)], in the order of `ar`
    labels: Tensor  # int64 [b], of M, of the AUX queries and of the first b AR queries


def two_streams(
    target: Tensor,
    lengths: Tensor,
    masked: Tensor,
    source_lengths: Tensor,
    *,
    tokens: int,
    num_masked: int,
    streams: tuple[str, ...] = ("ar", "nar", "aux"),
    query_positions: str = "previous",
) -> TwoStreams:
    """Lays out two-stream training in packed rows.

    Every row stands at the position of its token in `<s> y </s>`, but the AR query of a token may
    stand at the position before it, where the last content is that it sees.

    Args:
        target: `[B, T]`, without `<s>` and `</s>`.
        lengths: `[B]`.
        masked: `[B, T]`, boolean, which tokens are masked; none beyond a length.
        source_lengths: `[B]`.
        tokens: the sum of `lengths`.
        num_masked: b, the number of masked tokens.
        streams: those to lay out; G goes with "aux".
        query_positions: "previous" or "own", of AR queries.
    """
    sentences, width = target.shape
    full = F.pad(target, (1, 1))
    full[:, :1] = BOS
    full = full.scatter(1, lengths[:, None] + 1, EOS)
    hidden = F.pad(masked, (1, 1))
    counts = masked.sum(1)
    empty = lengths.new_empty(0)

    # Of each block of rows: tokens, positions, sentences and intervals; contents, then queries.
    contents: list[tuple[Tensor, ...]] = []
    queries: list[tuple[Tensor, ...]] = []
    ar = nar = aux = ar_labels = labels = empty
    content = 0
    if "ar" in streams:
        count = tokens + sentences
        at = Places.of(lengths + 1, count)
        pattern = two_stream_intervals(lengths + 1, counts, "ar", width=width + 1)
        sees = at.intervals(pattern, at.start)
        contents.append((full[at.sentence, at.place], at.place, at.sentence, sees))
        place = at.place + (query_positions == "own")
        queries.append((torch.full_like(place, MASK), place, at.sentence, sees))
        # Stable, so that masked tokens stand in the order of the other streams.
        ar = (~hidden[at.sentence, at.place + 1]).int().argsort(stable=True)
        ar_labels = full[at.sentence[ar], at.place[ar] + 1]
        content += count
    if "nar" in streams or "aux" in streams:
        at = Places.of(lengths + 2, tokens + 2 * sentences)
        kind = hidden[at.sentence, at.place].int()
        first = (1 - kind).argsort(stable=True)[:num_masked]
        sentence, place, rows = at.sentence, at.place, lengths + 2
        name = "nar"
        if "aux" in streams:
            sentence = torch.cat([sentence, sentence[first]])
            place = torch.cat([place, place[first]])
            kind = torch.cat([kind, torch.full_like(first, 2, dtype=torch.int32)])
            rows, name = rows + counts, "aux_content"
        order = (3 * sentence + kind).argsort(stable=True)
        sentence, place, kind = sentence[order], place[order], kind[order]
        here = Places.of(rows, len(order))
        start = here.start + content
        pattern = two_stream_intervals(lengths + 2, counts, name, width=2 * width + 2)
        seen = torch.where(kind == 1, MASK, full[sentence, place])
        contents.append((seen, place, sentence, here.intervals(pattern, start)))
        nar = (kind != 1).int().argsort(stable=True)[:num_masked] + content
        content += len(order)
        sentence, place = at.sentence[first], at.place[first]
        labels = full[sentence, place]
        if "aux" in streams:
            each = Places.of(counts, num_masked)
            pattern = two_stream_intervals(lengths + 2, counts, "aux_query", width=width)
            masks = torch.full_like(place, MASK)
            queries.append((masks, place, sentence, each.intervals(pattern, start)))
            aux = torch.arange(num_masked, device=target.device)
            aux = aux + content + sum(len(block[0]) for block in queries[:-1])
    ar = ar + content
    parts = zip(*contents, *queries, strict=True)
    ids, positions, sentence, sees = (torch.cat(part) for part in parts)
    packed = PackedRows(ids, positions, sentence, sees, width + 2)
    reads = bounds(source_lengths)[sentence][:, None]
    return TwoStreams(packed, content, reads, ar, nar, aux, ar_labels, labels)


def ar_rows(
    target: Tensor, lengths: Tensor, first: Tensor, *, query_positions: str = "previous"
) -> tuple[PackedRows, int]:
    """The AR streams of `target: [B, T]`, to predict what follows `first: [B]` or more tokens.

    Returns the rows, contents `<s> y` of every sentence and then queries, and how many of them are
    contents.
    """
    at = Places.of(lengths + 1, int((lengths + 1).sum()))
    ask = Places.of(lengths - first + 1, int((lengths - first + 1).sum()))
    width = target.shape[1] + 1
    pattern = two_stream_intervals(lengths + 1, torch.zeros_like(lengths), "ar", width=width)
    sees = at.intervals(pattern, at.start)
    place = ask.place + first[ask.sentence]
    contents = F.pad(target, (1, 0), value=BOS)[at.sentence, at.place]
    rows = PackedRows(
        torch.cat([contents, torch.full_like(place, MASK)]),
        torch.cat([at.place, place + (query_positions == "own")]),
        torch.cat([at.sentence, ask.sentence]),
        torch.cat([sees, sees[at.start[ask.sentence] + place]]),
        width + 1,
    )
    return rows, len(contents)
