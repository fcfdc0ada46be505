from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.attention import padding_mask
from pynar.nn.transformer import Decoder, DecoderCache, Encoder, Memory
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)
HABITS = [("pre", "relu"), ("post", "relu"), ("post", "gelu")]


def make(kind: type, layers: int = 2, *, norm: str = "pre", activation: str = "relu"):
    module = kind(layers, 8, 12, 2, dropout=0.0, norm=norm, activation=activation)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


def make_memory(decoder: Decoder, lengths: Tensor) -> Memory:
    states = torch.randn(len(lengths), int(lengths.max()), 8)
    return Memory(states, torch.randn_like(states), lengths, decoder.project(states))


def attend(x: Tensor, memory: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Two heads of plain attention; `q`, `k`, `v` are (weight, bias)."""
    q, k, v = (F.linear(h, *wb) for h, wb in ((x, q), (memory, k), (memory, v)))
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 2.0
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[..., part])
    return torch.cat(heads, -1)


def stack_by_hand(module, x: Tensor, mask: Tensor, memory=None, memory_mask=None) -> Tensor:
    """Vaswani et al. 2017, figure 1, from the module's weights."""

    def parts(layer: nn.Linear, n: int):
        return list(zip(layer.weight.chunk(n), layer.bias.chunk(n), strict=True))

    first = isinstance(module.norm, nn.LayerNorm)
    for layer in module.layers:
        own = layer.self_attention
        sublayers = [lambda h, own=own: own.output(attend(h, h, *parts(own.qkv, 3), mask))]
        if memory is not None:
            cross = layer.cross_attention

            def look(h: Tensor, cross=cross) -> Tensor:
                q, (k, v) = (cross.query.weight, cross.query.bias), parts(cross.key_value, 2)
                return cross.output(attend(h, memory, q, k, v, memory_mask))

            sublayers.append(look)
        ffn = layer.feed_forward
        sublayers.append(lambda h, ffn=ffn: ffn.outer(ffn.activation(ffn.inner(h))))
        for sublayer, residual in zip(sublayers, layer.residual, strict=True):
            norm = residual.norm
            x = x + sublayer(norm(x)) if first else norm(x + sublayer(x))
    return module.norm(x)


@pytest.mark.parametrize("norm,activation", HABITS)
def test_encoder_is_the_paper(norm: str, activation: str) -> None:
    encoder, lengths = make(Encoder, norm=norm, activation=activation), torch.tensor([5, 2])
    x = torch.randn(2, 5, 8)
    live = padding_mask(lengths, 5)[:, 0]
    y, expected = encoder(x, lengths), stack_by_hand(encoder, x, live)
    torch.testing.assert_close(y, expected, **CLOSE)


@pytest.mark.parametrize("norm,activation", HABITS)
@pytest.mark.parametrize("causal", [False, True])
def test_decoder_is_the_paper(norm: str, activation: str, causal: bool) -> None:
    decoder = make(Decoder, norm=norm, activation=activation)
    memory = make_memory(decoder, torch.tensor([3, 6]))
    x, lengths = torch.randn(2, 5, 8), torch.tensor([5, 2])
    mask = torch.ones(5, 5).tril().bool() if causal else padding_mask(lengths, 5)[:, 0]
    y = decoder(x, memory, None if causal else lengths)
    expected = stack_by_hand(decoder, x, mask, memory.states, memory.mask[:, 0])
    torch.testing.assert_close(y, expected, **CLOSE)


def test_pre_norm_has_a_last_normalisation_and_post_norm_has_none() -> None:
    x, lengths = torch.randn(1, 4, 8), torch.tensor([4])
    pre, post = make(Encoder, norm="pre"), make(Encoder, norm="post")
    nn.init.zeros_(pre.norm.weight)
    nn.init.constant_(pre.norm.bias, 0.5)
    torch.testing.assert_close(pre(x, lengths), torch.full((1, 4, 8), 0.5))
    assert not list(post.norm.parameters())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_stepwise_decoding_is_the_causal_pass_beyond_the_first_capacity(norm: str) -> None:
    decoder = make(Decoder, norm=norm)
    memory = make_memory(decoder, torch.tensor([3, 6]))
    x = torch.randn(2, 37, 8)
    cache = decoder.cache(2, memory.states)
    with torch.no_grad():
        steps = [decoder.step(x[:, t : t + 1], memory, cache) for t in range(37)]
        assert cache.position == 37
        torch.testing.assert_close(torch.cat(steps, 1), decoder(x, memory), **CLOSE)


def test_rows_of_a_cache_can_be_dropped_reordered_and_repeated() -> None:
    decoder = make(Decoder)
    memory = make_memory(decoder, torch.tensor([3, 6, 2]))
    x, order = torch.randn(3, 4, 8), torch.tensor([2, 0, 2])
    cache = decoder.cache(3, memory.states)
    with torch.no_grad():
        for t in range(3):
            decoder.step(x[:, t : t + 1], memory, cache)
        cache.select(order)
        y = decoder.step(x[order, 3:], memory.select(order), cache)
        torch.testing.assert_close(y, decoder(x, memory)[order, 3:], **CLOSE)


def test_the_capacity_of_a_cache_doubles() -> None:
    cache = DecoderCache(1, 2, 2, 8, torch.zeros(()))
    capacities = set()
    for cache.position in range(70):
        cache.reserve()
        capacities.add(cache.data.shape[-2])
        assert cache.data.shape[-2] > cache.position
    assert capacities == {16, 32, 64, 128}


@pytest.mark.parametrize("candidates", [1, 3])
def test_candidates_of_a_sentence_decode_as_if_alone(candidates: int) -> None:
    decoder = make(Decoder)
    memory = make_memory(decoder, torch.tensor([3, 6]))
    x, lengths = torch.randn(2 * candidates, 5, 8), torch.randint(1, 6, (2 * candidates,))
    y = decoder(x, memory, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = memory.select(torch.tensor([row // candidates]))
        alone = decoder(x[row : row + 1, :length], own, lengths[row : row + 1])
        torch.testing.assert_close(y[row : row + 1, :length], alone, **CLOSE)


def test_a_selected_memory_is_that_of_its_sentences() -> None:
    decoder = make(Decoder)
    memory, order = make_memory(decoder, torch.tensor([3, 6, 2])), torch.tensor([2, 0])
    part = memory.select(order)
    torch.testing.assert_close(part.states, memory.states[order])
    torch.testing.assert_close(part.embedded, memory.embedded[order])
    torch.testing.assert_close(part.mask, memory.mask[order])
    torch.testing.assert_close(part.keys_values, decoder.project(memory.states[order]), **CLOSE)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_dropout_acts_in_every_sublayer(norm: str) -> None:
    """With almost everything dropped, a sub-layer adds nothing: pre-norm then keeps its input."""
    encoder = Encoder(2, 8, 12, 2, dropout=0.999999, norm=norm, activation="relu").train()
    x = torch.randn(2, 4, 8)
    expected = F.layer_norm(x, [8])
    torch.testing.assert_close(encoder(x, torch.tensor([4, 4])), expected, rtol=1e-4, atol=1e-4)
