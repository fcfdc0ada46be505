"""Quality and speed of translation systems."""

from pynar.evaluation.metrics import (
    Comparison,
    Diversity,
    Quality,
    compare,
    diversity,
    evaluate,
)
from pynar.evaluation.speed import Speed, machine, measure_speed

__all__ = [
    "Comparison",
    "Diversity",
    "Quality",
    "Speed",
    "compare",
    "diversity",
    "evaluate",
    "machine",
    "measure_speed",
]
