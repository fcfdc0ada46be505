from __future__ import annotations

from typing import Any

import pytest
import torch
from small_systems import LENGTHS, assert_same, make_model, make_source
from torch import Tensor

from pynar.decoding import MaskPredict
from pynar.models import CMLM
from pynar.nn.transformer import Memory
from pynar.ops import linear_argmax
from pynar.symbols import BOS, EOS, MASK, PAD, UNK

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cmlm": ("cmlm", {}),
    "cmlm-difference": ("cmlm", {"length_kind": "difference", "norm": "post"}),
    "nat-copy": ("nat", {}),
    "nat-mask": ("nat", {"decoder_input": "mask"}),
    "janus": ("janus", {}),
    "janus-learned": ("janus", {"norm": "post", "positions": "learned", "max_length": 23}),
}


def slow_states(model: CMLM, tokens: list[int], memory: Memory) -> Tensor:
    """Decoder states `[T, C]` of one sentence's tokens.

    JANUS gets them between the symbols that are given to it, and there every position sees all.
    """
    if model.name != "janus":
        return model.decode(torch.tensor([tokens]), torch.tensor([len(tokens)]), memory)[0]
    framed = torch.tensor([[BOS, *tokens, EOS]])
    lengths = torch.tensor([len(tokens) + 2])  # without lengths a decoder is causal
    return model.decoder(model.target_embedding(framed), memory, lengths)[0, 1:-1]


def slow_decode(model: CMLM, source: Tensor, length: int, iterations: int):
    """Mask-Predict (Ghazvininejad et al. 2019, section 4.2) of one sentence and one length.

    Returns the tokens after every pass, before any is masked again, and the last score.
    """
    memory = model.encode(source[None], torch.tensor([len(source)]))
    tokens, scores, states = [MASK] * length, [0.0] * length, []
    for t in range(1, iterations + 1):
        logits = model.logits(slow_states(model, tokens, memory)).double()
        logits[:, [PAD, BOS, EOS, MASK]] = -torch.inf
        log_probs = logits.log_softmax(-1).tolist()
        for i in range(length):
            if tokens[i] == MASK:
                tokens[i] = max(range(len(log_probs[i])), key=log_probs[i].__getitem__)
                scores[i] = log_probs[i][tokens[i]]
        states.append(list(tokens))
        for i in sorted(range(length), key=scores.__getitem__)[
            : length * (iterations - t) // iterations
        ]:
            tokens[i] = MASK
    return states, sum(scores) / length


