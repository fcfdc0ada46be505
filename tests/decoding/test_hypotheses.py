from __future__ import annotations

import torch

from pynar.decoding import Hypotheses


def make(tokens: list, lengths: list, first: int) -> Hypotheses:
    scores = -torch.arange(first, first + len(tokens), dtype=torch.float32)[:, None]
    passes = torch.arange(first, first + len(tokens))
    return Hypotheses(torch.tensor(tokens), torch.tensor(lengths), scores, passes)


def test_lists_end_where_the_hypotheses_do() -> None:
    found = make([[[7, 8, 0], [9, 0, 0]], [[0, 0, 0], [5, 6, 7]]], [[2, 1], [0, 3]], 0)
    assert found.lists() == [[[7, 8], [9]], [[], [5, 6, 7]]]
