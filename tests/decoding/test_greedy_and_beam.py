from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from small_systems import LENGTHS, assert_same, make_model, make_source, next_log_probs
from torch import Tensor

from pynar.decoding import BeamSearch, Greedy
from pynar.decoding.autoregressive import length_limits
from pynar.models import AutoregressiveTransformer
from pynar.symbols import BOS, EOS, MASK, NUM_SPECIAL, PAD, UNK

Scored = list[tuple[float, tuple[int, ...]]]


def limit_of(length: int, strategy: Greedy | BeamSearch) -> int:
    return int(length * strategy.max_ratio) + strategy.max_extra


def slow_greedy(model: AutoregressiveTransformer, source: Tensor, limit: int):
    """Whole prefixes again at every step: tokens, score, steps."""
    prefix, total = (), 0.0
    for step in range(1, limit + 1):
        log_probs = next_log_probs(model, source, prefix)
        token = max(range(len(log_probs)), key=log_probs.__getitem__)
        if step == limit:
            token = EOS
        total += log_probs[token]
        if token == EOS:
            return list(prefix), total / step, step
        prefix += (token,)
    raise AssertionError


def slow_beam(
    log_probs_after: Callable[[tuple[int, ...]], list[float]],
    limit: int,
    *,
    beam: int,
    penalty: float,
    early_stop: bool,
) -> Scored:
    """Beam search of one sentence over lists; goes to the limit unless `early_stop`."""
    live: Scored = [(0.0, ())]
    done: Scored = []
    for length in range(1, limit + 1):
        extended: Scored = []
        for total, prefix in live:
            for token, log_prob in enumerate(log_probs_after(prefix)):
                if log_prob > -torch.inf and (length < limit or token == EOS):
                    extended.append((total + log_prob, (*prefix, token)))
        extended.sort(reverse=True)
        ended = [(t / length**penalty, p[:-1]) for t, p in extended[:beam] if p[-1] == EOS]
        done = sorted(done + ended, reverse=True)[:beam]
        live = [(t, p) for t, p in extended if p[-1] != EOS][:beam]
        if early_stop and len(done) == beam:
            break
    return done


def assert_found(found, row: int, expected: Scored) -> None:
    assert [tuple(tokens) for tokens in found.lists()[row][: len(expected)]] == [
        tokens for _, tokens in expected
    ]
    scores = torch.tensor([score for score, _ in expected])
    torch.testing.assert_close(found.scores[row, : len(expected)], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"positions": "learned"}])
@torch.no_grad()
def test_greedy_takes_the_best_token_of_every_whole_prefix(changes: dict) -> None:
    model, (source, lengths) = make_model("autoregressive", **changes), make_source(LENGTHS)
    strategy = Greedy(max_ratio=1.0, max_extra=1)
    found = strategy.decode(model, source, lengths)
    for row, length in enumerate(LENGTHS):
        tokens, score, steps = slow_greedy(model, source[row, :length], limit_of(length, strategy))
        assert found.lists()[row] == [tokens]
        assert abs(found.scores[row, 0] - score) < 1e-4 and found.passes[row] == steps