@pytest.mark.parametrize("kind", ["cmlm", "cmlm-difference", "janus", "janus-learned"])
@pytest.mark.parametrize("block", [1, 2, 3, 100])
@torch.no_grad()
def test_blocks_are_settled_from_left_to_right(kind: str, block: int) -> None:
    name, changes = MODELS[kind]
    model = make_model(name, **changes)
    source, lengths = make_source(LENGTHS)
    found = MaskPredict(block=block, length_candidates=1).decode(model, source, lengths)
    for row, count in enumerate(LENGTHS):
        length = int(found.lengths[row, 0])
        memory = model.encode(source[row : row + 1, :count], lengths[row : row + 1])
        tokens = [MASK] * length
        for start in range(0, length, block):
            logits = model.logits(slow_states(model, tokens, memory))
            logits[:, [PAD, BOS, EOS, MASK]] = -torch.inf
            stop = min(start + block, length)
            tokens[start:stop] = logits.argmax(-1)[start:stop].tolist()
        assert found.lists()[row][0] == tokens
        assert int(found.passes[row]) == -(-length // block)


def slow_lengths(model: CMLM, source: Tensor, count: int) -> list[int]:
    """The most probable lengths that there are, best first."""
    memory = model.encode(source[None], torch.tensor([len(source)]))
    predictor = model.length
    logits = predictor.output(memory.states[0].mean(0)).tolist()
    first = 1 if predictor.kind == "absolute" else len(source) - predictor.classes // 2
    possible = {first + i: x for i, x in enumerate(logits) if first + i >= 1}
    return sorted(possible, key=possible.__getitem__, reverse=True)[:count]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
@torch.no_grad()
def test_decoding_is_the_slow_one(kind: str, iterations: int) -> None:
    name, changes = MODELS[kind]
    model, (source, lengths) = make_model(name, **changes), make_source(LENGTHS)
    strategy = MaskPredict(iterations, length_candidates=9, n_best=9, trace=True)
    found = strategy.decode(model, source, lengths)
    assert len(found.trace) == iterations
    assert (found.passes <= iterations).all() and (found.passes >= 1).all()
    for row, length in enumerate(LENGTHS):
        own = source[row, :length]
        results = [
            slow_decode(model, own, candidate, iterations)
            for candidate in slow_lengths(model, own, 9)
        ]
        results.sort(key=lambda result: result[1], reverse=True)
        number = len(results)
        assert found.lists()[row][:number] == [states[-1] for states, _ in results]
        scores = torch.tensor([score for _, score in results])
        torch.testing.assert_close(found.scores[row, :number], scores, rtol=1e-4, atol=1e-5)
        # A short source has fewer lengths than were asked for.
        assert (found.scores[row, number:] == -torch.inf).all()
        best = results[0][0]
        assert [s[row, : len(best[0])].tolist() for s in found.trace] == best


@pytest.mark.parametrize("prior", [0.5, 3.0])
@torch.no_grad()
def test_the_length_prior_joins_the_score(prior: float) -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    found = MaskPredict(3, length_candidates=4, length_prior=prior, n_best=4).decode(
        model, source, lengths
    )
    for row, length in enumerate(LENGTHS):
        own = source[row, :length]
        memory = model.encode(own[None], torch.tensor([length]))
        log_probs = model.length.output(memory.states[0].mean(0)).log_softmax(-1)
        scores = {}
        for candidate in slow_lengths(model, own, 4):
            states, mean = slow_decode(model, own, candidate, 3)
            scores[tuple(states[-1])] = mean + prior * float(log_probs[candidate - 1]) / candidate
        best = sorted(scores.values(), reverse=True)
        torch.testing.assert_close(found.scores[row].tolist(), best, rtol=1e-4, atol=1e-5)
        assert tuple(found.lists()[row][0]) == max(scores, key=scores.__getitem__)


def test_passes_do_change_tokens_and_some_sources_have_few_lengths() -> None:
    """The cases that the test above rests on do occur."""
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    one, four = (MaskPredict(n).decode(model, source, lengths).lists() for n in (1, 4))
    assert one != four
    model = make_model("cmlm", length_kind="difference", norm="post")
    found = MaskPredict(1, length_candidates=9, n_best=9).decode(model, source, lengths)
    assert (found.scores == -torch.inf).any()


class Watched:
    """Records what a model's decoder is given."""

    def __init__(self, model: CMLM) -> None:
        self.model, self.inputs, self.decode = model, [], model.decode
        model.decode = self

    def __call__(self, tokens: Tensor, lengths: Tensor, memory, wanted=None) -> Tensor:
        self.inputs.append((tokens.clone(), lengths.clone()))
        return self.decode(tokens, lengths, memory, wanted)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_n_iterations_are_n_passes_over_fewer_and_fewer_masks(iterations: int) -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    watched = Watched(model)
    given = torch.tensor([[5, 1], [7, 2], [3, 12], [1, 1], [6, 4], [10, 11]])
    found = MaskPredict(iterations).decode(model, source, lengths, target_lengths=given)
    assert len(watched.inputs) == iterations
    before = {}
    for done, (tokens, counts) in enumerate(watched.inputs):
        # floor(n (N - t) / N) after pass t; sentences without any have left, with all candidates
        left = given * (iterations - done) // iterations
        open_ = left.any(1)
        assert counts.tolist() == given[open_].flatten().tolist()
        masked = tokens == MASK
        assert masked.sum(1).tolist() == left[open_].flatten().tolist()
        live = torch.arange(tokens.shape[1]) < counts[:, None]
        assert ((tokens == PAD) == ~live).all()
        rows = torch.arange(12).view(6, 2)[open_].flatten().tolist()
        for place, row in enumerate(rows):
            if row in before:
                kept = ~masked[place] & (before[row] != MASK)
                assert torch.equal(tokens[place][kept], before[row][kept])
            before[row] = tokens[place]
    passes = [(given * (iterations - t) // iterations).any(1) for t in range(iterations)]
    assert found.passes.tolist() == torch.stack(passes).sum(0).tolist()


def test_the_encoder_runs_once() -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    calls, encode = [], model.encode
    model.encode = lambda *arguments: (calls.append(1), encode(*arguments))[1]
    MaskPredict(4, length_candidates=3).decode(model, source, lengths)
    assert len(calls) == 1


@pytest.mark.parametrize("favoured", [PAD, BOS, EOS, MASK, (PAD, BOS, EOS, MASK)])
@pytest.mark.parametrize("kind", ["cmlm", "nat-copy", "janus"])
def test_no_special_symbol_is_produced_however_probable(
    kind: str, favoured, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = MODELS[kind]
    model, (source, lengths) = make_model(name, **changes), make_source(LENGTHS)
    plain = MaskPredict(3, trace=True).decode(model, source, lengths)

    def tempted(states: Tensor, weight: Tensor, bias: Tensor, **options) -> tuple[Tensor, ...]:
        bias = bias.clone()
        bias[torch.tensor(favoured)] += 1e4
        return linear_argmax(states, weight, bias, **options)

    monkeypatch.setattr("pynar.models.base.linear_argmax", tempted)
    found = MaskPredict(3, trace=True).decode(model, source, lengths)
    # They have no share in the probabilities either.
    assert_same(found, plain)
    for state, tokens in [(s, s) for s in found.trace] + [(found.tokens[:, 0],) * 2]:
        words = state[tokens != PAD]
        assert ((words == UNK) | (words > MASK)).all()
    assert (found.tokens[:, 0] != PAD).sum(1).tolist() == found.lengths[:, 0].tolist()


def test_logits_that_are_not_numbers_end_as_unknown_words() -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    model.exclusion.fill_(torch.nan)
    for rows in MaskPredict(3).decode(model, source, lengths).lists():
        assert set(rows[0]) == {UNK}


def test_tracing_changes_nothing_else() -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    plain = MaskPredict(4, 3, 2).decode(model, source, lengths)
    traced = MaskPredict(4, 3, 2, trace=True).decode(model, source, lengths)
    assert_same(traced, plain)
    assert plain.trace == [] and len(traced.trace) == 4
    assert torch.equal(traced.trace[-1], traced.tokens[:, 0])
    assert not any((state == MASK).any() for state in traced.trace)


def test_given_lengths_are_kept() -> None:
    model, (source, lengths) = make_model("cmlm"), make_source([4, 2])
    given = torch.tensor([[3, 5, 5], [1, 9, 2]])
    found = MaskPredict(2, n_best=3).decode(model, source, lengths, target_lengths=given)
    assert found.lengths.sort(1).values.tolist() == given.sort(1).values.tolist()
    one = MaskPredict(2).decode(model, source, lengths, target_lengths=given[:, :1])
    assert one.lengths.tolist() == [[3], [1]]


def test_one_candidate_is_the_most_probable_length() -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    found = MaskPredict(2, length_candidates=1).decode(model, source, lengths)
    memory = model.encode(source, lengths)
    assert torch.equal(found.lengths[:, 0], model.length(memory.states, lengths).argmax(1) + 1)


def test_more_candidates_never_lower_the_score() -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    scores = [
        MaskPredict(3, length_candidates=n).decode(model, source, lengths).scores
        for n in (1, 2, 5, 12, 40)
    ]
    for fewer, more in zip(scores, scores[1:], strict=False):
        assert (more >= fewer - 1e-5).all()
    assert (scores[3] > scores[0] + 1e-3).any()


def test_learned_positions_bound_the_lengths_instead_of_failing() -> None:
    model = make_model("cmlm", positions="learned", max_length=20, length_classes=40)
    source, lengths = make_source(LENGTHS)
    found = MaskPredict(2, length_candidates=40, n_best=40, max_extra=20).decode(
        model, source, lengths
    )
    real = found.scores > -torch.inf
    for row in range(len(LENGTHS)):
        assert sorted(found.lengths[row][real[row]].tolist()) == list(range(1, 21))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("ratio,extra", [(0.0, 0), (0.0, 3), (0.5, 1), (1.0, 0), (2.0, 10)])
def test_no_hypothesis_is_longer_than_its_own_source_allows(
    kind: str, ratio: float, extra: int
) -> None:
    name, changes = MODELS[kind]
    model, (source, lengths) = make_model(name, **changes), make_source([*LENGTHS, 12])
    found, free = (
        MaskPredict(2, 12, n_best=12, max_ratio=r, max_extra=x).decode(model, source, lengths)
        for r, x in ((ratio, extra), (9.0, 99))
    )
    possible = found.scores > -torch.inf
    for row, length in enumerate(lengths.tolist()):
        limit = max(int(ratio * length) + extra, 1)
        there = sorted(found.lengths[row][possible[row]].tolist())
        known = sorted(free.lengths[row][free.scores[row] > -torch.inf].tolist())
        # The limit itself, where the model knows only greater lengths.
        assert there == ([x for x in known if x <= limit] or [limit])
        assert (found.lengths[row] <= limit).all()


def test_vanilla_nat_decodes_in_one_pass_by_default() -> None:
    from pynar.decoding import strategy

    model, (source, lengths) = make_model("nat"), make_source(LENGTHS)
    watched = Watched(model)
    found = strategy(model).decode(model, source, lengths)
    assert len(watched.inputs) == 1 and (found.passes == 1).all()


@pytest.mark.parametrize(
    "options,words",
    [
        ({"iterations": 0}, "MaskPredict: `iterations` must be positive, got 0"),
        ({"length_prior": -1.0}, "MaskPredict: `length_prior` must not be negative, got -1.0"),
        ({"max_ratio": -0.5}, "MaskPredict: `max_ratio` must not be negative, got -0.5"),
        ({"max_extra": -1}, "MaskPredict: `max_extra` must not be negative, got -1"),
        ({"length_candidates": -1}, "MaskPredict: `length_candidates` must be positive, got -1"),
        ({"n_best": 0}, "MaskPredict: `n_best` must be positive, got 0"),
        ({"n_best": 6}, r"`n_best` must be at most `length_candidates` \(5\), got 6"),
    ],
)
def test_senseless_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MaskPredict(**options)


@pytest.mark.parametrize(
    "given,words",
    [
        (torch.tensor([3, 5]), r"`target_lengths` must have shape \[2, n\], got \[2\]"),
        (torch.tensor([[3, 5]]), r"`target_lengths` must have shape \[2, n\], got \[1, 2\]"),
        (torch.tensor([[3], [0]]), "`target_lengths` must be positive"),
    ],
)
def test_senseless_lengths_are_refused(given: Tensor, words: str) -> None:
    model, (source, lengths) = make_model("cmlm"), make_source([4, 2])
    with pytest.raises(ValueError, match=words):
        MaskPredict(1).decode(model, source, lengths, target_lengths=given)
