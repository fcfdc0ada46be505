from __future__ import annotations

import pytest
import torch
from small_models import (
    MODELS,
    VOCABULARY,
    alone,
    gradients,
    make_batch,
    make_example,
    make_model,
    states_of,
    widened,
)

from pynar.models.base import TranslationModel
from pynar.symbols import MASK, PAD
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)
every_model = pytest.mark.parametrize("kind", MODELS)


def total(losses: dict[str, torch.Tensor], model: TranslationModel) -> torch.Tensor:
    return sum(weight * losses[name] for name, weight in model.loss_weights.items())


@every_model
def test_losses_of_a_batch_are_the_sums_over_its_sentences_alone(kind: str) -> None:
    model = make_model(kind)
    example = make_example(model, make_batch())
    together = model(example)
    assert together.keys() == model.loss_weights.keys() == example.counts.keys()
    parts = [model(alone(example, row)) for row in range(len(example.batch))]
    for name, loss in together.items():
        assert loss > 0
        torch.testing.assert_close(loss, sum(part[name] for part in parts), **CLOSE)


@every_model
def test_counts_are_what_is_summed(kind: str) -> None:
    """With every label's loss at log V, and every length's at log (classes), sums show counts."""
    model = make_model(kind)
    example = make_example(model, make_batch())
    with torch.no_grad():
        model.target_embedding.tokens.weight.zero_()
        if "length" in example.counts:
            model.length.output.weight.zero_()
            model.length.output.bias.zero_()
    losses = model(example)
    tokens = losses["token"] / torch.tensor(float(VOCABULARY)).log()
    torch.testing.assert_close(tokens, example.counts["token"].float(), **CLOSE)
    assert example.counts["token"] == (example.labels != PAD).sum()
    if "length" in example.counts:
        assert example.counts["length"] == len(example.batch)


@every_model
@pytest.mark.parametrize("garbage", [PAD, MASK, 7])
def test_padding_and_what_it_holds_change_no_loss(kind: str, garbage: int) -> None:
    model = make_model(kind)
    example = make_example(model, make_batch())
    for name, loss in model(widened(example, garbage, garbage)).items():
        torch.testing.assert_close(loss, model(example)[name], **CLOSE)


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_no_loss_and_zero_gradients(kind: str, training: bool) -> None:
    """A worker without a sentence takes part in the update all the same."""
    model = make_model(kind, dropout=0.1).train(training)
    example = make_example(model, make_batch(()))
    losses = model(example)
    for name, loss in losses.items():
        assert loss == 0 and example.counts[name] == 0
    total(losses, model).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and not gradient.any(), name


@every_model
def test_gradients_reach_every_parameter(kind: str) -> None:
    model = make_model(kind).train()
    total(model(make_example(model, make_batch())), model).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


@every_model
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_the_formula_and_for_training_only(kind: str, smoothing: float) -> None:
    model = make_model(kind, label_smoothing=smoothing)
    example = make_example(model, make_batch())
    log_probs = model.logits(states_of(model, example)).double().log_softmax(-1)
    plain = smoothed = torch.zeros((), dtype=torch.float64)
    for row, column in (example.labels != PAD).nonzero().tolist():
        nll = -log_probs[row, column, example.labels[row, column]]
        uniform = -log_probs[row, column].mean()
        plain = plain + nll
        smoothed = smoothed + (1 - smoothing) * nll + smoothing * uniform
    torch.testing.assert_close(model(example)["token"], plain.float(), **CLOSE)
    torch.testing.assert_close(model.train()(example)["token"], smoothed.float(), **CLOSE)


@every_model
def test_half_precision_training_is_close_to_single_precision(kind: str) -> None:
    model = make_model(kind).train()
    example = make_example(model, make_batch())
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = model(example)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        total(losses, model).backward()
        results.append((losses, {n: g.clone() for n, g in gradients(model).items()}))
    (losses, exact), (half_losses, half) = results
    for name, loss in losses.items():
        # Eight bits of mantissa through a whole model.
        torch.testing.assert_close(half_losses[name], loss, rtol=0.05, atol=0.05)
    flat, half_flat = (torch.cat([g.flatten() for g in x.values()]) for x in (exact, half))
    assert torch.cosine_similarity(flat, half_flat, dim=0) > 0.98


@every_model
def test_noise_is_the_generators(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    state = torch.random.get_rng_state()
    first, again = make_example(model, batch), make_example(model, batch)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.labels, again.labels)
    assert torch.equal(torch.random.get_rng_state(), state)
