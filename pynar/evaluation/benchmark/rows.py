"""What is said of one system in one cell, from the answers of its worker."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pynar.evaluation.benchmark.intervals import Interval, median_interval, ratio_interval
from pynar.evaluation.benchmark.systems import System
from pynar.evaluation.benchmark.worker import sample
from pynar.evaluation.metrics import evaluate
from pynar.evaluation.speed import percentile

__all__ = ["Row", "Scores", "buckets", "compare_rows"]

_SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
# Words of the source, both ends included.
BUCKETS = ((1, 10), (11, 20), (21, 30), (31, 60), (61, 100), (101, None))


@dataclass(kw_only=True)
class Row:
    """One system in one cell; every figure is the median over repetitions, with its interval."""

    system: str
    model: str
    random: bool
    family: str
    strategy: str
    rescorer: str | None
    engine: str
    threads: int
    kind: str  # "text": raw text to raw text; "model": ids to ids; "length": of random ids
    batch: int | str  # as asked for
    batch_sentences: int | None = None  # what "max" came to
    batch_limit: str | None = None  # and what forbids more
    length: int | None = None
    sentences: int = 0  # in a repetition
    repetitions: int = 0
    ms: dict[str, Interval | None] = field(default_factory=dict)  # of a batch
    sentences_per_second: Interval | None = None
    tokens_per_second: Interval | None = None
    passes: float | None = None  # a sentence
    layer_evaluations: float | None = None  # a sentence
    parameters: int | None = None
    peak_bytes: int | None = None
    base_bytes: int | None = None  # of which before the model was loaded
    baseline: bool = False
    speedup: Interval | None = None  # against the baseline of the cell
    fastest_engine: bool = False  # of those that ran this model with this strategy
    quality: dict[str, Any] | None = None
    buckets: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    # What rows are compared by, of every repetition: the median latency at batch 1, elsewhere the
    # milliseconds a sentence.
    compared_ms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, system: System, threads: int, cell: dict[str, Any], batch: int | str) -> Row:
        return cls(
            system=system.name,
            model=system.model,
            random=system.random,
            family=system.family.name,
            strategy=type(system.decoding).__name__,
            rescorer=system.rescorer,
            engine=system.engine_name,
            threads=threads,
            kind=cell["kind"],
            batch=batch,
            length=cell.get("length"),
        )

    def fill(self, system: System, facts: dict[str, Any], answers: list[dict[str, Any]]) -> None:
        """Takes in the answers of all repetitions."""
        first = answers[0]
        self.sentences, self.repetitions = first["sentences"], len(answers)
        totals = [sum(answer["seconds"]) for answer in answers]
        if self.batch == 1:
            seconds = [percentile(answer["seconds"], 0.5) for answer in answers]
        else:
            seconds = [total / self.sentences for total in totals]
        self.compared_ms = [1e3 * value for value in seconds]
        self.sentences_per_second = median_interval([self.sentences / total for total in totals])
        self.tokens_per_second = median_interval(
            [answer["tokens"] / total for answer, total in zip(answers, totals, strict=True)]
        )
        for name, share in _SHARES.items():
            self.ms[name] = None
            # A percentile that no batch lies above is the maximum, and is not called otherwise.
            if name == "p50" or first["batches"] * (1 - share) >= 1 - 1e-9:
                times = [1e3 * percentile(answer["seconds"], share) for answer in answers]
                self.ms[name] = median_interval(times)
        self.passes = first["passes"]
        if self.passes is not None:
            self.layer_evaluations = system.layer_evaluations(self.passes)
        self.parameters, self.base_bytes = facts["parameters"], facts["base_bytes"]
        peaks = [answer["peak_bytes"] for answer in answers]
        self.peak_bytes = None if None in peaks else max(peaks)

    def json(self) -> dict[str, Any]:
        return asdict(self)


def compare_rows(rows: Sequence[Row]) -> None:
    """Marks the baseline and the fastest engines of the rows of one cell, and sets speed-ups.

    The baseline is greedy search of the first autoregressive model, by the engine that is fastest
    in this cell; models with random weights have one of their own.
    """
    done = [row for row in rows if row.failure is None]
    for random in (False, True):
        group = [row for row in done if row.random == random]
        greedy = [row for row in group if row.strategy == "Greedy" and row.rescorer is None]
        if not greedy:
            continue
        baseline = _fastest([row for row in greedy if row.system == greedy[0].system])
        baseline.baseline = True
        for row in group:
            row.speedup = ratio_interval(baseline.compared_ms, row.compared_ms)
    for name in {row.system for row in done}:
        engines = [row for row in done if row.system == name]
        if len(engines) > 1:
            _fastest(engines).fastest_engine = True


def _fastest(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: statistics.median(row.compared_ms))


class Scores:
    """Quality of the lines that were written while timed."""

    def __init__(self, references: Sequence[Sequence[str]], sources: Sequence[str]) -> None:
        self.references = references
        self.words = [len(line.split()) for line in sources]
        # Systems that differ in speed alone write the same lines, many times over.
        self._known: dict[tuple[tuple[str, ...], tuple[int, ...]], dict[str, Any]] = {}
        self._texts: dict[int, list[str]] = {}
        self._rows: list[Row] = []

    def add(self, row: Row, texts: list[str] | None) -> None:
        self._rows.append(row)
        if texts is not None:
            self._texts[id(row)] = texts

    def score(self) -> None:
        """Sets every row's quality.

        From its own lines if they are the whole text; else, as at batch 1 and where ids were
        timed, from those which the same system wrote of the whole text at the nearest setting.
        """
        total = len(self.words)
        whole = [row for row in self._rows if len(self._texts.get(id(row), ())) == total]
        for row in self._rows:
            if row.random or row.failure is not None:
                continue
            same = [w for w in whole if (w.system, w.engine) == (row.system, row.engine)]
            same.sort(key=lambda w: (w is not row, w.threads != row.threads, w.batch != row.batch))
            origin = same[0] if same else row
            texts = self._texts.get(id(origin))
            if texts is None:
                continue
            places = sample(total, len(texts))
            row.quality = {
                **self._score(texts, places),
                "of": {"kind": origin.kind, "threads": origin.threads, "batch": origin.batch},
            }
            if same and row.buckets:
                for bucket in row.buckets:
                    low, high = bucket["words"]
                    inside = [i for i in places if low <= self.words[i] <= (high or math.inf)]
                    bucket["quality"] = self._score([texts[i] for i in inside], inside)

    def _score(self, texts: list[str], places: list[int]) -> dict[str, Any]:
        key = (tuple(texts), tuple(places))
        if key not in self._known:
            references = [[stream[i] for i in places] for stream in self.references]
            self._known[key] = asdict(evaluate(texts, references))
        return {**self._known[key], "sentences": len(texts)}


def buckets(words: Sequence[int], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Latencies at batch 1 by the length of the source, for the lines `words` counts."""
    result = []
    for low, high in BUCKETS:
        inside = [i for i, count in enumerate(words) if low <= count <= (high or math.inf)]
        if inside:
            times = [
                1e3 * percentile([answer["seconds"][i] for i in inside], 0.5) for answer in answers
            ]
            p50 = median_interval(times)
            result.append({"words": [low, high], "sentences": len(inside), "p50_ms": p50})
    return result
