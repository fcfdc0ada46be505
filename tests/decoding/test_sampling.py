from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from small_systems import LENGTHS, assert_same, make_model, make_source, next_log_probs, take
from torch import Tensor

from pynar.decoding import Greedy, Sampling
from pynar.symbols import EOS


def sequence_probabilities(
    model, source: Tensor, limit: int, top_k: int, temperature: float
) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of at most `limit` steps, by enumeration."""
    ended: dict[tuple[int, ...], float] = {}
    live: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(limit - 1):
        grown: dict[tuple[int, ...], float] = {}
        for prefix, probability in live.items():
            log_probs = next_log_probs(model, source, prefix)
            weights = {t: math.exp(x / temperature) for t, x in enumerate(log_probs)}
            kept = sorted(weights, key=weights.__getitem__, reverse=True)[: top_k or None]
            total = sum(weights[t] for t in kept)
            for token in kept:
                share = probability * weights[token] / total
                if token == EOS:
                    ended[prefix] = share
                elif share:
                    grown[(*prefix, token)] = share
        live = grown
    return ended | live  # what has not ended by then is ended


@pytest.mark.parametrize("top_k,temperature", [(0, 1.0), (0, 0.6), (0, 2.0), (2, 1.0), (3, 1.5)])
@torch.no_grad()
def test_sequences_are_drawn_as_often_as_they_are_probable(top_k: int, temperature: float) -> None:
    """Chi-square over sequences, at most five standard deviations above its mean."""
    model, draws = make_model("autoregressive", 8), 3000
    source, lengths = make_source([3, 2], 8)
    strategy = Sampling(draws, top_k, temperature, seed=7, max_ratio=0.0, max_extra=3)
    found = strategy.decode(model, source, lengths).lists()
    for row, length in enumerate([3, 2]):
        exact = sequence_probabilities(model, source[row, :length], 3, top_k, temperature)
        assert abs(sum(exact.values()) - 1) < 1e-6
        counts = Counter(tuple(tokens) for tokens in found[row])
        assert counts.keys() <= exact.keys()
        bins = [(counts[x], draws * p) for x, p in exact.items() if draws * p >= 5]
        rest = (draws - sum(o for o, _ in bins), draws - sum(e for _, e in bins))
        bins += [rest] if rest[1] >= 5 else []
        assert len(bins) >= 3
        statistic = sum((o - e) ** 2 / e for o, e in bins)
        freedom = len(bins) - 1
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("samples", [1, 3])
def test_draws_belong_to_the_name_of_a_sentence_not_to_its_place(samples: int) -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    strategy, names = Sampling(samples), torch.tensor([40, 2, 17, 8, 33, 5])
    whole = strategy.decode(model, source, lengths, indices=names)
    order = [4, 2, 0, 5, 1, 3]
    moved = strategy.decode(model, source[order], lengths[order], indices=names[order])
    assert_same(moved, take(whole, order))
    # In shorter company the limit, and with it the table of random numbers, is another.
    short = [1, 3]
    part = strategy.decode(model, source[short, :2], lengths[short], indices=names[short])
    assert_same(part, take(whole, short))


def test_without_names_sentences_are_named_by_place() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    named = Sampling().decode(model, source, lengths, indices=torch.arange(6))
    assert_same(Sampling().decode(model, source, lengths), named)


def test_names_seeds_and_samples_have_draws_of_their_own() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source([7] * 6)
    source = source[:1].expand(6, -1)

    def drawn(strategy: Sampling, first: int = 0) -> list:
        return strategy.decode(
            model, source, lengths, indices=torch.arange(first, first + 6)
        ).lists()

    assert len({str(rows) for rows in drawn(Sampling(temperature=2.0))}) > 3
    assert drawn(Sampling(seed=1)) != drawn(Sampling(seed=2))
    assert drawn(Sampling(), 0) != drawn(Sampling(), 1)
    assert all(len({str(t) for t in rows}) > 1 for rows in drawn(Sampling(8, temperature=2.0)))


def test_more_samples_keep_those_there_were() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    few, many = (Sampling(n).decode(model, source, lengths).lists() for n in (2, 5))
    for some, more in zip(few, many, strict=True):
        assert not Counter(map(str, some)) - Counter(map(str, more))


@torch.no_grad()
def test_scores_are_the_models_own_whatever_the_temperature() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    found = Sampling(3, top_k=4, temperature=2.0).decode(model, source, lengths)
    assert (found.scores.diff(dim=1) <= 0).all()
    for rank in range(3):
        scores = model.score(source, lengths, found.tokens[:, rank], found.lengths[:, rank])
        torch.testing.assert_close(found.scores[:, rank], scores / (found.lengths[:, rank] + 1))


@pytest.mark.parametrize("strategy", [Sampling(2, top_k=1), Sampling(2, temperature=1e-4)])
def test_the_best_token_alone_is_greedy_search(strategy: Sampling) -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    greedy = Greedy().decode(model, source, lengths)
    found = strategy.decode(model, source, lengths)
    assert found.lists() == [rows * 2 for rows in greedy.lists()]
    torch.testing.assert_close(found.scores, greedy.scores.expand(-1, 2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_top_k_draws_none_but_the_k_most_probable() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    found = Sampling(20, top_k=2, temperature=5.0).decode(model, source, lengths).lists()
    seen = set()
    for row, length in enumerate(LENGTHS):
        best = next_log_probs(model, source[row, :length], ())
        allowed = sorted(range(len(best)), key=best.__getitem__)[-2:]
        first = {tokens[0] if tokens else EOS for tokens in found[row]}
        assert first <= set(allowed)
        seen.add(len(first))
    assert 2 in seen


def test_more_than_all_tokens_is_all_tokens() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    wide = Sampling(top_k=100, temperature=0.01).decode(model, source, lengths)
    assert_same(wide, Sampling(temperature=0.01).decode(model, source, lengths))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"samples": 0}, "Sampling: `samples` must be positive, got 0"),
        ({"temperature": 0.0}, "Sampling: `temperature` must be positive, got 0.0"),
        ({"temperature": math.nan}, "Sampling: `temperature` must be positive, got nan"),
        ({"top_k": -1}, r"`top_k` must be 0 \(off\) or positive, got -1"),
        ({"seed": -1}, "Sampling: `seed` must not be negative, got -1"),
        ({"max_ratio": -1.0}, "Sampling: `max_ratio` must not be negative, got -1.0"),
    ],
)
def test_senseless_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)
