"""Decoding through latent variables against the same formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_systems import make_flowseq
from torch import Tensor
from torch.distributions import Normal

from bench import plain_flowseq
from pynar.decoding import ImportanceWeighted, LatentArgmax, NoisyParallel
from pynar.models import FlowSeq
from pynar.models.flowseq import fill_with_eos
from pynar.symbols import EOS, PAD

SOURCE = torch.tensor([[7, 8, 9, 10, EOS], [11, 12, EOS, PAD, PAD], [6, 6, 7, EOS, PAD]])
LENGTHS = torch.tensor([5, 3, 4])


@pytest.fixture(scope="module")
def model() -> FlowSeq:
    return make_flowseq()


def first_length(model: FlowSeq, row: int) -> int:
    """The most probable multiple of 4 within the limit of the strategy."""
    n = int(LENGTHS[row])
    with torch.inference_mode():
        memory = model.encode(SOURCE[row : row + 1, :n], LENGTHS[row : row + 1])
        log_probs = model.length(memory.states, memory.lengths)[0]
    limit = (2 * n + 10) // 4 * 4
    possible = [(log_probs[t - n + 20].item(), t) for t in range(4, min(limit, n + 20) + 1, 4)]
    return max(possible)[1]


def cut(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def test_argmax_is_the_mode_decoded(model: FlowSeq) -> None:
    found = LatentArgmax().decode(model, SOURCE, LENGTHS)
    for row in range(3):
        n, length = int(LENGTHS[row]), torch.tensor([first_length(model, row)])
        with torch.inference_mode():
            memory = model.encode(SOURCE[row : row + 1, :n], LENGTHS[row : row + 1])
            keys_values = model.prior.project(memory.states)
            zero = torch.zeros(1, int(length), 16)
            z, logdet = model.prior(zero, length, keys_values, memory.lengths, inverse=True)
            tokens = model.log_probs(model.decode_latent(z, length, memory)).argmax(-1)[0]
        assert found.lists()[row][0] == cut(tokens.tolist())
        torch.testing.assert_close(found.scores[row, 0], -logdet[0], rtol=1e-4, atol=1e-4)
    assert found.passes.tolist() == [1, 1, 1]


@pytest.mark.parametrize("freeze", [False, True])
def test_argmax_in_plain_pytorch(model: FlowSeq, freeze: bool) -> None:
    """Padded, masked, a call for each step: bench/plain_flowseq.py."""
    lengths = torch.tensor([first_length(model, row) for row in range(3)])
    found = LatentArgmax().decode(model.freeze() if freeze else model, SOURCE, LENGTHS)
    with torch.inference_mode():
        tokens = plain_flowseq.argmax(model, SOURCE, LENGTHS, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert found.lists()[row][0] == cut(tokens[row, :length].tolist())


def test_lengths_may_be_given(model: FlowSeq) -> None:
    predicted = torch.tensor([first_length(model, row) for row in range(3)])
    free = LatentArgmax().decode(model, SOURCE, LENGTHS)
    given = LatentArgmax().decode(model, SOURCE, LENGTHS, target_lengths=predicted)
    assert given.lists() == free.lists()
    # Steps come in fours, tokens one by one.
    short = LatentArgmax().decode(model, SOURCE, LENGTHS, target_lengths=predicted - 1)
    for row, (one, other) in enumerate(zip(short.lists(), free.lists(), strict=True)):
        assert one[0] == other[0][: int(predicted[row]) - 1]
    with pytest.raises(ValueError, match="`target_lengths` must be 3 positive lengths"):
        LatentArgmax().decode(model, SOURCE, LENGTHS, target_lengths=torch.tensor([4]))


@pytest.mark.parametrize("kind", [NoisyParallel, ImportanceWeighted])
def test_drafts_of_a_given_length(
    model: FlowSeq, kind: type[NoisyParallel | ImportanceWeighted]
) -> None:
    """Those of the most probable length, if that is given; fewer tokens are their beginnings."""
    predicted = torch.tensor([first_length(model, row) for row in range(3)])
    options = {"n_best": 3} if kind is ImportanceWeighted else {}
    free = kind(length_candidates=1, samples=3, **options).decode(model, SOURCE, LENGTHS)
    strategy = kind(samples=3, **options)
    given = strategy.decode(model, SOURCE, LENGTHS, target_lengths=predicted)
    assert given.lists() == free.lists()
    if kind is ImportanceWeighted:  # the only length has a probability, the given one has none
        for row, length in enumerate(predicted.tolist()):
            drafts = drafts_of(model, row, kind(length_candidates=1, samples=3))
            torch.testing.assert_close(
                given.scores[row], free.scores[row] - drafts[0][3] / length, rtol=1e-4, atol=1e-4
            )
    else:
        torch.testing.assert_close(given.scores, free.scores)
        short = strategy.decode(model, SOURCE, LENGTHS, target_lengths=predicted - 1)
        for row, (some, all_) in enumerate(zip(short.lists(), free.lists(), strict=True)):
            assert some == [tokens[: int(predicted[row]) - 1] for tokens in all_]
    with pytest.raises(ValueError, match=f"{kind.__name__}: `target_lengths` must be 3 positive"):
        strategy.decode(model, SOURCE, LENGTHS, target_lengths=torch.tensor([4, 0, 4]))


def test_of_several_samples_the_most_probable_is_taken(model: FlowSeq) -> None:
    one = LatentArgmax(samples=1).decode(model, SOURCE, LENGTHS)
    few = LatentArgmax(samples=2, temperature=0.5, seed=3).decode(model, SOURCE, LENGTHS)
    many = LatentArgmax(samples=9, temperature=0.5, seed=3).decode(model, SOURCE, LENGTHS)
    assert (many.scores >= few.scores - 1e-5).all() and (many.scores > few.scores + 1e-3).any()
    assert (
        LatentArgmax(samples=4, temperature=0.0).decode(model, SOURCE, LENGTHS).lists()
        == one.lists()
    )


def test_noise_gives_each_seed_its_own_translations(model: FlowSeq) -> None:
    """One sample a seed, of the most probable length; with several, noise is drawn anyway."""
    streams = []
    for seed in (3, 4):
        strategy = LatentArgmax(noise=True, temperature=0.8, seed=seed)
        streams.append(strategy.decode(model, SOURCE, LENGTHS).lists())
        assert strategy.decode(model, SOURCE, LENGTHS).lists() == streams[-1]
        for row in range(3):
            n, length = int(LENGTHS[row]), first_length(model, row)
            generator = np.random.default_rng((seed, row, length, 0))
            noise = generator.standard_normal((1, length, 16), dtype=np.float32)
            size = torch.tensor([length])
            with torch.inference_mode():
                memory = model.encode(SOURCE[row : row + 1, :n], LENGTHS[row : row + 1])
                z, _ = model.sample_prior(0.8 * torch.from_numpy(noise), size, memory)
                tokens = model.log_probs(model.decode_latent(z, size, memory))[0].argmax(-1)
            assert streams[-1][row][0] == cut(tokens.tolist())
    mode = LatentArgmax().decode(model, SOURCE, LENGTHS).lists()
    assert streams[0] not in (streams[1], mode)
    cold = LatentArgmax(noise=True, temperature=0.0).decode(model, SOURCE, LENGTHS)
    assert cold.lists() == mode
    two = [LatentArgmax(samples=2, noise=noise, seed=3) for noise in (False, True)]
    found, same = (strategy.decode(model, SOURCE, LENGTHS) for strategy in two)
    assert found.lists() == same.lists()


def drafts_of(
    model: FlowSeq, row: int, strategy: NoisyParallel | ImportanceWeighted
) -> list[tuple[list[int], float, int, float]]:
    """Tokens, their mean log-probability, and the length with its log-probability, by the parts."""
    n, found = int(LENGTHS[row]), []
    with torch.inference_mode():
        memory = model.encode(SOURCE[row : row + 1, :n], LENGTHS[row : row + 1])
        limit = torch.tensor([(2 * n + 10) // 4 * 4])
        count = strategy.length_candidates
        lengths, log_probs = model.length.predict(memory.states, memory.lengths, count, limit)
        for length, log_prob in zip(lengths[0].tolist(), log_probs[0].tolist(), strict=True):
            for sample in range(strategy.samples):
                generator = np.random.default_rng((strategy.seed, row, length, sample))
                noise = generator.standard_normal((1, length, 16), dtype=np.float32)
                noise = torch.from_numpy(noise) * (strategy.temperature if sample else 0.0)
                size = torch.tensor([length])
                z, _ = model.sample_prior(noise, size, memory)
                best = model.log_probs(model.decode_latent(z, size, memory))[0].max(-1)
                mean = best.values.mean().item()
                found.append((cut(best.indices.tolist()), mean, length, log_prob))
    return found


def test_every_draft_is_a_hypothesis(model: FlowSeq) -> None:
    """Its tokens and their mean log-probability, of the same noise put through the parts."""
    strategy = NoisyParallel(length_candidates=2, samples=3, temperature=0.8, seed=4)
    found = strategy.decode(model, SOURCE, LENGTHS)
    assert found.tokens.shape[:2] == (3, 6) and found.passes.tolist() == [1, 1, 1]
    for row in range(3):
        wanted = sorted(drafts_of(model, row, strategy), key=lambda draft: -draft[1])
        assert found.lists()[row] == [tokens for tokens, *_ in wanted]
        torch.testing.assert_close(
            found.scores[row].tolist(), [draft[1] for draft in wanted], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "strategy",
    [
        LatentArgmax(),
        NoisyParallel(length_candidates=2, samples=2, temperature=0.7),
        LatentArgmax(samples=3, temperature=0.7),
        LatentArgmax(noise=True, temperature=0.7),
        ImportanceWeighted(length_candidates=2, samples=2, importance_samples=2, n_best=3),
    ],
)
def test_batch_mates_change_nothing(
    model: FlowSeq, strategy: LatentArgmax | NoisyParallel | ImportanceWeighted
) -> None:
    names = torch.tensor([4, 2, 9])
    together = strategy.decode(model, SOURCE, LENGTHS, indices=names)
    for row in range(3):
        n = int(LENGTHS[row])
        one = slice(row, row + 1)
        single = strategy.decode(model, SOURCE[one, :n], LENGTHS[one], indices=names[one])
        assert single.lists()[0] == together.lists()[row]
        torch.testing.assert_close(single.scores[0], together.scores[row], rtol=1e-4, atol=1e-4)


def importance(model: FlowSeq, row: int, tokens: list[int], noise: Tensor) -> float:
    """log of the mean of p(y | z) p(z) / q(z | y), by torch.distributions."""
    n = int(LENGTHS[row])
    memory = model.encode(SOURCE[row : row + 1, :n], LENGTHS[row : row + 1])
    filled, length = fill_with_eos(torch.tensor([tokens or [PAD]]), torch.tensor([len(tokens)]), 4)
    posterior = model.infer(filled, length, memory)
    q = Normal(posterior.mean[0], (posterior.log_variance[0] / 2).exp())
    weights = []
    for draw in noise:
        z = q.mean + q.stddev * draw[: int(length)]
        keys_values = model.prior.project(memory.states)
        eps, logdet = model.prior(z[None], length, keys_values, memory.lengths)
        log_p = Normal(0.0, 1.0).log_prob(eps).sum() + logdet[0]
        probs = model.log_probs(model.decode_latent(z[None], length, memory))[0]
        y = probs.gather(1, filled[0][:, None]).sum()
        weights.append(y + log_p - q.log_prob(z).sum())
    return torch.stack(weights).logsumexp(0).item() - math.log(len(weights))


@pytest.mark.parametrize(("lengths", "samples"), [(1, 1), (2, 2)])
def test_importance_weights_by_hand(model: FlowSeq, lengths: int, samples: int) -> None:
    options = {"length_candidates": lengths, "samples": samples, "n_best": lengths * samples}
    strategy = ImportanceWeighted(importance_samples=3, temperature=0.8, seed=5, **options)
    found = strategy.decode(model, SOURCE, LENGTHS)
    if samples == 1:
        # One noise-free draft of the most probable length: the tokens of argmax.
        assert found.lists() == LatentArgmax().decode(model, SOURCE, LENGTHS).lists()
    assert found.passes.tolist() == [2, 2, 2]
    for row in range(3):
        wanted, drafts = [], drafts_of(model, row, strategy)
        assert len({length for _, _, length, _ in drafts}) == lengths
        for tokens, _, length, log_prob in drafts:
            filled = max(-(-len(tokens) // 4) * 4, 4)
            draws = [
                np.random.default_rng((6, row, filled, k)).standard_normal(
                    (filled, 16), dtype=np.float32
                )
                for k in range(3)
            ]
            with torch.inference_mode():
                score = importance(model, row, tokens, torch.from_numpy(np.stack(draws)))
            wanted.append(((score + log_prob) / length, tokens))
        wanted.sort(key=lambda pair: -pair[0])
        assert found.lists()[row] == [tokens for _, tokens in wanted]
        scores = [score for score, _ in wanted]
        torch.testing.assert_close(found.scores[row].tolist(), scores, rtol=1e-4, atol=1e-4)


def test_equal_drafts_are_scored_once(model: FlowSeq, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = ImportanceWeighted(importance_samples=2)
    memory, names = model.encode(SOURCE, LENGTHS), range(3)
    tokens = torch.randint(4, 9, (3, 6, 8), generator=torch.Generator().manual_seed(0))
    tokens[0, :, 3], tokens[1, 2:, 0] = EOS, PAD  # a short one; and empty ones, but for two
    tokens[0, 4], tokens[0, 5] = tokens[0, 1], tokens[0, 1]
    tokens[0, 5, 4:] = 7  # which follows the end
    tokens[2] = tokens[2, :1]
    with torch.inference_mode():
        every = strategy._score(model, tokens.flatten(0, 1), memory, names).view(3, 6)
    counts = []
    infer = model.infer
    monkeypatch.setattr(
        model, "infer", lambda y, *rest: (counts.append(len(y)), infer(y, *rest))[1]
    )
    with torch.inference_mode():
        found = strategy._score_distinct(model, tokens, memory, names)
    torch.testing.assert_close(found, every, rtol=1e-5, atol=1e-5)
    assert counts == [1, 3, 4]  # of the third, the second and the first sentence


FEW = {"length_candidates": 2, "samples": 2}
STRATEGIES = (LatentArgmax(), NoisyParallel(**FEW), ImportanceWeighted(**FEW))
RECURRENT = [
    {"network": "rnn", "positions": "none"},
    {"flow_network": "rnn"},
    {"network": "rnn", "positions": "none", "flow_network": "rnn", "position_attention": False},
]


@pytest.mark.parametrize("changes", [{}, {"latent_attention": False}, *RECURRENT], ids=str)
def test_frozen_translates_alike(changes: dict[str, object]) -> None:
    model = make_flowseq(**changes)
    frozen_model = model.freeze()
    for strategy in STRATEGIES:
        free = strategy.decode(model, SOURCE, LENGTHS)
        frozen = strategy.decode(frozen_model, SOURCE, LENGTHS)
        assert frozen.lists() == free.lists()
        torch.testing.assert_close(frozen.scores, free.scores, rtol=1e-3, atol=1e-3)
    assert free.lists()[0] != free.lists()[1]
    with pytest.raises(ValueError, match="cannot be trained"):
        frozen_model.train()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_recurrent_networks_stay_in_fp32(dtype: str) -> None:
    """So does log p(z | x), the score of the mode."""
    model = make_flowseq(**RECURRENT[-1])
    free = LatentArgmax().decode(model, SOURCE, LENGTHS)
    frozen = LatentArgmax().decode(model.freeze(dtype), SOURCE, LENGTHS)
    torch.testing.assert_close(frozen.scores, free.scores)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_recurrent_batch_mates_change_nothing(strategy: LatentArgmax) -> None:
    test_batch_mates_change_nothing(make_flowseq(**RECURRENT[-1]), strategy)


def test_no_sentences() -> None:
    for changes in ({}, RECURRENT[-1]):
        model = make_flowseq(**changes)
        for strategy in STRATEGIES:
            for one in (model, model.freeze()):
                found = strategy.decode(one, SOURCE[:0], LENGTHS[:0])
                assert found.lists() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentArgmax(samples=0), "`samples` must be positive, got 0"),
        (lambda: LatentArgmax(temperature=-1.0), "`temperature` must not be negative"),
        (lambda: NoisyParallel(samples=0), "`samples` must be positive, got 0"),
        (lambda: ImportanceWeighted(n_best=16), "`n_best` must be at most"),
        (lambda: ImportanceWeighted(seed=-1), "`seed` must not be negative"),
    ],
)
def test_options_that_cannot_be(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
