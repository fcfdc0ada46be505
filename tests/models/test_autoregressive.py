from __future__ import annotations

import pytest
import torch
from small_models import make_batch, make_example, make_model
from torch import Tensor

from pynar.models import AutoregressiveTransformer
from pynar.symbols import BOS, EOS, MASK, PAD
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)
either = pytest.mark.parametrize("kind", ["autoregressive", "autoregressive-separate"])


def next_log_probs(model: AutoregressiveTransformer, source: Tensor, prefix: list[int]) -> Tensor:
    """Of the token after `prefix`, from a whole pass over it, for one sentence `[S]`."""
    memory = model.encode(source[None], torch.tensor([len(source)]))
    states = model.decoder(model.target_embedding(torch.tensor([[BOS, *prefix]])), memory)
    logits = model.logits(states[0, -1]).double()
    logits[[PAD, BOS, MASK]] = -torch.inf
    return logits - logits.exp().sum().log()


def test_the_target_is_shifted_by_one() -> None:
    batch = make_batch(((2, 3), (1, 0), (1, 1)))
    a, b, c = batch.target[0].tolist()
    d = int(batch.target[2, 0])
    example = make_example(make_model("autoregressive"), batch)
    assert example.inputs.tolist() == [[BOS, a, b, c], [BOS, 0, 0, 0], [BOS, d, 0, 0]]
    assert example.labels.tolist() == [[a, b, c, EOS], [EOS, 0, 0, 0], [d, EOS, 0, 0]]
    assert example.counts["token"] == 4 + 1 + 2
    assert example.batch is batch


@either
@torch.no_grad()
def test_score_is_the_sum_of_stepwise_and_of_full_prefix_log_probabilities(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    scores = model.score(batch.source, batch.source_lengths, batch.target, batch.target_lengths)
    for row, score in enumerate(scores):
        source = batch.source[row, : batch.source_lengths[row]]
        tokens = batch.target[row, : batch.target_lengths[row]].tolist()
        memory = model.encode(source[None], batch.source_lengths[row : row + 1])
        cache = model.decoder.cache(1, memory.states)
        stepwise, whole = 0.0, 0.0
        for place, token in enumerate([*tokens, EOS]):
            last = torch.tensor([BOS if place == 0 else tokens[place - 1]])
            log_probs = model.log_probs(model.step(last, memory, cache))[0]
            expected = next_log_probs(model, source, tokens[:place])
            torch.testing.assert_close(log_probs, expected.float(), **CLOSE)
            stepwise, whole = stepwise + log_probs[token], whole + expected[token]
        torch.testing.assert_close(score, stepwise, **CLOSE)
        torch.testing.assert_close(score, whole.float(), **CLOSE)


@torch.no_grad()
def test_symbols_that_are_never_produced_have_no_share() -> None:
    model = make_model("autoregressive")
    log_probs = model.log_probs(10 * torch.randn(4, 3, 8))
    never = [PAD, BOS, MASK]
    assert (log_probs[..., never] == -torch.inf).all()
    rest = [i for i in range(log_probs.shape[-1]) if i not in never]
    assert log_probs[..., rest].isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4, 3))


def test_score_can_be_trained_on() -> None:
    model, batch = make_model("autoregressive"), make_batch()
    score = model.score(batch.source, batch.source_lengths, batch.target, batch.target_lengths)
    score.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        again = model.score(batch.source, batch.source_lengths, batch.target, batch.target_lengths)
    torch.testing.assert_close(again, score, **CLOSE)


@torch.no_grad()
def test_a_token_sees_none_after_it() -> None:
    model, batch = make_model("autoregressive"), make_batch(((3, 6),))
    example = make_example(model, batch)
    memory = model.encode(batch.source, batch.source_lengths)
    states = model.decoder(model.target_embedding(example.inputs), memory)
    for place in range(7):
        changed = example.inputs.clone()
        changed[:, place + 1 :] = MASK
        other = model.decoder(model.target_embedding(changed), memory)
        torch.testing.assert_close(other[:, : place + 1], states[:, : place + 1], **CLOSE)
