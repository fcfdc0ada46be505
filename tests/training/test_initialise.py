"""What is said of weights taken from another model."""

from __future__ import annotations

from pynar.training.initialise import Initialised


def test_few_weights_are_named_and_many_counted() -> None:
    few = Initialised(["a"], {"b.x": "not there", "b.y": "shape [1], not [2]"}, ["c"])
    assert str(few) == (
        "1 of 3 weights taken; left as they were: b.x (not there), b.y (shape [1], not [2]); "
        "without use here: c"
    )
    kept = {f"prior.{i}": "not there" for i in range(400)} | {"prior.w": "shape [3], not [4]"}
    many = Initialised(["a"], kept, [f"length.{i}" for i in range(13)])
    assert str(many) == (
        "1 of 402 weights taken; left as they were: 400 of prior (not there), 1 of prior (shape); "
        "without use here: 13 of length"
    )
