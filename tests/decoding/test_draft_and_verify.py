from __future__ import annotations

from typing import Any

import pytest
import torch
from small_systems import make_model, make_source

from pynar import _backend
from pynar.decoding import DraftAndVerify, Greedy, Hypotheses
from pynar.models import JANUS
from pynar.symbols import EOS, MASK

MODELS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"norm": "post", "positions": "learned", "max_length": 23},
    "own positions": {"query_positions": "own", "positions": "learned", "max_length": 23},
}
LENGTHS = [4, 1, 9, 2, 4, 7, 3, 8]


def many_sentences(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 12, (count,), generator=generator).tolist()


@pytest.mark.parametrize("freeze", ["fp32", "int8"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_thousand_sentences_are_those_of_greedy_search(kind: str, freeze: str) -> None:
    model = make_model("janus", **MODELS[kind]).freeze(freeze)
    # The references take minutes for so many.
    source, lengths = make_source(many_sentences(1000 if _backend.extension() else 30))
    expected = Greedy().decode(model, source, lengths)
    found = DraftAndVerify().decode(model, source, lengths)
    assert found.lists() == expected.lists()
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    # Greedy search takes a pass a token and one for the end; a round settles a token or more.
    assert (found.passes <= 2 * expected.passes).all()
    assert found.passes.sum() < expected.passes.sum()


OPTIONS: list[dict[str, Any]] = [
    {"iterations": 2},
    {"max_ratio": 0, "max_extra": 1},
    {"max_ratio": 0.5, "max_extra": 2},
    {"iterations": 3, "max_ratio": 1, "max_extra": 0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_neither_drafts_nor_limits_change_the_result(kind: str, options: dict[str, Any]) -> None:
    model = make_model("janus", **MODELS[kind])
    source, lengths = make_source(LENGTHS)
    limits = {name: value for name, value in options.items() if name != "iterations"}
    expected = Greedy(**limits).decode(model, source, lengths)
    found = DraftAndVerify(**options).decode(model, source, lengths)
    assert found.lists() == expected.lists()
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    # A verifying pass settles what it accepts and one choice more.
    assert torch.equal(found.accepted + found.verified, expected.lengths[:, 0] + 1)


def slow(
    model: JANUS, source: torch.Tensor, top_k: int, margin: float
) -> tuple[list[int], int, list[list[int]], list[int]]:
    """One sentence, a prefix at a time: the tokens, the rounds and what each round settled.

    At last how many drafted tokens each round took.
    """
    greedy = Greedy()
    lengths = torch.tensor([len(source)])
    memory = model.encode(source[None], lengths)
    limit = min(2 * len(source) + 10, model.longest or 10**6) - 1
    expected = int(model.length.predict(memory.states, lengths, 1)[0][0, 0])
    tokens: list[int] = []
    rounds: list[list[int]] = []
    taken: list[int] = []
    assert greedy.max_ratio == 2.0 and greedy.max_extra == 10
    while True:
        end = min(max(expected, len(tokens) + 1), limit)
        open_ = torch.tensor([tokens + [MASK] * (end - len(tokens))])
        states = model.decode(open_, torch.tensor([end]), memory)[0, len(tokens) :]
        draft = (model.logits(states) + model.parallel_exclusion).argmax(-1).tolist()
        right = True
        taken.append(0)
        while right:
            prefix = torch.tensor([tokens], dtype=torch.long)
            size = torch.tensor([len(tokens)])
            here = model.ahead(prefix, size, size, memory)
            log_probs = model.log_probs(here)[0].double()
            right = False
            if draft and len(tokens) < limit:
                price = log_probs[draft[0]]
                rank = int((log_probs > price).sum())
                right = rank < top_k or bool(price > log_probs.max() - margin)
            if right:
                tokens.append(draft.pop(0))
                taken[-1] += 1
        choice = EOS if len(tokens) == limit else int(log_probs.argmax())
        if choice == EOS:
            return tokens, len(rounds) + 1, [*rounds, list(tokens)], taken
        tokens.append(choice)
        rounds.append(list(tokens))


@pytest.mark.parametrize("top_k,margin", [(1, 0.0), (3, 0.0), (1, 1.0), (2, 0.5)])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_rounds_are_the_slow_ones(kind: str, top_k: int, margin: float) -> None:
    model = make_model("janus", **MODELS[kind])
    source, lengths = make_source(LENGTHS)
    strategy = DraftAndVerify(top_k=top_k, margin=margin, trace=True)
    found = strategy.decode(model, source, lengths)
    for row, length in enumerate(LENGTHS):
        tokens, rounds, trace, taken = slow(model, source[row, :length], top_k, margin)
        assert found.lists()[row][0] == tokens
        drafts = sum(len(before) < _limit(model, length) for before in [[], *trace[:-1]])
        assert int(found.passes[row]) == rounds + drafts
        assert [int(found.accepted[row]), int(found.verified[row])] == [sum(taken), len(taken)]
        for state, settled in zip(found.trace, trace, strict=False):
            assert [token for token in state[row].tolist() if token] == settled


def _limit(model: JANUS, length: int) -> int:
    return min(2 * length + 10, model.longest or 10**6) - 1


def test_tolerance_saves_passes_and_costs_score() -> None:
    model = make_model("janus")
    source, lengths = make_source(many_sentences(60))

    def run(**options: Any) -> Hypotheses:
        return DraftAndVerify(**options).decode(model, source, lengths)

    exact, loose = run(), run(top_k=4)
    assert loose.passes.sum() < exact.passes.sum()
    assert loose.lists() != exact.lists()
    assert run(margin=100.0).passes.sum() <= loose.passes.sum()


def test_no_sentences() -> None:
    source, lengths = make_source([])
    found = DraftAndVerify().decode(make_model("janus"), source, lengths)
    assert found.lists() == []
    assert found.accepted.shape == found.verified.shape == (0,)


@pytest.mark.parametrize("option", ["iterations", "top_k"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"DraftAndVerify: `{option}` must be positive, got 0"):
        DraftAndVerify(**{option: 0})
    with pytest.raises(ValueError, match="`margin` must not be negative, got nan"):
        DraftAndVerify(margin=float("nan"))
