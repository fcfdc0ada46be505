from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from small_models import make_batch, make_example, make_model

from pynar.models.nat import uniform_copy
from pynar.symbols import MASK, PAD
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)


def test_copies_are_the_rounded_formula_for_all_small_lengths() -> None:
    pairs = [(s, t) for s in range(1, 14) for t in range(1, 14)]
    source_lengths, target_lengths = torch.tensor(pairs).T
    index = uniform_copy(source_lengths, target_lengths, 17)
    assert index.shape == (len(pairs), 17)
    for row, (s, t) in zip(index.tolist(), pairs, strict=True):
        expected = [
            floor(Fraction(i * (s - 1), t - 1) + Fraction(1, 2)) if t > 1 else 0 for i in range(t)
        ]
        assert row[:t] == expected
        assert all(0 <= i < s for i in row)  # padding included: it is gathered, too


def test_copies_of_equal_lengths_are_the_identity_and_keep_both_ends() -> None:
    lengths = torch.tensor([1, 5, 33])
    assert torch.equal(uniform_copy(lengths, lengths, 33)[2], torch.arange(33))
    index = uniform_copy(torch.tensor([9]), torch.tensor([4]), 4)
    assert index[0, 0] == 0 and index[0, 3] == 8


def test_no_target_is_an_input_and_every_target_is_a_label() -> None:
    batch = make_batch()
    for kind in ("nat-copy", "nat-mask"):
        example = make_example(make_model(kind), batch)
        live = batch.target != PAD
        assert torch.equal(example.labels, batch.target)
        assert torch.equal(example.inputs, torch.where(live, MASK, PAD))
        assert example.counts["token"] == live.sum()


@pytest.mark.parametrize("kind", ["nat-copy", "nat-copy-separate"])
@torch.no_grad()
def test_the_decoder_sees_the_copied_source_without_its_end(kind: str) -> None:
    model, batch = make_model(kind), make_batch(((3, 4), (0, 2), (6, 1)))
    memory = model.encode(batch.source, batch.source_lengths)
    states = model.decode(torch.full_like(batch.target, MASK), batch.target_lengths, memory)
    for row, length in enumerate(batch.target_lengths.tolist()):
        last = max(int(batch.source_lengths[row]) - 2, 0)  # of the words; the end alone if none
        ids = []
        for t in range(length):
            place = Fraction(t * last, length - 1) if length > 1 else Fraction(0)
            ids.append(int(batch.source[row, floor(place + Fraction(1, 2))]))
        scaled = 8**0.5 * model.source_embedding.tokens.weight[ids]
        x = (scaled + model.target_embedding.positions(0, length))[None]
        own = memory.select(torch.tensor([row]))
        expected = model.decoder(x, own, batch.target_lengths[row : row + 1])
        torch.testing.assert_close(states[row : row + 1, :length], expected, **CLOSE)


@torch.no_grad()
def test_length_candidates_copy_from_their_own_sentence() -> None:
    model, batch = make_model("nat-copy"), make_batch(((3, 4), (6, 2)))
    memory = model.encode(batch.source, batch.source_lengths)
    lengths = torch.tensor([4, 2, 3, 5])
    tokens = torch.full((4, 5), MASK)
    states = model.decode(tokens, lengths, memory)
    for row, length in enumerate(lengths.tolist()):
        own = memory.select(torch.tensor([row // 2]))
        alone = model.decode(tokens[:1, :length], lengths[row : row + 1], own)
        torch.testing.assert_close(states[row : row + 1, :length], alone, **CLOSE)
