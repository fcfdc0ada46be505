"""Stateless randomness."""

from __future__ import annotations

import numpy as np

__all__ = ["PREPARATION", "TRAINING", "VALIDATION", "seeds"]

TRAINING, VALIDATION, PREPARATION = range(3)


def seeds(*key: int) -> tuple[int, int]:
    """Two independent 63-bit seeds for a key such as (run seed, TRAINING, update, rank, batch).

    Every batch starts its random streams anew from its place in the run. A resumed run therefore
    draws the very numbers of an uninterrupted one with no generator state in the checkpoint, and
    how many numbers anything else consumed (validation, sampling, another rank) cannot matter.
    One seed is for the noise of the model's input, one for dropout: streams from one seed would
    be the same stream, and which tokens are masked would predict which activations are dropped.
    """
    first, second = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return int(first >> 1), int(second >> 1)
