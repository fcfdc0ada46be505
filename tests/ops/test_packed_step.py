from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pynar.ops import packed_layers, packed_step
from pynar.ops.packed_layers import _STEP, layer_tensors
from pynar.testing import tolerance
from tests.ops.test_packed_layers import DIM, HEADS, SOURCES, every_layer, make_layer, spread

FORMATS = [torch.float32, torch.bfloat16, torch.int8]
LENGTH, CAPACITY, LAYERS = 5, 8, 2
SENTENCES = len(SOURCES)
PLACES = torch.tensor([2, 0, 5, 3])  # of six


def make_caches(layers: int = LAYERS) -> list[Tensor]:
    return [torch.full((6, CAPACITY, 2 * HEADS, DIM // HEADS), torch.nan) for _ in range(layers)]


def make_memory(crosses: bool) -> Any:
    if not crosses:
        return None
    pairs = torch.randn(2, LAYERS, sum(SOURCES), HEADS, DIM // HEADS)
    return list(pairs[0]), list(pairs[1]), spread([1] * SENTENCES, SOURCES)


def sees(position: int) -> Tensor:
    start = PLACES * CAPACITY
    return torch.stack([start, start + position + 1], 1).int()[:, None]


@pytest.fixture(params=["operator", "reference"])
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(_STEP, "call", _STEP.reference)
    return request.param


@every_layer
@pytest.mark.parametrize("dtype", FORMATS)
def test_steps_are_the_rows_of_a_causal_pass(
    dtype: torch.dtype, crosses: bool, norm_first: bool, of: str
) -> None:
    layers = [make_layer(dtype, crosses=crosses, norm_first=norm_first) for _ in range(LAYERS)]
    memory, caches = make_memory(crosses), make_caches()
    x = torch.randn(LENGTH, SENTENCES, DIM)
    got = [
        packed_step(x[t], layers, sees(t), caches, PLACES * CAPACITY + t, memory=memory)
        for t in range(LENGTH)
    ]
    rows = torch.arange(SENTENCES * LENGTH)
    causal = torch.stack([rows // LENGTH * LENGTH, rows + 1], 1).int()[:, None]
    whole = None
    if memory is not None:
        whole = (*memory[:2], spread([LENGTH] * SENTENCES, SOURCES))
    want = packed_layers(x.transpose(0, 1).flatten(0, 1), layers, causal, memory=whole)
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.int8: 2e-1}[dtype]
    torch.testing.assert_close(torch.stack(got, 1).flatten(0, 1), want, rtol=10 * limit, atol=limit)
    # What was not to be written is as it was.
    for cache in caches:
        untouched = torch.ones(6, CAPACITY, dtype=torch.bool)
        untouched[PLACES, :LENGTH] = False
        assert cache[untouched].isnan().all()
        assert not cache[~untouched].isnan().any()


def test_queries_read_what_contents_of_the_same_step_write(of: str) -> None:
    layers = [make_layer(torch.float32, crosses=True, norm_first=True) for _ in range(LAYERS)]
    memory = make_memory(True)
    content, query = torch.randn(2, SENTENCES, DIM)
    slots = PLACES * CAPACITY
    twice = (*memory[:2], memory[2].repeat(2, 1, 1))
    both, chosen = sees(0).repeat(2, 1, 1), torch.arange(SENTENCES, 2 * SENTENCES)
    got = packed_step(
        torch.cat([content, query]), layers, both, make_caches(), slots, memory=twice, chosen=chosen
    )
    # A query sees one key, that of its content, whose states go through the layers alone.
    rows = torch.arange(SENTENCES, dtype=torch.int32)
    own = torch.stack([rows, rows + 1], 1)[:, None].repeat(2, 1, 1)
    want = packed_layers(
        torch.cat([content, query]), layers, own, memory=twice, chosen=chosen, content=SENTENCES
    )
    torch.testing.assert_close(got, want, **tolerance("cpu", torch.float32))  # type: ignore[arg-type]


@pytest.mark.usefixtures("extension")
def test_rows_do_not_depend_on_batch_mates_or_threads() -> None:
    layers = [make_layer(torch.int8, crosses=False, norm_first=True) for _ in range(LAYERS)]
    x = torch.randn(3, 12, DIM)
    caches = [torch.zeros(12, 4, 2 * HEADS, DIM // HEADS) for _ in range(LAYERS)]

    def run(rows: slice) -> Tensor:
        own = [cache.clone() for cache in caches]
        start = torch.arange(12)[rows] * 4
        for t in range(3):
            seen = torch.stack([start, start + t + 1], 1).int()[:, None]
            y = packed_step(x[t, rows], layers, seen, own, start + t)
        return y

    together = run(slice(None))
    assert torch.equal(run(slice(4, 5)), together[4:5])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(slice(None)), together)
    finally:
        torch.set_num_threads(threads)


def raw_arguments(dtype: torch.dtype = torch.int8) -> list[Any]:
    layer = make_layer(dtype, crosses=True, norm_first=False)
    keys, values, reads = make_memory(True)
    tensors = layer_tensors([layer] * LAYERS)
    x, caches = torch.randn(SENTENCES, DIM), make_caches()
    rest = None, caches, PLACES * CAPACITY, LAYERS, *layer.options()
    return [x, *tensors, sees(0), keys, values, reads, *rest]


def test_registered_rightly() -> None:
    arguments = raw_arguments()
    for cache in arguments[11]:
        cache.zero_()
    torch.library.opcheck(torch.ops.pynar.packed_step.default, tuple(arguments))


def test_compiles_into_one_graph() -> None:
    layers = [make_layer(torch.float32, crosses=False, norm_first=True) for _ in range(LAYERS)]
    x = torch.randn(SENTENCES, DIM)

    def step(x: Tensor, caches: list[Tensor]) -> Tensor:
        return packed_step(2 * x, layers, sees(0), caches, PLACES * CAPACITY)

    once, again = make_caches(), make_caches()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, once), step(x, again), rtol=0, atol=0)
    torch.testing.assert_close(once, again, rtol=0, atol=0, equal_nan=True)


def test_empty(of: str) -> None:
    layers = [make_layer(torch.int8, crosses=False, norm_first=True)]
    nothing = torch.zeros(0, 1, 2, dtype=torch.int32)
    slots = torch.zeros(0, dtype=torch.long)
    y = packed_step(torch.empty(0, DIM), layers, nothing, make_caches(1), slots)
    assert y.shape == (0, DIM)


SHAPE = "[6, 8, 6, 8] (places, capacity, 2 H, D)"
REJECTED: list[tuple[int, Any, str]] = [
    (11, make_caches(1), "`caches` must have 2 tensors (one for each layer, or none), got 1"),
    (11, [*make_caches(1), torch.ones(6, 8, 6, 7)], f"`caches` must have shape {SHAPE}, got [6"),
    (11, [c.double() for c in make_caches()], "`caches` must have dtype float32, got float64"),
    (
        11,
        [torch.ones(6, 6, 8, 8).transpose(1, 2)] * 2,
        "`caches` must be contiguous, got a strided view",
    ),
    (12, torch.tensor([0, 48, 1, 2]), "`slots` must lie in [0, 48), got 48"),
    (12, torch.tensor([0, -1, 1, 2]), "`slots` must lie in [0, 48), got -1"),
    (12, torch.tensor([0, 1]).int(), "`slots` must have dtype int64, got int32"),
]


@pytest.mark.parametrize(("place", "value", "message"), REJECTED)
def test_a_wrong_call_says_what_is_wanted(place: int, value: Any, message: str, of: str) -> None:
    arguments = raw_arguments()
    arguments[place] = value
    with pytest.raises(ValueError) as error:
        _STEP.call(*arguments)
    assert str(error.value).startswith(f"packed_step: {message}")


def test_more_slots_than_rows_are_rejected() -> None:
    layers = [make_layer(torch.int8, crosses=False, norm_first=True)] * LAYERS
    with pytest.raises(ValueError, match="packed_step: `slots` must have at most 4 elements, got"):
        packed_step(torch.ones(4, DIM), layers, sees(0), make_caches(), torch.arange(5))
