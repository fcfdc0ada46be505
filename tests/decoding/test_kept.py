from __future__ import annotations

import pytest
import torch
from small_systems import make_model, make_source

from pynar.decoding import MaskPredict
from pynar.nn import live_rows
from pynar.nn.kept import kept


def test_what_was_made_in_decoding_serves_training() -> None:
    made = []

    @kept
    def make(count: int) -> torch.Tensor:
        made.append(count)
        return torch.ones(count)

    with torch.inference_mode():
        first = make(3)
    assert make(3) is first and made == [3]
    weight = torch.ones(3, requires_grad=True)
    (weight * first).sum().backward()
    assert torch.equal(weight.grad, first)


@pytest.mark.parametrize("name", ["nat", "cmlm"])
def test_a_batch_that_came_before_gives_the_same_again(name: str) -> None:
    model = make_model(name).freeze()
    strategy = MaskPredict(iterations=3, length_candidates=2)
    first, other = make_source([4, 9, 1]), make_source([2, 9, 7])
    before = strategy.decode(model, *first)
    strategy.decode(model, *other)
    again = strategy.decode(model, *first)
    live_rows._kept_rows.cache_clear()  # type: ignore[attr-defined]
    anew = strategy.decode(model, *first)
    for found in (again, anew):
        assert torch.equal(found.tokens, before.tokens)
        assert torch.equal(found.scores, before.scores)


def test_the_default_device_does_not_matter_to_later_calls() -> None:
    live_rows._kept_rows.cache_clear()  # type: ignore[attr-defined]
    lengths = torch.tensor([3, 1])
    with torch.device("meta"):
        rows = live_rows.Rows.of(lengths, 4)
    assert rows.bounds.is_cpu and rows.lengths.is_cpu
    with torch.inference_mode():
        assert not rows.own.is_inference()
    assert rows.places is not None and rows.places.tolist() == [0, 1, 2, 4]
