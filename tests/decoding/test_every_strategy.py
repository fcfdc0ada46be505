from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_systems import LENGTHS, SYSTEMS, assert_same, make_model, make_source, take

from pynar.decoding import Hypotheses
from pynar.symbols import EOS, MASK, PAD, UNK

every_system = pytest.mark.parametrize("system", SYSTEMS)


def run(system: str, source, lengths, indices=None) -> Hypotheses:
    name, changes, strategy = SYSTEMS[system]
    return strategy.decode(make_model(name, **changes), source, lengths, indices=indices)


@every_system
def test_a_batch_gives_what_its_sentences_give_alone(system: str) -> None:
    source, lengths = make_source(LENGTHS)
    together = run(system, source, lengths)
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1)
        alone = run(system, source[part, :length], lengths[part], torch.tensor([row]))
        assert_same(alone, take(together, [row]))


@every_system
def test_order_and_padding_of_a_batch_change_nothing(system: str) -> None:
    source, lengths = make_source(LENGTHS)
    order = [3, 0, 5, 2, 1, 4]
    wide = F.pad(source, (0, 3), value=PAD)
    live = torch.arange(wide.shape[1]) < lengths[:, None]
    dirty = torch.where(live, wide, UNK)
    moved = run(system, dirty[order], lengths[order], torch.tensor(order))
    assert_same(moved, take(run(system, source, lengths), order))


@every_system
def test_the_sentences_of_the_batch_do_differ(system: str) -> None:
    """Or the two tests above could not fail."""
    source, lengths = make_source(LENGTHS)
    assert len({str(rows) for rows in run(system, source, lengths).lists()}) > 2


@every_system
def test_outputs_are_padded_sorted_and_free_of_special_symbols(system: str) -> None:
    source, lengths = make_source(LENGTHS)
    found = run(system, source, lengths)
    sentences, n, width = found.tokens.shape
    assert found.tokens.dtype == found.lengths.dtype == found.passes.dtype == torch.int64
    assert found.lengths.shape == found.scores.shape == (sentences, n)
    assert found.passes.shape == (sentences,) and (found.passes >= 1).all()
    assert (found.scores.diff(dim=1) <= 0).all() and (found.scores <= 0).all()
    assert found.scores[:, 0].isfinite().all()
    live = torch.arange(width) < found.lengths[..., None]
    assert (found.tokens[~live] == PAD).all()
    assert ((found.tokens[live] == UNK) | (found.tokens[live] > MASK)).all()


@every_system
def test_an_empty_batch_gives_no_hypotheses(system: str) -> None:
    source, lengths = make_source([])
    found = run(system, source, lengths, torch.zeros(0, dtype=torch.long))
    assert found.tokens.shape[0] == 0 and found.lists() == []
    assert found.scores.shape[0] == found.lengths.shape[0] == len(found.passes) == 0


@every_system
def test_decoding_in_half_precision_gives_words(system: str) -> None:
    name, changes, strategy = SYSTEMS[system]
    model, (source, lengths) = make_model(name, **changes), make_source(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = strategy.decode(model, source, lengths)
    whole = strategy.decode(model.bfloat16(), source, lengths)
    exact = run(system, source, lengths)
    for found in (cast, whole):
        assert found.scores[:, 0].isfinite().all()
        # Draws aside, eight bits of mantissa seldom change the best score by much.
        if not system.startswith("sampling"):
            difference = (found.scores[:, 0] - exact.scores[:, 0]).abs().median()
            assert difference < 0.2
    assert EOS not in whole.tokens
