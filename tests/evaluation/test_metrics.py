from __future__ import annotations

import pytest
import sacrebleu

from pynar.evaluation import compare, diversity, evaluate
from pynar.evaluation.metrics import length_ratio, repetition

REFERENCES = ["the cat sat on the mat .", "a dog runs .", "it is late"]
HYPOTHESES = ["the cat sat on on the mat .", "a dog runs .", "it was late"]


def test_scores_are_those_of_sacrebleu() -> None:
    quality = evaluate(HYPOTHESES, [REFERENCES])
    assert quality.bleu == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert quality.chrf == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES], word_order=2).score
    assert quality.ter == sacrebleu.corpus_ter(HYPOTHESES, [REFERENCES]).score
    assert "nrefs:1" in quality.signatures["bleu"]


def test_a_second_reference_counts() -> None:
    both = evaluate(HYPOTHESES, [REFERENCES, HYPOTHESES])
    assert both.bleu == pytest.approx(100)
    assert "nrefs:2" in both.signatures["bleu"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a a b", "c"], 25.0),
        (["a a a"], 200 / 3),
        (["a b a b"], 0.0),
        (["a", "a"], 0.0),
        (["", ""], 0.0),
    ],
)
def test_repetition_counts_tokens_equal_to_the_one_before(lines, expected) -> None:
    assert repetition(lines) == pytest.approx(expected)


def test_length_ratio_is_of_characters() -> None:
    assert length_ratio(["abc", "d"], ["ab", ""]) == 2.0


def test_bootstrap_tells_a_worse_system_and_not_an_equal_one() -> None:
    references = [f"sentence number {i} has some words of its own" for i in range(60)]
    wrong = [line.replace("words", "things") for line in references]
    even = [pair[i % 2] for i, pair in enumerate(zip(references, wrong, strict=True))]
    odd = [pair[1 - i % 2] for i, pair in enumerate(zip(references, wrong, strict=True))]
    systems = [("even", even), ("odd", odd), ("wrong", wrong), ("the same", even)]
    rows = compare(systems, [references], samples=200)
    p = {row.system: row.p_value for row in rows if row.metric == "BLEU"}
    assert {row.p_value for row in rows if row.system == "the same"} == {1.0}
    assert p["even"] is None
    assert p["odd"] > 0.3
    assert p["wrong"] < 0.01


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [[]], "got none"),
        (["a"], [], "got none"),
        (
            ["a", "b"],
            [["a"]],
            r"reference 1 must have as many lines as the hypotheses \(2\), got 1",
        ),
        ("ab", [["a", "b"]], "got one string"),
    ],
)
def test_streams_that_do_not_fit_are_refused(hypotheses, references, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(hypotheses, references)


def test_a_comparison_needs_two_systems() -> None:
    with pytest.raises(ValueError, match="a baseline and other systems, got 1"):
        compare([("a", ["x"])], [["x"]])


def test_diversity_is_the_mean_over_pairs_and_over_references_left_out() -> None:
    third = ["the cat is on the mat .", "dogs run fast here .", "it is very late"]
    samples, references = [REFERENCES, HYPOTHESES, third], [third, REFERENCES]

    def bleu(lines: list[str], *against: list[str]) -> float:
        return sacrebleu.corpus_bleu(lines, list(against)).score

    found = diversity(samples, references)
    pairs = [(a, b) for a in samples for b in samples if a is not b]
    assert found.pairwise_bleu == pytest.approx(sum(bleu(a, b) for a, b in pairs) / 6)
    each = [bleu(one, reference) for one in samples for reference in references]
    assert found.reference_bleu == pytest.approx(sum(each) / 6)
    one = diversity([HYPOTHESES, HYPOTHESES], [REFERENCES])
    assert one.pairwise_bleu == pytest.approx(100)
    assert one.reference_bleu == pytest.approx(bleu(HYPOTHESES, REFERENCES))
    with pytest.raises(ValueError, match="at least two translations, got 1"):
        diversity([HYPOTHESES], [REFERENCES])
    with pytest.raises(ValueError, match="must have as many lines"):
        diversity([HYPOTHESES, third[:2]], [REFERENCES])
