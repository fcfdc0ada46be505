"""Bootstrap percentile intervals of medians over repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

__all__ = ["Interval", "median_interval", "ratio_interval"]

_SAMPLES = 10_000
_TAILS = (2.5, 97.5)


class Interval(TypedDict):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median of `values`; its interval from resampling them."""
    data = np.asarray(values, dtype=np.float64)
    resampled = np.median(data[_draws(len(data))], axis=1)
    return _interval(np.median(data), resampled)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The ratio of the medians of two series measured in turns.

    Repetitions are resampled in pairs, so that a drift of the machine which both series followed
    does not widen the interval.
    """
    above, below = (np.asarray(x, dtype=np.float64) for x in (numerators, denominators))
    if len(above) != len(below):
        raise ValueError(
            f"ratio_interval: the series must be pairs, got {len(above)} and {len(below)} values"
        )
    draws = _draws(len(above))
    resampled = np.median(above[draws], axis=1) / np.median(below[draws], axis=1)
    return _interval(np.median(above) / np.median(below), resampled)


def _draws(count: int) -> np.ndarray:
    if not count:
        raise ValueError("a median needs at least one value, got none")
    return np.random.default_rng(0).integers(0, count, (_SAMPLES, count))


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, _TAILS)
    return {"value": float(value), "low": float(low), "high": float(high)}
