from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from pynar.data import Tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """Lines of one to nine made-up words, all different, of very different length."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 4))) for _ in range(30)]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(60)]
    return list(dict.fromkeys(lines))


@pytest.fixture(scope="session")
def tokenizer(lines: list[str]) -> Tokenizer:
    punctuated = [line.replace(" ", ", ", 1) + "." for line in lines]
    return Tokenizer.train(lines, punctuated, vocab_size=40)
