from __future__ import annotations

import torch

from pynar.nn.packed import pack
from pynar.nn.two_stream import two_streams
from pynar.ops import interval_mask
from pynar.symbols import BOS, EOS, MASK

# Two sentences; of the first, positions 2, 3 and 5 of `<s> y </s>` are masked.
TARGET = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 0, 0, 0]])
LENGTHS = torch.tensor([5, 2])
MASKED = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
SOURCE = torch.tensor([3, 4])
TOTALS = {"tokens": 7, "num_masked": 3}


def rows(text: str) -> list[list[int]]:
    return [[int(x) for x in line if x in "01"] for line in text.split("\n") if line.strip()]


def test_rows_of_a_small_batch_by_hand() -> None:
    streams = two_streams(TARGET, LENGTHS, MASKED, SOURCE, **TOTALS)
    packed = streams.rows
    ar = [BOS, 11, 12, 13, 14, 15, BOS, 21, 22]
    aux = [BOS, 11, 14, EOS, MASK, MASK, MASK, 12, 13, 15, BOS, 21, 22, EOS]
    assert packed.tokens.tolist() == [*ar, *aux, *[MASK] * 9, *[MASK] * 3]
    ar_places = [0, 1, 2, 3, 4, 5, 0, 1, 2]
    aux_places = [0, 1, 4, 6, 2, 3, 5, 2, 3, 5, 0, 1, 2, 3]
    assert packed.positions.tolist() == [*ar_places, *aux_places, *ar_places, 2, 3, 5]
    assert streams.content == 23 and packed.width == 7
    assert streams.nar.tolist() == [13, 14, 15] and streams.aux.tolist() == [32, 33, 34]
    # Masked tokens 2, 3 and 5 are predicted one place before, and first.
    assert streams.ar.tolist() == [24, 25, 27, 23, 26, 28, 29, 30, 31]
    assert streams.ar_labels.tolist() == [12, 13, 15, 11, 14, EOS, 21, 22, EOS]
    assert streams.labels.tolist() == [12, 13, 15]
    reads = [[[0, 3]]] * 6 + [[[3, 7]]] * 3
    contents = [[[0, 3]]] * 10 + [[[3, 7]]] * 4
    assert streams.source.tolist() == [*reads, *contents, *reads, *[[[0, 3]]] * 3]


def test_rows_see_what_the_paper_draws() -> None:
    """Columns: U (four given positions), M, G."""
    streams = two_streams(TARGET, LENGTHS, MASKED, SOURCE, **TOTALS)
    sees = interval_mask(streams.rows.intervals, streams.content).int()
    content = rows("1111 111 000\n" * 7 + "1111 011 100\n1111 001 110\n1111 000 111")
    query = rows("1111 111 000\n1111 011 100\n1111 001 110")
    own = slice(9, 19)
    assert sees[own, own].tolist() == content and sees[32:, own].tolist() == query
    second = slice(19, 23)
    assert sees[second, second].all()
    causal = torch.ones(6, 6).tril().int()
    assert torch.equal(sees[:6, :6], causal) and torch.equal(sees[23:29, :6], causal)
    assert torch.equal(sees[6:9, 6:9], causal[:3, :3])
    assert torch.equal(sees[29:32, 6:9], causal[:3, :3])
    # And nothing else: no query is a key, and no row sees another sentence or stream.
    seen = 2 * (21 + 6) + sum(map(sum, content)) + sum(map(sum, query)) + 16
    assert int(sees.sum()) == seen and sees.shape == (35, 23)


def test_streams_that_nobody_asked_for_have_no_rows() -> None:
    def counts(*names: str) -> tuple[int, int]:
        streams = two_streams(TARGET, LENGTHS, MASKED, SOURCE, **TOTALS, streams=names)
        return streams.content, len(streams.rows.tokens)

    assert counts("ar") == (9, 18)
    assert counts("nar") == (11, 11)  # no true values of the masked
    assert counts("aux") == counts("nar", "aux") == (14, 17)
    assert counts("ar", "nar") == (20, 29)


def test_packing_leaves_the_padding_out() -> None:
    packed = pack(TARGET, LENGTHS, 7)
    assert packed.tokens.tolist() == [11, 12, 13, 14, 15, 21, 22]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert packed.intervals.tolist() == [[[0, 5]]] * 5 + [[[5, 7]]] * 2


def test_the_layout_waits_for_no_device() -> None:
    """Meta tensors have no values that could be read."""
    meta = [x.to("meta") for x in (TARGET, LENGTHS, MASKED, SOURCE)]
    streams = two_streams(*meta, **TOTALS)
    assert len(streams.rows.tokens) == len(streams.source) == 35
    assert pack(meta[0], meta[1], 7).intervals.shape == (7, 1, 2)
