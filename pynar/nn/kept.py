"""What follows from the lengths of a small batch, made once for all batches like it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["SMALL", "kept"]

# Padded positions. Larger batches hardly ever come twice, and have more to do anyway.
SMALL = 1024
_MOST = 1024  # results

F = TypeVar("F", bound=Callable[..., object])


def kept(make: F) -> F:
    """Keeps the last results of `make`, whose arguments are numbers, tuples of them, or layouts.

    Between the weights of a model, the code of every operator comes from memory again: at batch 1
    each of them costs some 20 microseconds. Nobody may write into what is kept.
    """
    # It may be used in training after it was made in decoding.
    return functools.lru_cache(_MOST)(torch.inference_mode(False)(make))  # type: ignore[return-value]
