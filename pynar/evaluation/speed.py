"""How fast a model translates: latency one sentence at a time, throughput in batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pynar.decoding import LineTranslator, Strategy, Translation
from pynar.evaluation.environment import processor

__all__ = ["Speed", "machine", "measure_speed", "percentile"]


@dataclass(frozen=True)
class Speed:
    """Text in to text out: sub-words, length prediction, all passes and candidates counted."""

    p50_ms: float  # one sentence at a time
    p95_ms: float
    p99_ms: float
    sentences_per_second: float  # in batches
    passes: float  # decoder passes, mean over sentences


def measure_speed(
    systems: Sequence[tuple[LineTranslator, Strategy]],
    lines: Sequence[str],
    *,
    latency_sentences: int = 100,
    warmup: int = 10,
    repetitions: int = 3,
    max_tokens: int = 4096,
) -> list[tuple[Speed, list[Translation]]]:
    """Measures systems side by side on the same lines; returns what they wrote, too.

    Systems take turns sentence by sentence and repetition by repetition, so that a machine
    which drifts drifts for all of them. Throughput is the median over `repetitions`.
    """
    if not lines:
        raise ValueError("measure_speed: `lines` must not be empty")
    few = list(lines[:latency_sentences])
    for translator, strategy in systems:
        for line in few[:warmup]:
            translator.decode([line], strategy)
    latencies: list[list[float]] = [[] for _ in systems]
    passes = [0.0] * len(systems)
    for line in few:
        for index, (translator, strategy) in enumerate(systems):
            seconds, results = _timed(translator, strategy, [line], max_tokens)
            latencies[index].append(1e3 * seconds)
            passes[index] += results[0].passes / len(few)
    rates: list[list[float]] = [[] for _ in systems]
    outputs: list[list[Translation]] = [[] for _ in systems]
    for _ in range(repetitions):
        for index, (translator, strategy) in enumerate(systems):
            seconds, outputs[index] = _timed(translator, strategy, lines, max_tokens)
            rates[index].append(len(lines) / seconds)
    speeds = [
        Speed(
            p50_ms=percentile(times, 0.50),
            p95_ms=percentile(times, 0.95),
            p99_ms=percentile(times, 0.99),
            sentences_per_second=statistics.median(rate),
            passes=count,
        )
        for times, rate, count in zip(latencies, rates, passes, strict=True)
    ]
    return list(zip(speeds, outputs, strict=True))


def _timed(
    translator: LineTranslator, strategy: Strategy, lines: Sequence[str], max_tokens: int
) -> tuple[float, list[Translation]]:
    _wait(translator.device)
    start = time.perf_counter()
    results = translator.decode(lines, strategy, max_tokens=max_tokens)
    _wait(translator.device)
    return time.perf_counter() - start, results


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(times: Sequence[float], share: float) -> float:
    """The time that this share of `times` does not exceed."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


def machine(device: torch.device | str = "cpu") -> str:
    """A line that says where a measurement was made."""
    where = (
        torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    )
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
