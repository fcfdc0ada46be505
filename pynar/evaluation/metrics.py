"""Quality of translations: BLEU, chrF and TER by sacreBLEU, repetition, length, significance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest, Result

__all__ = [
    "Comparison",
    "Diversity",
    "Quality",
    "compare",
    "diversity",
    "evaluate",
    "length_ratio",
    "repetition",
]


@dataclass(frozen=True)
class Quality:
    """Scores of one system, in percent; the signatures say how they were computed."""

    bleu: float
    chrf: float
    ter: float
    repetition: float
    length_ratio: float
    signatures: dict[str, str]

    def rows(self) -> list[tuple[str, float, str]]:
        """(name, value, signature) of every score."""
        return [
            ("BLEU", self.bleu, self.signatures["bleu"]),
            ("chrF2++", self.chrf, self.signatures["chrf"]),
            ("TER", self.ter, self.signatures["ter"]),
            ("repeated tokens %", self.repetition, "a token equal to the one before it"),
            ("length ratio", self.length_ratio, "characters, hypothesis / reference"),
        ]


def evaluate(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Quality:
    """Scores detokenised `hypotheses` against one or more reference streams of the same length.

    Raises:
        ValueError: no lines, or streams of different lengths.
    """
    _check(hypotheses, references)
    streams = [list(stream) for stream in references]
    scores, signatures = {}, {}
    for name, metric in _metrics().items():
        scores[name] = metric.corpus_score(list(hypotheses), streams).score
        signatures[name] = str(metric.get_signature())
    return Quality(
        **scores,
        repetition=repetition(hypotheses),
        length_ratio=length_ratio(hypotheses, streams[0]),
        signatures=signatures,
    )


def repetition(lines: Sequence[str]) -> float:
    """Percentage of whitespace tokens that repeat the token before them.

    The typical error of decoders that choose tokens independently.
    """
    repeated = total = 0
    for line in lines:
        tokens = line.split()
        total += len(tokens)
        repeated += sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))
    return 100 * repeated / total if total else 0.0


def length_ratio(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Characters of the hypotheses over characters of the references."""
    characters = sum(map(len, references))
    return sum(map(len, hypotheses)) / characters if characters else float("nan")


@dataclass(frozen=True)
class Comparison:
    """One system's score, its 95 % interval half-width, and p against the baseline (None there)."""

    system: str
    metric: str
    score: float
    interval: float
    p_value: float | None
    signature: str


def compare(
    systems: Sequence[tuple[str, Sequence[str]]],
    references: Sequence[Sequence[str]],
    *,
    samples: int = 1000,
) -> list[Comparison]:
    """Paired bootstrap resampling (Koehn 2004) of every system against the first.

    Raises:
        ValueError: fewer than two systems, or streams of different lengths.
    """
    if len(systems) < 2:
        raise ValueError(f"compare: expected a baseline and other systems, got {len(systems)}")
    for _, hypotheses in systems:
        _check(hypotheses, references)
    streams = [list(stream) for stream in references]
    signatures, scores = PairedTest(
        [(name, list(lines)) for name, lines in systems],
        _metrics(),
        streams,
        test_type="bs",
        n_samples=samples,
    )()
    names = [str(name) for name in scores.pop("System")]
    rows = []
    for metric, values in scores.items():
        results = [value for value in values if isinstance(value, Result)]
        for name, result in zip(names, results, strict=True):
            # None of the baseline.
            p_value = None if result.p_value is None else float(result.p_value)
            # sacrebleu counts resamples that differ by more than the systems do, and for two
            # systems that do not differ finds none.
            if p_value is not None and result.score == results[0].score:
                p_value = 1.0
            # No interval only for the other kind of test, approximate randomisation.
            interval = float(result.ci or 0.0)
            signature = str(signatures[metric])
            rows.append(Comparison(name, metric, float(result.score), interval, p_value, signature))
    return rows


@dataclass(frozen=True)
class Diversity:
    """How much several translations of the same text differ, and how good they are; BLEU, percent.

    100 for `pairwise_bleu` means that all are the same. `reference_bleu` is a mean over them.
    """

    pairwise_bleu: float
    reference_bleu: float
    signature: str


def diversity(samples: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Diversity:
    """Scores n translations of a text, each a sequence of lines (Shen et al. 2019, section 4).

    Pairwise BLEU takes each translation with each other one as its reference. Against several
    references BLEU is the mean of what is found with each of them left out, as for a human's
    translation that is one of them.

    Raises:
        ValueError: fewer than two translations, or streams of different lengths.
    """
    if isinstance(samples, str) or len(samples) < 2:
        raise ValueError(f"diversity: expected at least two translations, got {len(samples)}")
    for stream in samples:
        _check(stream, references)
    bleu = BLEU()

    def mean(pairs: Iterable[tuple[Sequence[str], list[Sequence[str]]]]) -> float:
        found = [
            bleu.corpus_score(list(lines), [list(stream) for stream in against]).score
            for lines, against in pairs
        ]
        return sum(found) / len(found)

    left_out = [list(rest) for rest in combinations(references, max(len(references) - 1, 1))]
    return Diversity(
        mean((one, [other]) for one, other in permutations(samples, 2)),
        mean((one, rest) for one in samples for rest in left_out),
        str(bleu.get_signature()),
    )


def _metrics() -> dict[str, BLEU | CHRF | TER]:
    return {"bleu": BLEU(), "chrf": CHRF(word_order=2), "ter": TER()}


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(hypotheses, str) or any(isinstance(stream, str) for stream in references):
        raise ValueError("evaluate: expected sequences of lines, got one string")
    if not len(hypotheses) or not len(references):
        raise ValueError("evaluate: expected hypotheses and at least one reference, got none")
    for number, stream in enumerate(references, 1):
        if len(stream) != len(hypotheses):
            raise ValueError(
                f"evaluate: reference {number} must have as many lines as the hypotheses "
                f"({len(hypotheses)}), got {len(stream)}"
            )
