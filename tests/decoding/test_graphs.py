"""CUDA graphs of decoding; without a GPU, with a stand-in for the capture."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_systems import LENGTHS, SYSTEMS, assert_same, make_flowseq, make_model, make_source, take
from torch import Tensor

from pynar.decoding import Hypotheses, LatentArgmax, MaskPredict
from pynar.decoding.graphs import Graphs, graphs_of, row_bucket, width_bucket
from pynar.symbols import EOS, PAD
from tests.watch import Watch

LATENT: dict[str, tuple[str, dict[str, Any], LatentArgmax]] = {
    "flowseq": ("flowseq", {}, LatentArgmax()),
    "flowseq-sixteen": (
        "flowseq",
        {"flow_steps": [1] * 5, "length_kind": "logistic", "dim": 8},
        LatentArgmax(),
    ),
    "flowseq-learned": (
        "flowseq",
        {"latent_attention": False, "positions": "learned", "position_attention": False},
        LatentArgmax(),
    ),
    "flowseq-rnn": (
        "flowseq",
        {"network": "rnn", "flow_network": "rnn", "positions": "none", "flow_steps": [1]},
        LatentArgmax(),
    ),
}
PARALLEL: dict[str, tuple[str, dict[str, Any], Any]] = {
    **{name: row for name, row in SYSTEMS.items() if isinstance(row[2], MaskPredict)},
    **LATENT,
}
every_system = pytest.mark.parametrize("system", PARALLEL)


def make(name: str, changes: dict[str, Any]) -> Any:
    return make_flowseq(**changes) if name == "flowseq" else make_model(name, **changes)


class StandIn:
    """Captures as CUDA does: a replay computes anew from the same tensors, into the same ones."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> Callable:
        self.captures += 1
        outputs = function()
        for tensor in outputs:  # nothing is computed by a capture
            tensor.zero_()

        def replay() -> tuple[Tensor, ...]:
            self.replays += 1
            for tensor, result in zip(outputs, function(), strict=True):
                tensor.copy_(result)
            return outputs

        return replay


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Makes every model on the CPU decode by graphs."""
    stand_in = StandIn()

    def of(model: Any, source: Tensor) -> Graphs:
        model.graphs = model.graphs or Graphs(stand_in)
        return model.graphs

    monkeypatch.setattr("pynar.decoding.graphs.graphs_of", of)
    yield stand_in


def eager(strategy: Any, *arguments: Any, **options: Any) -> Hypotheses:
    return replace(strategy, graphs=False).decode(*arguments, **options)


@every_system
def test_a_graph_gives_what_decoding_without_gives(system: str, capture: StandIn) -> None:
    name, changes, strategy = PARALLEL[system]
    model = make(name, changes)
    for lengths in (LENGTHS, [1], [3, 8], [8, 1, 2, 8], [9, 17]):
        batch = make_source(lengths)
        assert_same(strategy.decode(model, *batch), eager(strategy, model, *batch))
    assert capture.captures == capture.replays == 5


@every_system
def test_replays_follow_their_inputs_and_results_stay(system: str, capture: StandIn) -> None:
    name, changes, strategy = PARALLEL[system]
    model, (source, lengths) = make(name, changes), make_source([7, 4, 1, 5, 2, 6, 8, 3])
    expected = eager(strategy, model, source, lengths)
    results = []
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 1, 6], [3, 0, 4, 6, 2, 5], [7] * 8):
        width = int(lengths[rows].max())
        found = strategy.decode(model, source[rows, :width], lengths[rows])
        results.append((found, rows))
    assert capture.captures == 1 and capture.replays == 4
    for found, rows in results:
        assert_same(found, take(expected, rows))


def test_given_lengths_are_decoded_by_graphs_too(capture: StandIn) -> None:
    model, (source, lengths) = make_model("cmlm"), make_source([4, 2, 6])
    strategy = MaskPredict(3, n_best=2)
    for given in ([[3, 5], [1, 9], [7, 7]], [[8, 2], [16, 1], [9, 9]], [[24, 1]] * 3):
        wanted = torch.tensor(given)
        found = strategy.decode(model, source, lengths, target_lengths=wanted)
        expected = eager(strategy, model, source, lengths, target_lengths=wanted)
        assert_same(found, expected)
    assert capture.captures == 2 and capture.replays == 3


def test_a_given_length_cuts_what_a_graph_writes(capture: StandIn) -> None:
    model, (source, lengths) = make_flowseq(), make_source([4, 2, 6])
    for given in ([3, 9, 1], [8, 5, 5], [2, 17, 4]):
        wanted = torch.tensor(given)
        found = LatentArgmax().decode(model, source, lengths, target_lengths=wanted)
        expected = eager(LatentArgmax(), model, source, lengths, target_lengths=wanted)
        assert_same(found, expected)
        assert (found.lengths[:, 0] <= wanted).all()
    assert capture.captures == 3 and capture.replays == 3


def test_added_rows_are_sentences_of_one_eos() -> None:
    seen = []

    def decode(*inputs: Tensor) -> tuple[Tensor, ...]:
        seen.append([x.clone() for x in inputs])
        return (inputs[0] + 1,)

    graphs, shapes = Graphs(StandIn()), [(4, 8), (4,), (4, 2)]
    for lengths in ([7, 8, 3, 1], [5, 2, 3], [4]):
        source, counts = make_source(lengths)
        given = torch.full((len(lengths), 2), 6)
        results = graphs.run("key", shapes, torch.nn.Module(), decode, (source, counts, given))
        assert results is not None and results[0].shape == (len(lengths), 8)
        padded, padded_counts, padded_given = seen[-1]
        rows, width = source.shape
        assert torch.equal(padded[:rows, :width], source)
        assert (padded[:rows, width:] == PAD).all()
        assert padded[rows:].tolist() == [[EOS] + [PAD] * 7] * (4 - rows)
        assert padded_counts.tolist() == [*lengths, *[1] * (4 - rows)]
        assert padded_given.tolist() == [[6, 6]] * rows + [[1, 1]] * (4 - rows)


def test_buckets() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 100)] == [1, 2, 4, 4, 8, 8, 16, 128]
    assert [width_bucket(n, None) for n in (1, 8, 9, 23)] == [8, 8, 16, 24]
    assert [width_bucket(n, 20) for n in (7, 17, 20)] == [8, 20, 20]
    assert width_bucket(21, 20) == 21  # which the model then refuses


def test_buckets_keep_to_learned_positions(capture: StandIn) -> None:
    model = make_model("cmlm", positions="learned", max_length=20, length_classes=40)
    strategy = MaskPredict(2, length_candidates=40, n_best=40, max_extra=20)
    for lengths in ([18, 3], [20]):
        batch = make_source(lengths)
        assert_same(strategy.decode(model, *batch), eager(strategy, model, *batch))
    with pytest.raises(ValueError, match="sequence of 21 tokens"):
        strategy.decode(model, *make_source([21]))


def test_a_limit_that_falls_between_two_numbers_is_the_same(capture: StandIn) -> None:
    model = make_model("cmlm", length_classes=40)
    for ratio in (0.1, 0.3, 0.7, 1.1, 1.9):
        strategy = MaskPredict(
            1, length_candidates=40, n_best=40, max_ratio=ratio, max_extra=0, length_prior=0.5
        )
        batch = make_source([8, 10, 30, 24, 20])
        assert_same(strategy.decode(model, *batch), eager(strategy, model, *batch))


def test_the_least_recently_used_graph_is_dropped() -> None:
    capture = StandIn()
    graphs = Graphs(capture, most=2)

    def use(width: int) -> None:
        source = torch.ones(1, width, dtype=torch.long)
        graphs.run("key", [(1, width)], torch.nn.Module(), lambda x: (x * 2,), (source,))

    for width in (8, 16, 8, 24, 8):
        use(width)
    assert capture.captures == 3 and len(graphs) == 2
    use(16)
    use(8)
    assert capture.captures == 4 and capture.replays == 7


def test_strategies_have_graphs_of_their_own(capture: StandIn) -> None:
    model, batch = make_model("cmlm"), make_source([4, 2])
    for strategy in (MaskPredict(2), MaskPredict(3), MaskPredict(2), MaskPredict(2, n_best=2)):
        assert_same(strategy.decode(model, *batch), eager(strategy, model, *batch))
    assert capture.captures == 3


def test_what_graphs_are_not_for(capture: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("cmlm"), make_source(LENGTHS)
    MaskPredict(2, trace=True).decode(model, *batch)
    MaskPredict(2, graphs=False).decode(model, *batch)
    MaskPredict(2).decode(model, *make_source([]))
    latent = make_flowseq()
    LatentArgmax(samples=2).decode(latent, *batch)
    LatentArgmax(noise=True).decode(latent, *batch)
    LatentArgmax(graphs=False).decode(latent, *batch)
    LatentArgmax().decode(latent, *make_source([]))
    # rows 8, candidates 5, width 2 * 16 + 10 rounded up
    monkeypatch.setattr("pynar.decoding.graphs.MOST_POSITIONS", 8 * 5 * 48 - 1)
    MaskPredict(2).decode(model, *batch)
    assert capture.captures == 0
    monkeypatch.setattr("pynar.decoding.graphs.MOST_POSITIONS", 8 * 5 * 48)
    MaskPredict(2).decode(model, *batch)
    assert capture.captures == 1


def test_the_cpu_has_no_graphs() -> None:
    model, (source, _) = make_model("cmlm"), make_source(LENGTHS)
    assert graphs_of(model, source) is None and graphs_of(model.freeze(), source) is None


def test_a_capture_that_fails_is_said_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = make_model("cmlm"), make_source(LENGTHS)
    tries = []

    def fails(function: Callable) -> Callable:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs(fails)
    monkeypatch.setattr("pynar.decoding.graphs.graphs_of", lambda *_: graphs)
    expected = eager(MaskPredict(2), model, *batch)
    with pytest.warns(UserWarning, match="not used for this model.*stream is capturing"):
        assert_same(MaskPredict(2).decode(model, *batch), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(MaskPredict(2).decode(model, *batch), expected)
    assert len(tries) == 1


def test_graphs_belong_to_one_model(capture: StandIn) -> None:
    model, batch = make_model("cmlm"), make_source(LENGTHS)
    names = list(model.state_dict())
    MaskPredict(2).decode(model, *batch)
    assert len(model.graphs) == 1 and list(model.state_dict()) == names
    other = copy.deepcopy(model)
    assert other.graphs is not model.graphs and len(other.graphs) == 0
    assert len(copy.copy(model.graphs)) == 0
    gone = weakref.ref(model.graphs)
    model.double()  # the weights lie elsewhere now
    assert model.graphs is None and gone() is None


def test_graphs_end_with_their_model(capture: StandIn) -> None:
    model = make_model("cmlm")
    MaskPredict(2).decode(model, *make_source(LENGTHS))
    gone = weakref.ref(model.graphs)
    del model
    gc.collect()  # the stand-in's replays refer to the model, CUDA's do not
    assert gone() is None


def test_a_graph_keeps_the_table_that_it_reads(capture: StandIn) -> None:
    model = make_model("cmlm", max_length=20)
    batch = make_source(LENGTHS)
    found = MaskPredict(2).decode(model, *batch)
    (captured,) = model.graphs._captured.values()
    table = model.target_embedding.table
    assert any(buffer is table for buffer in captured.buffers)
    MaskPredict(1).decode(model, *make_source([60]))
    assert model.target_embedding.table is not table
    assert any(buffer is table for buffer in captured.buffers)
    assert_same(MaskPredict(2).decode(model, *batch), found)


@pytest.fixture
def no_tensors_from_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("torch.tensor copies from the host")

    monkeypatch.setattr(torch, "tensor", refuse)


# A flow on meta tensors takes seconds: given lengths once, and more levels only repeat its maps.
WATCHED = [
    *((name, given) for name in PARALLEL if name not in LATENT for given in (False, True)),
    *(("flowseq", given) for given in (False, True)),
    ("flowseq-learned", False),
    ("flowseq-rnn", False),
]


@pytest.mark.parametrize(("system", "given"), WATCHED)
def test_nothing_between_source_and_tokens_waits_for_the_device(
    system: str, given: bool, request: pytest.FixtureRequest
) -> None:
    """A meta tensor has no values: what depends on some raises."""
    name, changes, strategy = PARALLEL[system]
    made = make(name, changes)
    request.getfixturevalue("no_tensors_from_lists")  # making the model needed them
    latent = isinstance(strategy, LatentArgmax)
    n_best = 1 if latent else min(strategy.n_best, 3 if given else 12)
    for dtype in ("bf16",) if latent else ("fp32", "bf16", "fp16"):
        model = copy.deepcopy(made).to("meta").freeze(dtype)
        source = torch.empty(4, 8, dtype=torch.long, device="meta")
        wanted = source[:, 0] if latent else source[:, :3]
        with torch.inference_mode(), Watch() as watch:
            inputs = [source, source[:, 0]] + [wanted] * given
            found = strategy._search(model, *inputs, width=16)
        assert watch.found == []
        assert found.tokens.shape == (4, n_best, 16)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: int(x.max()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.repeat_interleave(x),
        lambda x: torch.where(x > 1, 1, 0),
        lambda x: torch.where(x > 1, x, 0),
        lambda x: x + torch.ones(3, dtype=torch.long),
        lambda x: x + torch.ones(3, dtype=torch.long).to("meta"),
        lambda x: x + torch.tensor([1, 2, 3], device="meta"),
        lambda x: x if (x > 1).any() else -x,
    ],
)
@torch.inference_mode()
def test_waiting_would_be_noticed(waits: Callable, no_tensors_from_lists: None) -> None:
    try:
        with Watch() as watch:
            waits(torch.empty(3, dtype=torch.long, device="meta"))
    except (RuntimeError, NotImplementedError, AssertionError):
        return
    assert watch.found


@pytest.mark.cuda
@every_system
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_a_graph_gives_what_decoding_without_gives(system: str, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    name, changes, strategy = PARALLEL[system]
    model = make(name, changes).to("cuda").freeze(dtype)
    batches = [make_source(lengths) for lengths in (LENGTHS, [1], [3, 8], [8, 1, 2, 8], [9, 17])]
    cuda = [(source.cuda(), lengths.cuda()) for source, lengths in batches]
    # All are captured, and a longer sentence replaces the positions, before any is replayed.
    for repetition in range(2):
        for batch in cuda:
            found = strategy.decode(model, *batch)
            expected = eager(strategy, model, *batch)
            if dtype == "fp32":
                assert_same(found, expected)
            else:
                assert (found.scores[:, 0] - expected.scores[:, 0]).abs().median() < 0.1
        if repetition == 0:
            eager(strategy, model, *(x.cuda() for x in make_source([70])))
    assert model.graphs is not None and len(model.graphs) == 5


@pytest.mark.cuda
@every_system
def test_on_a_gpu_a_replay_does_not_wait(system: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    name, changes, strategy = PARALLEL[system]
    model = make(name, changes).to("cuda").freeze("bf16")
    source, lengths = (x.cuda() for x in make_source(LENGTHS))
    first = strategy.decode(model, source, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = strategy.decode(model, source, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(model.graphs) == 1
    assert_same(second, first)


@pytest.mark.cuda
def test_on_a_gpu_other_streams_and_autocast_do_without() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make_model("cmlm").to("cuda").freeze("fp32")
    source = make_source(LENGTHS)[0].cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert graphs_of(model, source) is None
    with torch.autocast("cuda"):
        assert graphs_of(model, source) is None
    assert graphs_of(model, source) is model.graphs is not None
    assert graphs_of(make_model("cmlm").to("cuda"), source) is None
