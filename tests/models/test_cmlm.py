from __future__ import annotations

import torch
from small_models import make_batch, make_example, make_model

from pynar.models.cmlm import uniform_masking
from pynar.symbols import MASK, NUM_SPECIAL, PAD
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)


def targets(lengths: torch.Tensor) -> torch.Tensor:
    width = int(lengths.max())
    tokens = torch.randint(NUM_SPECIAL, 13, (len(lengths), width))
    return tokens.masked_fill(torch.arange(width) >= lengths[:, None], PAD)


def test_one_to_all_of_the_live_tokens_are_masked() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 34, (4000,))
    masked = uniform_masking(targets(lengths), lengths, generator)
    assert masked.dtype == torch.bool
    assert not (masked & (torch.arange(33) >= lengths[:, None])).any()
    assert (masked.sum(1) >= 1).all() and (masked.sum(1) <= lengths).all()


def test_a_sentence_of_no_tokens_has_none_masked() -> None:
    lengths = torch.tensor([0, 3])
    masked = uniform_masking(targets(lengths), lengths, torch.Generator())
    assert masked.sum(1).tolist()[0] == 0
    assert uniform_masking(targets(lengths)[:0], lengths[:0], torch.Generator()).shape == (0, 3)


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_number_masked_is_uniform_and_so_are_the_places() -> None:
    """Chi-square far below five standard deviations above its mean, for every length."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 7):
        rows = 3000 * length
        lengths = torch.full((rows,), length)
        # Beside a longer sentence, as in a batch.
        masked = uniform_masking(torch.full((rows, 9), 7), lengths, generator)
        numbers = masked.sum(1)
        bound = (length - 1) + 5 * (2 * (length - 1)) ** 0.5
        assert chi_square(torch.bincount(numbers, minlength=length + 1)[1:]) <= bound
        places = masked[numbers == 1].long().argmax(1)
        assert chi_square(torch.bincount(places, minlength=length)) <= bound


def test_masking_follows_the_generator() -> None:
    lengths = torch.randint(1, 10, (50,))
    tokens = targets(lengths)
    first, again, other = (
        uniform_masking(tokens, lengths, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_masked_tokens_are_labels_and_all_others_are_seen() -> None:
    batch = make_batch()
    example = make_example(make_model("cmlm"), batch)
    masked = example.inputs == MASK
    assert masked.any()
    assert torch.equal(torch.where(masked, example.labels, example.inputs), batch.target)
    assert not example.labels[~masked].any()
    assert example.counts["token"] == masked.sum()
    assert example.counts["length"] == len(batch)


@torch.no_grad()
def test_every_token_sees_every_other() -> None:
    model, batch = make_model("cmlm"), make_batch(((3, 6),))
    memory = model.encode(batch.source, batch.source_lengths)
    states = model.decode(batch.target, batch.target_lengths, memory)
    for place in range(6):
        changed = batch.target.clone()
        changed[0, place] = MASK
        moved = model.decode(changed, batch.target_lengths, memory) - states
        assert (moved.abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_learned_positions_bound_the_predicted_lengths() -> None:
    model = make_model("cmlm", positions="learned", max_length=7, length_classes=20)
    states, lengths = torch.randn(3, 6, 8), torch.tensor([6, 2, 1])
    predicted, log_probs = model.length.predict(states, lengths, 20)
    assert predicted.max() == 7 and (log_probs > -torch.inf).sum(1).tolist() == [7, 7, 7]
    assert make_model("cmlm", length_classes=20).length.longest is None
