"""Frozen models against the models they were made from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_systems import LENGTHS, SYSTEMS, assert_same, make_model, make_source, take

from pynar import _backend
from pynar.checkpoint import save
from pynar.decoding import BeamSearch, Greedy, Hypotheses, MaskPredict
from pynar.nn import live_rows
from pynar.nn.frozen_state import FrozenCache
from pynar.nn.live_rows import Rows
from pynar.symbols import MASK, PAD, UNK

every_system = pytest.mark.parametrize("system", SYSTEMS)
every_type = pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])


def run(system: str, dtype: str | None, source, lengths, indices=None) -> Hypotheses:
    name, changes, strategy = SYSTEMS[system]
    model = make_model(name, **changes)
    model = model if dtype is None else model.freeze(dtype)
    return strategy.decode(model, source, lengths, indices=indices)


@every_system
def test_frozen_in_fp32_a_model_decodes_the_same(system: str) -> None:
    source, lengths = make_source(LENGTHS)
    assert_same(run(system, "fp32", source, lengths), run(system, None, source, lengths))


@every_system
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_with_fewer_bits_scores_stay_near(system: str, dtype: str) -> None:
    source, lengths = make_source(LENGTHS)
    found, exact = run(system, dtype, source, lengths), run(system, None, source, lengths)
    assert found.scores[:, 0].isfinite().all()
    # Draws aside, few bits seldom change the best score by much.
    if not system.startswith("sampling"):
        assert (found.scores[:, 0] - exact.scores[:, 0]).abs().median() < 0.1


@every_system
@every_type
def test_batch_order_and_padding_change_nothing(system: str, dtype: str) -> None:
    if dtype != "fp32" and _backend.extension() is None:
        # Only our kernels sum up in one order; rounding to few bits can magnify the last one.
        pytest.skip("PyTorch's products depend on the batch in the last bit")
    source, lengths = make_source(LENGTHS)
    together = run(system, dtype, source, lengths)
    order = [3, 0, 5, 2, 1, 4]
    wide = F.pad(source, (0, 3), value=PAD)
    dirty = torch.where(torch.arange(wide.shape[1]) < lengths[:, None], wide, UNK)
    moved = run(system, dtype, dirty[order], lengths[order], torch.tensor(order))
    assert_same(moved, take(together, order))
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1)
        alone = run(system, dtype, source[part, :length], lengths[part], torch.tensor([row]))
        assert_same(alone, take(together, [row]))


@every_system
def test_a_model_and_its_frozen_copy_go_their_own_ways(system: str) -> None:
    name, changes, strategy = SYSTEMS[system]
    model = make_model(name, **changes).train()
    frozen = model.freeze()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in frozen.modules())
    source, lengths = make_source(LENGTHS)
    before = strategy.decode(frozen, source, lengths)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.train()
    assert_same(strategy.decode(frozen, source, lengths), before)


@every_system
def test_an_empty_batch_gives_no_hypotheses(system: str) -> None:
    source, lengths = make_source([])
    found = run(system, "fp32", source, lengths, torch.zeros(0, dtype=torch.long))
    assert found.tokens.shape[0] == 0 and found.lists() == []


@pytest.mark.parametrize("system", ["cmlm", "nat-copy", "beam-4"])
def test_groups_of_rows_change_nothing(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, lengths = make_source(LENGTHS)
    whole = run(system, "fp32", source, lengths)
    for size in (1, 5, 12):
        monkeypatch.setattr(live_rows, "GROUP", size)
        assert_same(run(system, "fp32", source, lengths), whole)


def test_groups_are_whole_sentences_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_rows, "GROUP", 10)
    groups = Rows.of(torch.tensor([4, 6, 1, 20, 3, 3, 3, 5]), 20).groups()
    assert groups == [(0, 10), (10, 11), (11, 31), (31, 40), (40, 45)]


def test_rows_are_the_live_positions() -> None:
    lengths = torch.tensor([2, 4, 1])
    x = torch.randn(3, 4, 5)
    rows = Rows.of(lengths, 4)
    live = torch.arange(4) < lengths[:, None]
    assert torch.equal(rows.pack(x), x[live])
    assert torch.equal(rows.unpack(rows.pack(x)), x.masked_fill(~live[..., None], 0))
    assert rows.each(rows.bounds)[:, 0].tolist() == [[0, 2]] * 2 + [[2, 6]] * 4 + [[6, 7]]
    assert rows.causal()[:, 0].tolist() == [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5], [2, 6], [6, 7]]
    wanted = torch.zeros(3, 4, dtype=torch.bool)
    wanted[0, 1] = wanted[1, 0] = wanted[1, 3] = True
    assert rows.chosen(wanted).tolist() == [1, 2, 5]


@every_type
@torch.inference_mode()
def test_wanted_states_are_those_of_all_states(dtype: str) -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    counts = torch.tensor([3, 5, 1, 4, 4, 2])
    live = torch.arange(5) < counts[:, None]
    tokens = torch.where(live, MASK, PAD)
    wanted = live & (torch.arange(5) % 2 == 0)
    for one in (model, model.freeze(dtype)):
        memory = one.encode(source, lengths)
        states = one.decode(tokens, counts, memory)
        chosen = one.decode(tokens, counts, memory, wanted)
        torch.testing.assert_close(chosen, states[wanted], rtol=1e-5, atol=1e-6)
        nothing = one.decode(tokens, counts, memory, torch.zeros_like(wanted))
        assert nothing.shape == (0, states.shape[-1])


@torch.inference_mode()
def test_a_frozen_teacher_scores_the_same() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    found = BeamSearch(3).decode(model, source, lengths)
    pairs = source, lengths, found.tokens[:, 0], found.lengths[:, 0]
    expected = model.score(*pairs)
    torch.testing.assert_close(model.freeze().score(*pairs), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_follows_hypotheses_that_fork_and_end() -> None:
    """Against a plain list of what every row has seen."""
    generator = torch.Generator().manual_seed(0)
    cache, history = FrozenCache(6, 2, 2, 4), [[] for _ in range(6)]
    for step in range(40):
        cache.reserve()
        rows = len(history)
        new = torch.randn(2, rows, 4, 2, generator=generator)
        for row in range(rows):
            history[row] = [*history[row], new[:, row]]
        for layer in range(2):
            written = cache.data[layer].flatten(0, 1)
            written[cache.slots] = new[layer]  # as `packed_step` does
            for row, (begin, end) in enumerate(cache.sees[:, 0].tolist()):
                seen = torch.stack([part[layer] for part in history[row]])
                assert torch.equal(written[begin:end], seen)
        cache.advance()
        if step % 3 == 1:
            keep = rows - (rows > 2 and step % 12 == 10)
            index = torch.randint(rows, (keep,), generator=generator)
            cache.select(index)
            history = [history[i] for i in index.tolist()]


def test_the_model_itself_stays_as_it_was() -> None:
    model, (source, lengths) = make_model("autoregressive"), make_source(LENGTHS)
    before = copy.deepcopy(model.state_dict())
    expected = Greedy().decode(model, source, lengths)
    model.freeze("int8")
    assert model.frozen == "" and not model.encoder.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert_same(Greedy().decode(model, source, lengths), expected)
    model.train()


def test_what_a_frozen_model_cannot_do_is_said(tmp_path) -> None:
    model = make_model("cmlm").freeze()
    assert model.frozen == "fp32"
    for impossible in (
        lambda: model.train(),
        lambda: model.half(),
        lambda: model.to("cpu"),
        lambda: model.state_dict(),
        lambda: save(tmp_path / "model", model, None),
    ):
        with pytest.raises(ValueError, match="packed for the CPU cannot"):
            impossible()
    with pytest.raises(ValueError, match="frozen already, as fp32"):
        model.freeze("int8")
    with pytest.raises(ValueError, match="must be one of fp32, bf16, int8, got 'fp8'"):
        make_model("cmlm").freeze("fp8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_trace_of_a_frozen_model_is_that_of_the_model(iterations: int) -> None:
    model, (source, lengths) = make_model("cmlm"), make_source(LENGTHS)
    strategy = MaskPredict(iterations, 3, trace=True)
    found = strategy.decode(model.freeze(), source, lengths)
    for state, expected in zip(
        found.trace, strategy.decode(model, source, lengths).trace, strict=True
    ):
        assert torch.equal(state, expected)
