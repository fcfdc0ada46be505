from __future__ import annotations

import math

import pytest
import torch

from pynar.nn.embedding import Embedding, sinusoids
from pynar.symbols import PAD


@pytest.mark.parametrize("dim", [2, 4, 7, 16, 33])
def test_sinusoids_are_the_formula(dim: int) -> None:
    half = dim // 2
    expected = torch.zeros(130, dim, dtype=torch.float64)
    for t in range(130):
        for k in range(half):
            angle = t * math.exp(-k * math.log(10000) / max(half - 1, 1))
            expected[t, k], expected[t, half + k] = math.sin(angle), math.cos(angle)
    # The angle, up to 130, is rounded to single precision.
    torch.testing.assert_close(sinusoids(130, dim), expected.float(), rtol=0, atol=2e-5)


def test_tokens_are_scaled_and_positions_added() -> None:
    layer = Embedding(9, 16, positions="sinusoidal", max_length=32)
    tokens = torch.randint(0, 9, (2, 7))
    expected = 4 * layer.tokens.weight[tokens] + sinusoids(12, 16)[5:]
    torch.testing.assert_close(layer(tokens, start=5), expected)
    torch.testing.assert_close(layer.embed(tokens), 4 * layer.tokens.weight[tokens])


@pytest.mark.parametrize("length", [0, 7, 40])
def test_without_positions_only_tokens_are_left(length: int) -> None:
    layer = Embedding(9, 16, positions="none", max_length=32)
    tokens = torch.randint(0, 9, (2, length))
    assert torch.equal(layer(tokens, start=5), layer.embed(tokens))


def test_the_sum_is_normalised_and_the_scale_left_out_where_asked() -> None:
    layer = Embedding(9, 16, positions="learned", max_length=32, scale=False, norm=True)
    torch.nn.init.normal_(layer.norm.weight)
    tokens = torch.randint(0, 9, (2, 7))
    assert torch.equal(layer.embed(tokens), layer.tokens.weight[tokens])
    x = layer.tokens.weight[tokens] + layer.learned.weight[5:12]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(tokens, start=5), x * layer.norm.weight + layer.norm.bias)


def test_padding_embeds_to_nothing_and_learns_nothing() -> None:
    layer = Embedding(9, 8, positions="learned", max_length=4)
    layer.embed(torch.tensor([[5, PAD]])).sum().backward()
    assert not layer.tokens.weight[PAD].any() and not layer.tokens.weight.grad[PAD].any()
    assert layer.tokens.weight.grad[5].all()


@pytest.mark.parametrize("stop", [5, 8, 9, 40])
def test_sinusoids_grow_with_the_sentence(stop: int) -> None:
    layer = Embedding(9, 16, positions="sinusoidal", max_length=4)
    torch.testing.assert_close(layer.positions(0, stop), sinusoids(stop, 16), rtol=0, atol=0)
    torch.testing.assert_close(layer.positions(2, stop), sinusoids(stop, 16)[2:], rtol=0, atol=0)


def test_positions_that_grew_while_decoding_can_be_trained_with() -> None:
    layer = Embedding(9, 16, positions="sinusoidal", max_length=4)
    with torch.inference_mode():
        layer.positions(0, 7)
    assert not layer.table.is_inference()
    layer(torch.full((1, 7), 5)).square().sum().backward()
    layer.table.copy_(layer.table.clone())  # as data-parallel training does with buffers


def test_positions_that_grow_keep_the_type() -> None:
    layer = Embedding(9, 16, positions="sinusoidal", max_length=4).bfloat16()
    assert layer.positions(0, 9).dtype == torch.bfloat16


def test_sinusoids_are_not_saved() -> None:
    assert set(Embedding(9, 8, positions="sinusoidal", max_length=4).state_dict()) == {
        "tokens.weight"
    }


def test_learned_positions_end_with_an_error_that_says_what_to_do() -> None:
    layer = Embedding(9, 8, positions="learned", max_length=4)
    torch.testing.assert_close(layer.positions(1, 4), layer.learned.weight[1:4])
    with pytest.raises(ValueError, match="5 tokens is longer than the model's 4 learned positions"):
        layer.positions(4, 5)
