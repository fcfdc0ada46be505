from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pynar.decoding import Translation
from pynar.evaluation import measure_speed


@dataclass
class Clock:
    """Time that passes only when a fake system translates."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Takes `seconds` a call and `each` a line, and notes its turns."""

    device = torch.device("cpu")

    def __init__(self, name: str, clock: Clock, turns: list, seconds: float, each: float) -> None:
        self.name, self.clock, self.turns = name, clock, turns
        self.seconds, self.each = seconds, each

    def decode(self, lines, strategy, *, max_tokens=None):
        self.turns.append((self.name, len(lines)))
        self.clock.now += self.seconds + self.each * len(lines)
        return [Translation(f"{self.name} {line}", 0.0, 3) for line in lines]


def test_latency_throughput_and_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, turns = Clock(), []
    monkeypatch.setattr("pynar.evaluation.speed.time.perf_counter", clock)
    slow, fast = (Fake(*a) for a in (("s", clock, turns, 0.3, 0.1), ("f", clock, turns, 0.0, 0.1)))
    measured = measure_speed(
        [(slow, None), (fast, None)],
        list("abcdef"),
        latency_sentences=3,
        warmup=1,
        repetitions=2,
    )
    (speed, outputs), (other, _) = measured
    assert (speed.p50_ms, speed.p99_ms) == pytest.approx((400, 400))
    assert other.p50_ms == pytest.approx(100)
    assert speed.sentences_per_second == pytest.approx(6 / 0.9)
    assert other.sentences_per_second == pytest.approx(10)
    assert speed.passes == pytest.approx(3)
    assert [output.text for output in outputs] == [f"s {line}" for line in "abcdef"]
    # One to warm up, then turn by turn.
    assert turns == [("s", 1), ("f", 1)] + [("s", 1), ("f", 1)] * 3 + [("s", 6), ("f", 6)] * 2


def test_percentiles_are_of_single_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pynar.evaluation.speed.time.perf_counter", clock)

    class Growing(Fake):
        def decode(self, lines, strategy, *, max_tokens=None):
            self.seconds = int(lines[0]) / 1000
            return super().decode(lines, strategy)

    system = Growing("g", clock, [], 0.0, 1e-9)
    lines = [str(i) for i in range(100)]
    ((speed, _),) = measure_speed([(system, None)], lines, latency_sentences=100, warmup=0)
    assert (speed.p50_ms, speed.p95_ms, speed.p99_ms) == pytest.approx((50, 95, 99))


def test_no_lines_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        measure_speed([], [])
