"""The decoding benchmark: systems in processes of their own, measured in turns."""

from pynar.evaluation.benchmark.run import Plan, benchmark
from pynar.evaluation.benchmark.systems import System, expand

__all__ = ["Plan", "System", "benchmark", "expand"]
