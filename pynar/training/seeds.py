"""Stateless randomness."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["PREPARATION", "TRAINING", "VALIDATION", "seed_device", "seeds"]

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


def seed_device(device: torch.device, seed: int) -> None:
    """Starts the random stream of a device, and that of the CPU, anew.

    `torch.manual_seed` does that for all kinds of devices. Of one that has not been used it keeps
    every call, with a traceback, until it is: a millisecond and some kilobytes an update.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
