from __future__ import annotations

import math

import pytest
import torch
from small_models import SIZES
from torch import nn

from pynar.decoding import strategy
from pynar.models import MODELS, build
from pynar.recipes import load_recipe, recipe_names
from pynar.strict import from_dict
from pynar.training.config import TrainingConfig


@pytest.mark.parametrize(
    "model,changes,words",
    [
        ("cmlm", {"norm": "rms"}, "`norm` must be one of pre, post, got 'rms'"),
        ("cmlm", {"positions": "rope"}, "`positions` must be one of sinusoidal, learned"),
        ("cmlm", {"positions": "none"}, "`positions` must be sinusoidal or learned, got 'none'"),
        ("flowseq", {"positions": "none"}, "`positions` must be sinusoidal or learned, got 'none'"),
        ("cmlm", {"activation": "tanh"}, "`activation` must be one of relu, gelu"),
        ("cmlm", {"init": "zero"}, "`init` must be one of xavier, bert"),
        ("cmlm", {"length_kind": "ratio"}, "`length_kind` must be one of absolute, difference"),
        ("nat", {"decoder_input": "noise"}, "`decoder_input` must be one of copy, mask"),
        ("autoregressive", {"heads": 3}, r"`dim` must be a multiple of `heads` \(3\), got 8"),
        ("autoregressive", {"heads": 0}, "`heads` must be positive, got 0"),
        ("autoregressive", {"decoder_layers": 0}, "`decoder_layers` must be positive, got 0"),
        ("autoregressive", {"max_length": -1}, "`max_length` must be positive, got -1"),
        ("autoregressive", {"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ("autoregressive", {"label_smoothing": -0.1}, r"`label_smoothing` must be in \[0, 1\)"),
        ("autoregressive", {"target_vocabulary": 14}, "`share_embeddings` needs one vocabulary"),
        ("autoregressive", {"source_vocabulary": 4}, "`source_vocabulary` must count the 5"),
        ("cmlm", {"length_classes": 0}, "`length_classes` must be positive, got 0"),
        ("cmlm", {"length_weight": -1.0}, "`length_weight` must not be negative, got -1.0"),
        ("cmlm", {"dim": 8.5}, "`dim` must be an integer, got 8.5"),
        ("cmlm", {"layers": 6}, "unknown key `layers`.*the known ones are source_vocabulary"),
        ("nat", {"decoder_inputs": "copy"}, "did you mean `decoder_input`"),
        ("autoregressive", {"length_kind": "absolute"}, "unknown key `length_kind`"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(model: str, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build({"model": model, **SIZES, **changes})


@pytest.mark.parametrize("name", [None, "transformer"])
def test_an_unknown_model_is_refused_with_the_known_ones(name: str | None) -> None:
    fields = SIZES if name is None else {"model": name, **SIZES}
    with pytest.raises(ValueError, match="one of autoregressive, cmlm, flowseq, janus, nat, got"):
        build(fields)


def test_a_vocabulary_must_be_given() -> None:
    with pytest.raises(ValueError, match="missing key `source_vocabulary`"):
        build({"model": "cmlm"})


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_as_asked_and_the_request_is_left_alone(name: str) -> None:
    request = {"model": name, **SIZES}
    model = build(request)
    assert type(model) is MODELS[name] and model.config.decoder_layers == 2
    assert request == {"model": name, **SIZES}


def test_shared_embeddings_are_one_matrix_and_separate_ones_two() -> None:
    shared = build({"model": "cmlm", **SIZES})
    assert shared.source_embedding.tokens is shared.target_embedding.tokens
    separate = build({"model": "cmlm", **SIZES, "source_vocabulary": 20, "share_embeddings": False})
    assert separate.source_embedding.tokens.weight.shape == (20, 8)
    assert separate.target_embedding.tokens.weight.shape == (13, 8)
    assert separate.logits(torch.zeros(2, 8)).shape == (2, 13)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_model_training_run_and_strategy(name: str) -> None:
    recipe = load_recipe(name)
    vocabulary = {"source_vocabulary": 20, "target_vocabulary": 20}
    with torch.device("meta"):  # the largest has 200 M parameters
        model = build({**vocabulary, **recipe.model})
    from_dict(TrainingConfig, recipe.training)
    options = dict(recipe.validation)
    strategy(model, options.pop("strategy", None), options)
    assert recipe.description


WIDE = {**SIZES, "source_vocabulary": 200, "target_vocabulary": 200, "dim": 64, "ffn_dim": 128}


def standard_deviation_is(weight: torch.Tensor, expected: float) -> None:
    """Within five standard errors, of the mean and of the deviation, for a normal sample."""
    error = expected / math.sqrt(weight.numel())
    assert abs(weight.mean()) < 5 * error
    assert abs(weight.std() - expected) < 5 * error


def kinds(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_bert_initialisation_is_normal_of_a_fiftieth(name: str, positions: str) -> None:
    model = build({"model": name, **WIDE, "init": "bert", "positions": positions})
    for module in (*kinds(model, nn.Linear).values(), *kinds(model, nn.Embedding).values()):
        live = module.weight if isinstance(module, nn.Linear) else module.weight[1:]
        standard_deviation_is(live, 0.02)
    check_the_rest(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_xavier_initialisation_is_uniform_within_its_bound(name: str, positions: str) -> None:
    model = build({"model": name, **WIDE, "positions": positions})
    for module in kinds(model, nn.Linear).values():
        bound = math.sqrt(6 / sum(module.weight.shape))
        assert 0.97 * bound < module.weight.abs().max() <= bound
        standard_deviation_is(module.weight, bound / math.sqrt(3))
    for embedding in (model.source_embedding, model.target_embedding):
        # Scaled by sqrt(64), tokens have unit variance: so have the positions beside them.
        standard_deviation_is(embedding.tokens.weight[1:], 1 / 8)
        if embedding.learned is not None:
            standard_deviation_is(embedding.learned.weight, 1.0)
    check_the_rest(model)


def check_the_rest(model: nn.Module) -> None:
    assert not any(module.bias.any() for module in kinds(model, nn.Linear).values())
    for norm in kinds(model, nn.LayerNorm).values():
        assert (norm.weight == 1).all() and not norm.bias.any()
    assert not model.source_embedding.tokens.weight[0].any()
    assert not model.target_embedding.tokens.weight[0].any()