def test_some_sentences_end_before_others_and_some_at_the_limit() -> None:
    """The cases that the other tests rest on do occur."""
    source, lengths = make_source(LENGTHS)
    passes = Greedy(max_ratio=1.0, max_extra=1).decode(
        make_model("autoregressive"), source, lengths
    )
    limits = length_limits(lengths, 1.0, 1)
    assert (passes.passes < limits).any() and (passes.passes == limits).any()


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_of_one_is_greedy_search(penalty: float) -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    greedy = Greedy().decode(model, source, lengths)
    if penalty == 0:
        greedy.scores = greedy.scores * greedy.passes[:, None]
    assert_same(BeamSearch(1, penalty).decode(model, source, lengths), greedy)


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("penalty", [-2.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("early_stop", [False, True])
@torch.no_grad()
def test_beam_search_is_the_slow_one(beam: int, penalty: float, early_stop: bool) -> None:
    """Without `early_stop` the slow one never stops: what stops early may lose nothing by it."""
    lengths_list = [4, 1, 3]
    model, (source, lengths) = make_model("autoregressive"), make_source(lengths_list)
    strategy = BeamSearch(beam, penalty, beam, early_stop, max_ratio=1.0, max_extra=3)
    found = strategy.decode(model, source, lengths)
    for row, length in enumerate(lengths_list):
        own = source[row, :length]
        expected = slow_beam(
            lambda prefix, own=own: next_log_probs(model, own, prefix),
            limit_of(length, strategy),
            beam=beam,
            penalty=penalty,
            early_stop=early_stop,
        )
        assert_found(found, row, expected)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("beam", [1, 2])
def test_stopping_without_early_stop_loses_no_hypothesis(beam: int, penalty: float) -> None:
    """Of random chains that grow certain how to go on: late ends can still be the best."""
    vocabulary, limit = 9, 8
    model = make_model("autoregressive", vocabulary)
    source, lengths = make_source([1], vocabulary)
    strategy = BeamSearch(beam, penalty, beam, early_stop=False, max_ratio=0.0, max_extra=limit)
    early = 0
    for _ in range(60):
        sharpness = torch.linspace(1, 15, limit)[:, None, None]
        logits = sharpness * torch.randn(limit, vocabulary, vocabulary)
        logits[..., [PAD, BOS, MASK]] = -torch.inf
        table = logits.log_softmax(-1)

        def step(last: Tensor, memory, cache, table: Tensor = table) -> Tensor:
            cache.position += 1
            return table[cache.position - 1, last].clone()

        # The states are the log-probabilities themselves.
        model.step = step
        model.best = lambda states, k=None: (*states.topk(k)[::-1], torch.zeros(len(states)))
        model.log_prob = lambda states, tokens, lse: states.gather(1, tokens[:, None])[:, 0]
        found = strategy.decode(model, source, lengths)
        expected = slow_beam(
            lambda prefix, table=table: table[len(prefix), ([BOS, *prefix])[-1]].tolist(),
            limit,
            beam=beam,
            penalty=penalty,
            early_stop=False,
        )
        assert_found(found, 0, expected)
        early += int(found.passes[0]) < limit
    assert early > 10


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_sequences(penalty: float) -> None:
    vocabulary, lengths_list = 8, [2, 3, 1]
    model = make_model("autoregressive", vocabulary)
    source, lengths = make_source(lengths_list, vocabulary)
    words = [UNK, *range(NUM_SPECIAL, vocabulary)]
    beam = sum(len(words) ** n for n in range(4))
    strategy = BeamSearch(beam, penalty, n_best=beam, early_stop=False, max_ratio=1.0, max_extra=1)
    found = strategy.decode(model, source, lengths)
    for row, length in enumerate(lengths_list):
        limit = length + 1
        everything = [c for n in range(limit) for c in itertools.product(words, repeat=n)]
        target = torch.tensor([[*c, *[PAD] * (limit - len(c))] for c in everything])
        counts = torch.tensor([len(c) for c in everything])
        scores = model.score(
            source[row : row + 1, :length].expand(len(everything), -1),
            torch.full_like(counts, length),
            target,
            counts,
        )
        ranked = sorted(
            zip((scores / (counts + 1.0) ** penalty).tolist(), everything, strict=True),
            reverse=True,
        )
        assert_found(found, row, ranked)
        # There are no more: the other places are empty and say so.
        assert (found.scores[row, len(ranked) :] == -torch.inf).all()
        assert not found.lengths[row, len(ranked) :].any()
        assert not found.tokens[row, len(ranked) :].any()


@torch.no_grad()
def test_the_n_best_are_sorted_distinct_and_priced_by_the_model() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    strategy = BeamSearch(beam=6, length_penalty=0.7, n_best=5)
    found = strategy.decode(model, source, lengths)
    assert found.tokens.shape[1] == 5
    assert (found.scores.diff(dim=1) <= 0).all()
    for rank in range(5):
        scores = model.score(source, lengths, found.tokens[:, rank], found.lengths[:, rank])
        priced = scores / (found.lengths[:, rank] + 1.0) ** 0.7
        torch.testing.assert_close(found.scores[:, rank], priced, rtol=1e-4, atol=1e-5)
    for rows in found.lists():
        assert len({tuple(row) for row in rows}) == 5


@torch.no_grad()
def test_the_first_n_of_the_beam_do_not_depend_on_n() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    every = BeamSearch(beam=4, n_best=4).decode(model, source, lengths)
    few = BeamSearch(beam=4, n_best=2).decode(model, source, lengths)
    assert few.lists() == [rows[:2] for rows in every.lists()]
    torch.testing.assert_close(few.scores, every.scores[:, :2], rtol=0, atol=0)


def never_ending(model: AutoregressiveTransformer) -> AutoregressiveTransformer:
    """The same model, which finds an end most improbable."""
    model.exclusion[EOS] = -60.0
    return model


@pytest.mark.parametrize(
    "strategy",
    [
        Greedy(max_ratio=1.5, max_extra=2),
        BeamSearch(beam=3, max_ratio=1.5, max_extra=2, length_penalty=1.0),
        BeamSearch(beam=3, max_ratio=1.5, max_extra=2, early_stop=False),
    ],
)
@torch.no_grad()
def test_each_sentence_has_its_limit_and_the_end_its_price(strategy) -> None:
    model = never_ending(make_model("autoregressive"))
    source, lengths = make_source(LENGTHS)
    found = strategy.decode(model, source, lengths)
    limits = [limit_of(length, strategy) for length in LENGTHS]
    assert found.passes.tolist() == limits
    assert found.lengths[:, 0].tolist() == [limit - 1 for limit in limits]
    scores = model.score(source, lengths, found.tokens[:, 0], found.lengths[:, 0])
    assert (scores < -50).all()
    torch.testing.assert_close(found.scores[:, 0], scores / torch.tensor(limits))


@pytest.mark.parametrize("strategy", [Greedy(), BeamSearch(beam=2)])
def test_learned_positions_end_a_sentence_instead_of_failing(strategy) -> None:
    model = make_model("autoregressive", positions="learned", max_length=13)
    source, lengths = make_source([6, 2])
    found = strategy.decode(never_ending(model), source, lengths)
    assert found.passes.tolist() == [13, 13] and found.lengths[:, 0].tolist() == [12, 12]


@pytest.mark.parametrize("strategy", [Greedy(0.0, 0), BeamSearch(3, max_ratio=0.1, max_extra=0)])
def test_at_least_the_end_is_allowed(strategy) -> None:
    source, lengths = make_source([4, 1])
    found = strategy.decode(make_model("autoregressive"), source, lengths)
    assert [rows[0] for rows in found.lists()] == [[], []]
    assert found.scores[:, 0].isfinite().all() and found.passes.tolist() == [1, 1]


def test_finished_sentences_are_decoded_no_further() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    rows, step = [], model.step

    def counted(last: Tensor, memory, cache) -> Tensor:
        rows.append(len(last))
        return step(last, memory, cache)

    model.step = counted
    passes = Greedy().decode(model, source, lengths).passes
    assert rows == [int((passes > step).sum()) for step in range(int(passes.max()))]
    rows.clear()
    passes = BeamSearch(beam=3).decode(model, source, lengths).passes
    assert rows == [3 * int((passes > step).sum()) for step in range(int(passes.max()))]


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: BeamSearch(beam=0), "BeamSearch: `beam` must be positive, got 0"),
        (lambda: BeamSearch(n_best=0), "BeamSearch: `n_best` must be positive, got 0"),
        (lambda: BeamSearch(2, n_best=3), r"`n_best` must be at most `beam` \(2\), got 3"),
        (lambda: BeamSearch(max_extra=-1), "BeamSearch: `max_extra` must not be negative"),
        (lambda: Greedy(max_ratio=-0.5), "Greedy: `max_ratio` must not be negative, got -0.5"),
    ],
)
def test_senseless_options_are_refused_by_name(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("strategy", [Greedy, BeamSearch])
def test_limits_from_both_sides_force_a_length(strategy) -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    forced = strategy(max_ratio=0.0, max_extra=8, min_length=7).decode(model, source, lengths)
    assert (forced.lengths == 7).all() and (forced.passes == 8).all()
    assert (forced.scores > -torch.inf).all()
    # Where both cannot be kept, the upper limit holds.
    capped = strategy(max_ratio=0.0, max_extra=4, min_length=7).decode(model, source, lengths)
    assert (capped.lengths == 3).all() and (capped.scores > -torch.inf).all()


@torch.no_grad()
def test_a_minimum_only_forbids_the_end() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    free = Greedy().decode(model, source, lengths)
    found = Greedy(min_length=3).decode(model, source, lengths)
    assert (free.lengths < 3).any()
    for row, length in enumerate(LENGTHS):
        if free.lengths[row, 0] >= 3:
            assert found.lists()[row] == free.lists()[row]
            continue
        prefix: tuple[int, ...] = ()
        for _ in range(3):
            log_probs = next_log_probs(model, source[row, :length], prefix)
            log_probs[EOS] = -torch.inf
            prefix += (max(range(len(log_probs)), key=log_probs.__getitem__),)
        assert found.lists()[row][0][:3] == list(prefix)
