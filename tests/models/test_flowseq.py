"""FlowSeq's objective against torch.distributions, and its phases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import make_batch
from torch import Tensor
from torch.distributions import Normal

from pynar import checkpoint
from pynar.data.batching import Batch, collate
from pynar.models import FlowSeq, build
from pynar.models.flowseq import FlowSeqExample, fill_with_eos
from pynar.nn.flows import ActNormLinear, Coupling
from pynar.symbols import EOS, PAD

SIZES = {
    "source_vocabulary": 13,
    "target_vocabulary": 13,
    "dim": 16,
    "ffn_dim": 12,
    "heads": 2,
    "encoder_layers": 1,
    "posterior_layers": 1,
    "decoder_layers": 1,
    "flow_steps": [1, 1, 1],
    "flow_ffn_dim": 8,
    "dropout": 0.0,
    "max_length": 64,
    "posterior_updates": 3,
    "kl_warmup_updates": 4,
}
RECURRENT = {
    "network": "rnn",
    "flow_network": "rnn",
    "positions": "none",
    "embedding_scale": False,
    "position_attention": False,
    "posterior_layers": 2,
    "latent_dropout": 0.3,
}
every_variant = pytest.mark.parametrize(
    "changes",
    [{}, {"latent_attention": False}, RECURRENT],
    ids=["transformer", "latents in place", "rnn"],
)


def make_model(**changes: Any) -> FlowSeq:
    torch.manual_seed(0)
    model = build({"model": "flowseq", **SIZES, **changes})
    assert isinstance(model, FlowSeq)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def make_example(model: FlowSeq, batch: Batch) -> FlowSeqExample:
    example = model.corrupt(batch, torch.Generator().manual_seed(2))
    return dataclasses.replace(example, noise=example.noise.double())


def alone(example: FlowSeqExample, row: int) -> FlowSeqExample:
    batch, one = example.batch, slice(row, row + 1)
    source, target = int(batch.source_lengths[row]), int(batch.target_lengths[row])
    width = slice(0, int(example.lengths[row]))
    part = Batch(
        batch.source[one, :source],
        batch.source_lengths[one],
        batch.target[one, :target],
        batch.target_lengths[one],
        batch.indices[one],
    )
    tokens = example.inputs[one, width]
    noise = example.noise[one, width]
    return FlowSeqExample(
        part,
        tokens,
        tokens,
        {},
        example.lengths[one],
        example.kept[one, width],
        noise,
        None if example.seen is None else example.seen[one, width],
    )


def test_targets_are_filled_to_a_multiple_by_hand() -> None:
    target = torch.tensor([[7, 8, 9, 10, 11], [7, 8, 9, 10, PAD], [PAD] * 5])
    tokens, lengths = fill_with_eos(target, torch.tensor([5, 4, 0]), 4)
    assert lengths.tolist() == [8, 4, 4]
    assert tokens.tolist() == [
        [7, 8, 9, 10, 11, EOS, EOS, EOS],
        [7, 8, 9, 10, PAD, PAD, PAD, PAD],
        [EOS, EOS, EOS, EOS, PAD, PAD, PAD, PAD],
    ]


@every_variant
def test_losses_are_those_of_the_paper(changes: dict) -> None:
    model, batch = make_model(**changes), make_batch()
    example = make_example(model, batch)
    losses = model(example)
    want = {"token": 0.0, "kl": 0.0, "length": 0.0}
    for row in range(len(batch)):
        one = alone(example, row)
        memory = model.encode(one.batch.source, one.batch.source_lengths)
        posterior = model.infer(one.inputs, one.lengths, memory)
        q = Normal(posterior.mean, (posterior.log_variance / 2).exp())
        z = q.mean + q.stddev * one.noise
        noise, logdet = model.prior(
            z, one.lengths, model.prior.project(memory.states), memory.lengths
        )
        log_p = Normal(0.0, 1.0).log_prob(noise).sum() + logdet[0]
        want["kl"] += (q.log_prob(z).sum() - log_p).item()
        logits = model.logits(model.decode_latent(z, one.lengths, memory))
        want["token"] += F.cross_entropy(logits[0], one.labels[0], reduction="sum").item()
        log_probs = model.length(memory.states, memory.lengths)[0]
        # Lengths S - 20 ... S + 20, of which only multiples of 4 are possible.
        index = int(one.lengths[0]) - (int(memory.lengths[0]) - 20)
        assert log_probs.isfinite().nonzero().flatten().tolist() == [
            i for i in range(41) if (n := int(memory.lengths[0]) - 20 + i) > 0 and n % 4 == 0
        ]
        want["length"] -= log_probs[index].item()
    for term, value in want.items():
        torch.testing.assert_close(losses[term].item(), value, msg=term)
    live = int(example.lengths.sum())
    assert {k: int(v) for k, v in example.counts.items()} == {
        "token": live,
        "kl": live,
        "length": len(batch),
    }


def test_what_a_validation_logs() -> None:
    model, batch = make_model(), make_batch()
    example = make_example(model, batch)
    found, losses = model.diagnose(example), model(example)
    steps = int(example.lengths.sum())
    assert found["kl_token"] == pytest.approx(losses["kl"].item() / steps)
    stds, means, logdet = [], [], 0.0
    prior = {"prior_token": 0.0, "prior_sample_token": 0.0}
    for row in range(len(batch)):
        one = alone(example, row)
        memory = model.encode(one.batch.source, one.batch.source_lengths)
        posterior = model.infer(one.inputs, one.lengths, memory)
        stds.append((posterior.log_variance / 2).exp().flatten())
        means.append(posterior.mean[0])
        z = posterior.sample(one.noise)
        logdet += (model.log_prior(z, one.lengths, memory)).item()
        keys_values = model.prior.project(memory.states)
        drawn, _ = model.prior(z, one.lengths, keys_values, memory.lengths)
        logdet += 0.5 * drawn.square().sum().item()
        for term, noise in (
            ("prior_token", torch.zeros_like(z)),
            ("prior_sample_token", one.noise),
        ):
            drawn, _ = model.prior(noise, one.lengths, keys_values, memory.lengths, inverse=True)
            logits = model.logits(model.decode_latent(drawn, one.lengths, memory))
            prior[term] += F.cross_entropy(logits[0], one.labels[0], reduction="sum").item()
    assert found["posterior_std"] == pytest.approx(torch.cat(stds).mean().item())
    spread = torch.cat(means).std(0, correction=0).mean().item()
    assert found["posterior_mean_std"] == pytest.approx(spread)
    for term, total in prior.items():
        assert found[term] == pytest.approx(total / steps), term
    assert found["posterior_token"] == pytest.approx(losses["token"].item() / steps)
    levels = [found[f"logdet_{i}"] for i in range(3)]
    assert sum(levels) == pytest.approx(logdet / steps) and 0.0 not in levels


@every_variant
def test_the_score_of_a_sample_is_that_of_encoding_it_again(changes: dict) -> None:
    model, batch = make_model(**changes), make_batch()
    example = make_example(model, batch)
    memory = model.encode(batch.source, batch.source_lengths)
    z, score = model.sample_prior(example.noise, example.lengths, memory)
    torch.testing.assert_close(model.log_prior(z, example.lengths, memory), score)


@every_variant
def test_neither_inverses_nor_log_determinants_are_saved(changes: dict, tmp_path: Path) -> None:
    """What is saved are the parameters, of a linear map of the flow its matrix and its actnorm."""
    model = make_model(**changes).float()
    names = dict(model.named_parameters(remove_duplicate=False)).keys()
    assert model.state_dict().keys() == names
    linears = [m for m in model.prior.modules() if isinstance(m, ActNormLinear)]
    own = {"log_scale": (16,), "bias": (16,), "weight": (16, 16)}
    assert all({k: v.shape for k, v in m.named_parameters()} == own for m in linears)
    checkpoint.save(tmp_path / "saved", model, None)
    assert checkpoint.load_weights(tmp_path / "saved").keys() == names


@every_variant
def test_what_is_frozen_has_the_factors_of_its_weights(changes: dict) -> None:
    """Not those of an earlier copy."""
    model, batch = make_model(**changes).float(), make_batch()
    model.freeze()
    linears = [m for m in model.prior.modules() if isinstance(m, ActNormLinear)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.add_(0.1 * torch.randn_like(linear.weight))
    frozen = model.freeze()
    if frozen._factors is not None:
        matrices = torch.stack([linear.weight.detach() for linear in linears])
        wanted = torch.linalg.slogdet(matrices)[1], torch.linalg.inv(matrices)
        torch.testing.assert_close(frozen._factors, wanted, rtol=1e-3, atol=1e-4)
    example = make_example(model, batch)
    with torch.inference_mode():
        memories = [one.encode(batch.source, batch.source_lengths) for one in (model, frozen)]
        noise = example.noise.float()
        z, score = frozen.sample_prior(noise, example.lengths, memories[1])
        again = model.log_prior(z, example.lengths, memories[0])
    torch.testing.assert_close(again, score, rtol=1e-3, atol=1e-2)


@every_variant
def test_autocast_comes_close_to_fp32(changes: dict) -> None:
    model, batch = make_model(**changes).float().train(), make_batch()
    example = model.corrupt(batch, torch.Generator().manual_seed(2))
    want = model(example)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(example)
    for term, value in want.items():
        torch.testing.assert_close(found[term].float(), value, rtol=0.02, atol=0, msg=term)
    torch.stack([value.float() for value in found.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_variant
def test_converted_to_few_bits_a_sample_keeps_its_score(changes: dict) -> None:
    """What freezing on a GPU does, on the CPU."""
    model, batch = make_model(**changes).float(), make_batch()
    few_bits = model._converted(torch.bfloat16)
    few_bits._factors = model.prior.factors()
    example = make_example(model, batch)
    scores = []
    for one in (model, few_bits):
        memory = one.encode(batch.source, batch.source_lengths)
        z, score = one.sample_prior(example.noise.float(), example.lengths, memory)
        assert z.dtype == torch.float32
        assert one.decode_latent(z, example.lengths, memory).isfinite().all()
        again = one.log_prior(z, example.lengths, memory)
        torch.testing.assert_close(again, score, rtol=1e-4, atol=1e-2)
        scores.append(score)
    torch.testing.assert_close(scores[1], scores[0], rtol=0.02, atol=0.5)


def test_latent_variables_are_hidden_from_the_decoder_whole() -> None:
    model, batch = make_model(**RECURRENT), make_batch()
    example = make_example(model, batch)
    assert 0 < (example.seen & (example.labels != PAD)).sum() < (example.labels != PAD).sum()
    memory = model.encode(batch.source, batch.source_lengths)
    shown: list[Tensor] = []
    decode = model.decode_latent

    def watch(z: Tensor, *rest: Any) -> Tensor:
        shown.append(z)
        return decode(z, *rest)

    model.decode_latent = watch  # type: ignore[method-assign]
    z = model.infer(example.inputs, example.lengths, memory, example.kept).sample(example.noise)
    model.train()(example)
    torch.testing.assert_close(shown[0], z * example.seen[..., None] / 0.7)
    # Hidden in training alone.
    model.eval()(example)
    z = model.infer(example.inputs, example.lengths, memory).sample(example.noise)
    torch.testing.assert_close(shown[1], z)


def test_tokens_are_hidden_from_the_posterior_whole() -> None:
    model, batch = make_model(), make_batch()
    example = make_example(model, batch)
    memory = model.encode(batch.source, batch.source_lengths)
    other = torch.where(example.inputs > EOS, 6, example.inputs)
    none = torch.zeros_like(example.kept)

    def mean(tokens: Tensor, kept: Tensor | None) -> Tensor:
        return model.infer(tokens, example.lengths, memory, kept).mean

    torch.testing.assert_close(mean(example.inputs, none), mean(other, none))
    assert not torch.allclose(mean(example.inputs, None), mean(other, None))
    one = none.clone()
    one[0, 1] = True
    assert not torch.allclose(mean(example.inputs, one), mean(example.inputs, none))
    # Hidden in training alone.
    hidden = dataclasses.replace(example, kept=none)
    torch.testing.assert_close(model(hidden)["kl"], model(example)["kl"])
    model.train()
    assert not torch.allclose(model(hidden)["kl"], model(example)["kl"])


@every_variant
def test_the_prior_takes_part_after_the_first_phase(changes: dict) -> None:
    model = make_model(**changes).train()
    weights = [model.weights_at(update)["kl"] for update in (1, 3, 4, 5, 7, 8, 100)]
    assert weights == [0, 0, 0.25, 0.5, 1, 1, 1]
    batch = make_batch()
    generator = torch.Generator()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        sum(model(make_example(model, batch)).values()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert not model.begin_update(2, batch, generator)
    found = gradients()
    assert all(grad is not None for grad in found.values())
    assert not any(grad.any() for name, grad in found.items() if name.startswith("prior."))
    before = model.prior.state_dict()["key_value_weight"].clone()
    coupling = next(m for m in model.prior.modules() if isinstance(m, Coupling))
    assert coupling.net.output.gain.any()
    model.float()  # as the noise that is drawn
    assert model.begin_update(4, batch, generator) and model.training
    assert not coupling.net.output.gain.any()
    torch.testing.assert_close(model.prior.key_value_weight.double(), before, rtol=1e-6, atol=1e-6)
    model.double()
    found = gradients()
    gains = [g for name, g in found.items() if name.endswith("output.gain") and "prior" in name]
    assert gains and all(g.any() for g in gains)
    assert not model.begin_update(5, batch, generator)


def test_latents_in_place_are_without_effect_in_the_beginning_alone() -> None:
    torch.manual_seed(0)
    model = build({"model": "flowseq", **SIZES, "latent_attention": False}).train()
    batch = make_batch()
    example = model.corrupt(batch, torch.Generator().manual_seed(2))
    memory = model.encode(batch.source, batch.source_lengths)
    states = [
        model.decode_latent(z, example.lengths, memory) for z in (example.noise, -3 * example.noise)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    model(example)["token"].backward()
    assert model.gather.value.weight.grad.any()


@pytest.mark.parametrize("std", [0.0, 0.05])
@every_variant
def test_how_the_posterior_begins(changes: dict, std: float) -> None:
    torch.manual_seed(0)
    model = build({"model": "flowseq", **SIZES, **changes, "posterior_std": std}).train()
    batch = collate([([6, 7, 8] * 3, [9, 10, 11, 12])] * 40, range(40))
    generator = torch.Generator().manual_seed(0)
    assert model.begin_update(1, batch, generator) == (std > 0)
    model.eval()
    example = model.corrupt(batch, generator)
    memory = model.encode(batch.source, batch.source_lengths)
    posterior = model.infer(example.inputs, example.lengths, memory)
    for head in (posterior.mean, posterior.log_variance):
        rows = head[0] if std else head
        if std:
            torch.testing.assert_close(rows.std(0, correction=0), torch.full((16,), std))
        else:
            assert not rows.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow_steps": [1, 0]}, "`flow_steps`"),
        ({"posterior_layers": 0}, "`posterior_layers`"),
        ({"token_dropout": 1.0}, "`token_dropout`"),
        ({"flow_transform": "cubic"}, "`flow_transform` must be one of affine, additive, nlsq"),
        ({"latent_dropout": -0.1}, "`latent_dropout`"),
        ({"network": "cnn"}, "`network` must be one of transformer, rnn, got 'cnn'"),
        ({"flow_network": "cnn"}, "`flow_network` must be one of attention, rnn, got 'cnn'"),
        ({"network": "rnn", "ffn_dim": 13}, "`ffn_dim` must be even"),
        ({"flow_network": "rnn", "flow_ffn_dim": 9}, "`flow_ffn_dim` must be even"),
        ({"positions": "learned", "max_length": 3}, "`max_length` must be at least 4, .* got 3"),
        ({"length_classes": 6}, "`length_classes` must be at least 7, .* of 4 .*, got 6"),
        ({"length_classes": 3, "length_kind": "absolute"}, "at least 4, .* absolute.*, got 3"),
        ({"dim": 12, "heads": 2}, "multiple of 8"),
        ({"kl_warmup_updates": -1}, "`kl_warmup_updates`"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**change)
