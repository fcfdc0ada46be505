from __future__ import annotations

import pytest
import torch

from pynar.nn.length import COMPONENTS, LengthPredictor, logistic_mixture
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)
KINDS = ("absolute", "difference", "logistic")


def make(
    kind: str, classes: int, longest: int | None = None, pooling: str = "mean", multiple: int = 1
) -> LengthPredictor:
    sizes = {"classes": classes, "longest": longest, "multiple": multiple}
    layer = LengthPredictor(8, kind=kind, pooling=pooling, **sizes)
    torch.nn.init.normal_(layer.output.weight)
    return layer


def mixture(parameters: list[float], classes: int) -> list[float]:
    """Logarithms of differences of the distribution functions of logistics."""
    weights, means, scales = torch.tensor(parameters, dtype=torch.float64).view(3, -1)
    radius = max(classes // 2, 1)
    found = []
    for k in range(classes):
        ends = []
        for edge in ((k - classes // 2 + 0.5) / radius, (k - classes // 2 - 0.5) / radius):
            ends.append(((edge - means) / scales.exp()).sigmoid())
        above = torch.ones_like(means) if k == classes - 1 else ends[0]
        below = torch.zeros_like(means) if k == 0 and classes > 1 else ends[1]
        found.append((weights.softmax(0) * (above - below)).sum().log().item())
    return found


def distribution(
    layer: LengthPredictor, states: torch.Tensor, source_length: int
) -> dict[int, float]:
    """Length -> probability of one sentence, from the weights, by the definition."""
    live = states[:source_length].double()
    pooled = live.mean(0) if layer.pooling == "mean" else live.sum(0)
    logits = (layer.output.weight.double() @ pooled + layer.output.bias.double()).tolist()
    if layer.kind == "logistic":
        logits = mixture(logits, layer.classes)
    first = 1 if layer.kind == "absolute" else source_length - layer.classes // 2
    longest = layer.longest or 10**6
    possible = {first + i: x for i, x in enumerate(logits) if 1 <= first + i <= longest}
    possible = {length: x for length, x in possible.items() if length % layer.multiple == 0}
    values = torch.tensor(list(possible.values()), dtype=torch.float64).softmax(0).tolist()
    return dict(zip(possible, values, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 7, 20])
@pytest.mark.parametrize("longest", [None, 9])
@pytest.mark.parametrize("pooling", LengthPredictor.POOLINGS)
def test_every_possible_length_has_its_probability_and_no_other(
    kind, classes, longest, pooling
) -> None:
    layer = make(kind, classes, longest, pooling)
    source_lengths = torch.tensor([1, 2, 6, 9])
    states = torch.randn(4, 9, 8)
    log_probs = layer(states, source_lengths)
    assert log_probs.shape == (4, classes)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(4))
    for b, length in enumerate(source_lengths.tolist()):
        expected = torch.zeros(classes)
        first = 1 if kind == "absolute" else length - classes // 2
        for target, probability in distribution(layer, states[b], length).items():
            expected[target - first] = probability
        torch.testing.assert_close(log_probs[b].exp(), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [None, 9])
def test_loss_is_that_of_the_true_length_or_the_nearest(kind: str, longest: int | None) -> None:
    layer = make(kind, 6, longest)
    for source_length in (1, 4, 9):
        states = torch.randn(1, 9, 8)
        probability = distribution(layer, states[0], source_length)
        for target in (0, 1, 2, 5, 6, 7, 9, 12, 40):
            nearest = min(probability, key=lambda length: abs(length - target))
            loss = layer.loss(states, torch.tensor([source_length]), torch.tensor([target]))
            expected = -torch.tensor(probability[nearest]).log()
            torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["difference", "logistic"])
@pytest.mark.parametrize("classes", [7, 12])
@pytest.mark.parametrize("longest", [None, 8])
def test_of_multiples_a_target_trains_the_next(
    kind: str, classes: int, longest: int | None
) -> None:
    """The fewest classes that always hold a multiple of 4, and targets beyond both ends."""
    layer = make(kind, classes, longest, multiple=4)
    source_lengths, states = torch.tensor([1, 2, 5, 8, 11]), torch.randn(5, 11, 8)
    log_probs = layer(states, source_lengths)
    lengths, best = layer.predict(states, source_lengths, classes)
    for b, source_length in enumerate(source_lengths.tolist()):
        probability = distribution(layer, states[b], source_length)
        expected = torch.zeros(classes)
        for length, p in probability.items():
            expected[length - source_length + classes // 2] = p
        torch.testing.assert_close(log_probs[b].exp(), expected, **CLOSE)
        ranked = sorted(probability, key=probability.__getitem__, reverse=True)
        assert lengths[b][best[b] > -torch.inf].tolist() == ranked
        for target in (0, 1, 3, 4, 5, 8, 9, 12, 15, 40):
            trained = min((n for n in probability if n >= target), default=max(probability))
            one = slice(b, b + 1)
            loss = layer.loss(states[one], source_lengths[one], torch.tensor([target]))
            wanted = -torch.tensor(probability[trained]).log()
            torch.testing.assert_close(loss, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_summed_over_the_sentences(kind: str) -> None:
    layer, states = make(kind, 6), torch.randn(3, 5, 8)
    source_lengths, target_lengths = torch.tensor([5, 1, 3]), torch.tensor([1, 9, 4])
    alone = [
        layer.loss(states[b : b + 1], source_lengths[b : b + 1], target_lengths[b : b + 1])
        for b in range(3)
    ]
    torch.testing.assert_close(layer.loss(states, source_lengths, target_lengths), sum(alone))
    empty = layer.loss(states[:0], source_lengths[:0], target_lengths[:0])
    torch.testing.assert_close(empty, torch.tensor(0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 3, 6, 9])
def test_the_most_probable_lengths_come_first_and_differ(kind: str, candidates: int) -> None:
    layer, source_lengths = make(kind, 6), torch.tensor([1, 2, 6])
    states = torch.randn(3, 6, 8)
    lengths, log_probs = layer.predict(states, source_lengths, candidates)
    assert lengths.shape == log_probs.shape == (3, min(candidates, 6))
    for b, source_length in enumerate(source_lengths.tolist()):
        probability = distribution(layer, states[b], source_length)
        ranked = sorted(probability, key=probability.__getitem__, reverse=True)[:candidates]
        found = [
            length
            for length, p in zip(lengths[b].tolist(), log_probs[b].tolist(), strict=True)
            if p > -torch.inf
        ]
        assert found == ranked
        # What is left over is flagged, and still a length that can be decoded.
        assert (log_probs[b, len(ranked) :] == -torch.inf).all()
        assert (lengths[b, len(ranked) :] == ranked[0]).all()


def test_lengths_the_model_has_no_positions_for_are_never_predicted() -> None:
    layer, states = make("difference", 20, longest=7), torch.randn(1, 6, 8)
    lengths, log_probs = layer.predict(states, torch.tensor([6]), 20)
    possible = lengths[log_probs > -torch.inf]
    assert sorted(possible.tolist()) == list(range(1, 8)) and lengths.max() == 7


@pytest.mark.parametrize("kind", KINDS)
def test_limits_hold_for_each_sentence(kind: str) -> None:
    layer, states = make(kind, 6), torch.randn(4, 9, 8)
    source_lengths, limits = torch.tensor([2, 9, 5, 9]), torch.tensor([1, 7, 99, 2])
    lengths, log_probs = layer.predict(states, source_lengths, 6, limits)
    free = layer.predict(states, source_lengths, 6)
    for b, limit in enumerate(limits.tolist()):
        pairs = zip(free[0][b].tolist(), free[1][b].tolist(), strict=True)
        known = {x: p for x, p in pairs if p > -torch.inf}
        possible = log_probs[b] > -torch.inf
        found = dict(
            zip(lengths[b][possible].tolist(), log_probs[b][possible].tolist(), strict=True)
        )
        # What is left keeps its probability; of nothing but greater lengths, the limit is left.
        most = max(limit, min(known))
        expected = {min(x, limit): p for x, p in known.items() if x <= most}
        assert found == pytest.approx(expected)
        assert (lengths[b] <= limit).all() and (lengths[b] >= 1).all()


def test_padding_is_inert_even_where_it_is_not_a_number() -> None:
    layer, states = make("absolute", 6), torch.randn(2, 5, 8)
    lengths = torch.tensor([2, 4])
    dirty = states.clone()
    dirty[0, 2:], dirty[1, 4:] = torch.nan, torch.inf
    wide = torch.nn.functional.pad(dirty, (0, 0, 0, 3), value=torch.nan)
    for given in (dirty, wide):
        torch.testing.assert_close(layer(given, lengths), layer(states, lengths))


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of absolute, difference, logistic, got 'relative'"):
        LengthPredictor(8, kind="relative", classes=6)


def test_sharp_logistics_stay_finite() -> None:
    """Where the distribution function is flat on both sides of a bin."""
    parameters = torch.zeros(1, 3 * COMPONENTS)
    parameters[:, COMPONENTS:] = torch.tensor([0.0, 3.0, -9.0, 0.2, 0.9] + [-50.0] * COMPONENTS)
    parameters.requires_grad_()
    log_probs = logistic_mixture(parameters, 41)
    assert log_probs.isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(1))
    log_probs.sum().backward()
    assert parameters.grad is not None and parameters.grad.isfinite().all()
