"""Quality and speed of translation systems."""

from pynar.evaluation.metrics import Comparison, Quality, compare, evaluate
from pynar.evaluation.speed import Speed, machine, measure_speed

__all__ = ["Comparison", "Quality", "Speed", "compare", "evaluate", "machine", "measure_speed"]
