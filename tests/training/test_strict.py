from dataclasses import dataclass
from typing import Literal

import pytest

from pynar.strict import from_dict
from pynar.training import TrainingConfig


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    limit: int | None = None
    inner: Inner | None = None
    flag: bool = False


def test_values_are_converted_where_nothing_is_lost():
    got = from_dict(Outer, {"name": "x", "rate": 1, "pair": [0, "1e-4"], "many": [1, 2]})
    assert got == Outer("x", rate=1.0, pair=(0.0, 1e-4), many=(1, 2))
    assert isinstance(got.rate, float)
    assert from_dict(Outer, {"name": "x", "inner": {"size": 3}, "limit": None}).inner == Inner(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rat": 1},
            r"Outer: unknown key `rat` \(did you mean `rate`\?\); the known ones are name,",
        ),
        ({"rate": "fast"}, r"Outer: `rate` must be a number, got 'fast'"),
        ({"rate": True}, r"`rate` must be a number, got True"),
        ({"limit": 1.5}, r"`limit` must be an integer, got 1.5"),
        ({"limit": True}, r"`limit` must be an integer, got True"),
        ({"kind": "c"}, r"`kind` must be one of a, b, got 'c'"),
        ({"pair": [1]}, r"`pair` must have 2 entries, got \[1\]"),
        ({"many": 1}, r"`many` must be a list, got 1"),
        ({"many": [1, "x"]}, r"`many`\[1\] must be an integer, got 'x'"),
        ({"flag": 1}, r"`flag` must be true or false, got 1"),
        ({"name": 1}, r"`name` must be text, got 1"),
        ({"inner": {"sise": 1}}, r"`inner`: unknown key `sise`"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, {"name": "x", **change})


def test_missing_key_and_wrong_container_are_named():
    with pytest.raises(ValueError, match="recipe: missing key `name`"):
        from_dict(Outer, {}, where="recipe")
    with pytest.raises(ValueError, match=r"Outer: expected a mapping, got \['name'\]"):
        from_dict(Outer, ["name"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_update": 5}, "unknown key `max_update` .did you mean `max_updates`"),
        ({"max_updates": 0}, "`max_updates` must be at least 1, got 0"),
        (
            {"max_updates": 1, "parallel": "fsdp", "precision": "fp16"},
            "`precision` must be fp32 or bf16 with `parallel: fsdp`, got 'fp16'",
        ),
        ({"max_updates": 5, "lr": 0}, "`lr` must be positive, got 0"),
        ({"max_updates": 5, "betas": [0.9, 1.0]}, r"`betas` must be in \[0, 1\), got \[0.9, 1.0\]"),
        ({"max_updates": 5, "warmup_updates": 0}, "`warmup_updates` must be at least 1 with"),
        (
            {"max_updates": 5, "schedule": "step"},
            "`schedule` must be one of constant, inverse_sqrt",
        ),
        ({"max_updates": 5, "seed": -1}, "`seed` must not be negative"),
    ],
)
def test_training_configuration_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainingConfig, settings)
