"""Candidates put in order by another model, against its probabilities token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from small_systems import make_flowseq, make_model, next_log_probs

from pynar.data import Tokenizer
from pynar.decoding import (
    AutoregressiveScorer,
    MaskPredict,
    NoisyParallel,
    RescoringTranslator,
    Strategy,
    Translator,
)
from pynar.symbols import EOS

DRAFTS = MaskPredict(2, 4, n_best=4)
NOISY = NoisyParallel(length_candidates=2, samples=3, temperature=1.0, seed=1)


def make(name: str, tokenizer: Tokenizer, **changes) -> Translator:  # type: ignore[no-untyped-def]
    if name == "flowseq":
        size = tokenizer.target_size
        model = make_flowseq(source_vocabulary=size, target_vocabulary=size, **changes)
        return Translator(model, tokenizer)
    return Translator(make_model(name, tokenizer.target_size, **changes), tokenizer)


def by_hand(teacher: Translator, source: str, target: str) -> float:
    """The mean of log p(y_t | y_<t, x), a pass for each token."""
    ids = teacher.tokenizer.encode_target([target])[0] + [EOS]
    x = torch.tensor(teacher.tokenizer.encode_source([source])[0] + [EOS])
    with torch.inference_mode():
        found = [next_log_probs(teacher.model, x, tuple(ids[:t]))[y] for t, y in enumerate(ids)]  # type: ignore[arg-type]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def other_tokenizer(lines: list[str]) -> Tokenizer:
    return Tokenizer.train(lines, [line + "." for line in lines], vocab_size=30, joint=False)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 60, 16384])
def test_scores_are_mean_log_probabilities(
    lines, tokenizer: Tokenizer, max_tokens: int, freeze: bool
) -> None:
    teacher = make("autoregressive", tokenizer)
    candidates = [[lines[3], lines[9]], [lines[5]], [], ["", lines[0], lines[1] + " " + lines[2]]]
    scorer = AutoregressiveScorer(teacher.freeze() if freeze else teacher, max_tokens=max_tokens)
    found = scorer(lines[:4], candidates)
    assert [len(row) for row in found] == [2, 1, 0, 3]
    for line, texts, scores in zip(lines, candidates, found, strict=False):
        assert scores == pytest.approx([by_hand(teacher, line, t) for t in texts], abs=1e-4)


def test_the_length_penalty_is_the_power_of_the_number_of_tokens(lines, tokenizer) -> None:
    teacher = make("autoregressive", tokenizer)
    sums = AutoregressiveScorer(teacher, length_penalty=0.0)(lines[:1], [lines[:3]])[0]
    tokens = [len(ids) + 1 for ids in tokenizer.encode_target(lines[:3])]
    half = AutoregressiveScorer(teacher, length_penalty=0.5)(lines[:1], [lines[:3]])[0]
    assert half == pytest.approx([s / n**0.5 for s, n in zip(sums, tokens, strict=True)])


def test_janus_scores_several_targets_of_a_source_as_each_alone(lines, tokenizer) -> None:
    scorer = AutoregressiveScorer(make("janus", tokenizer))
    candidates = [lines[4:7], lines[7:9], lines[9:12]]
    together = scorer(lines[:3], candidates)
    for line, texts, scores in zip(lines, candidates, together, strict=False):
        assert scores == pytest.approx([scorer([line], [[t]])[0][0] for t in texts], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "strategy", "count"),
    [("cmlm", DRAFTS, 12), ("flowseq", NOISY, 4)],
    ids=["cmlm", "flowseq"],
)
def test_the_best_candidate_is_the_scorers(  # type: ignore[no-untyped-def]
    lines, tokenizer, other_tokenizer, name: str, strategy: Strategy, count: int
) -> None:
    """Also where its tokenizer is another one; of FlowSeq, noisy parallel decoding."""
    student, teacher = make(name, tokenizer), make("autoregressive", other_tokenizer)
    drafts = student.decode(lines[:count], strategy)
    found = RescoringTranslator(student, teacher).decode(lines[:count], strategy)
    assert all(len(draft.alternatives) > 2 for draft in drafts)
    assert any(one.text != other.text for one, other in zip(drafts, found, strict=True))
    for line, draft, result in zip(lines, drafts, found, strict=False):
        wanted = {text: by_hand(teacher, line, text) for text, _ in draft.alternatives}
        assert result.score == pytest.approx(max(wanted.values()), abs=1e-4)
        assert [text for text, _ in result.alternatives] == sorted(
            wanted, key=wanted.__getitem__, reverse=True
        )
        assert result.text == result.alternatives[0][0] and result.passes == draft.passes + 1


def test_any_function_may_score(lines, tokenizer) -> None:
    """Equal scores leave the student's own order; empty lines are not asked about."""
    asked: list[str] = []

    def shortest(sources: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        asked.extend(sources)
        return [[-len(text.split()) for text in texts] for texts in candidates]

    student = make("cmlm", tokenizer)
    results = RescoringTranslator(student, shortest).decode(["", *lines[:5]], DRAFTS)
    assert sorted(asked) == sorted(lines[:5]) and results[0].text == ""
    for draft, result in zip(student.decode(lines[:5], DRAFTS), results[1:], strict=True):
        texts = [text for text, _ in draft.alternatives]
        assert result.text == min(texts, key=lambda text: len(text.split()))


def test_mistakes_are_named(lines, tokenizer) -> None:
    student = make("cmlm", tokenizer)
    with pytest.raises(ValueError, match="must hold a model that goes from left to right, got cml"):
        RescoringTranslator(student, student)
    with pytest.raises(ValueError, match="`scorer` must give a score for each candidate"):
        RescoringTranslator(student, lambda sources, candidates: [[]]).decode(lines[:1], DRAFTS)
    with pytest.raises(ValueError, match="`max_tokens` must be positive, got 0"):
        AutoregressiveScorer(make("autoregressive", tokenizer), max_tokens=0)


def test_what_has_no_positions_scores_nothing(lines, tokenizer) -> None:
    short = make("autoregressive", tokenizer, positions="learned", max_length=12)
    scorer = AutoregressiveScorer(short)
    fits, too_long = "a", " ".join(lines[:6])
    scores = scorer(["a"], [[fits, too_long]])[0]
    assert math.isfinite(scores[0]) and scores[1] == -math.inf
    with pytest.raises(ValueError, match="`sources` must have at most 11 tokens"):
        scorer([too_long], [[fits]])
