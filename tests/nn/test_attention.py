from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pynar.nn.attention import CrossAttention, SelfAttention, padding_mask
from pynar.testing import tolerance

CLOSE = tolerance("cpu", torch.float32)


def one_query(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one query and one head, in float64."""
    scores = torch.stack([(q * k).sum() for k in keys]) / len(q) ** 0.5
    return (scores.softmax(0)[:, None] * values).sum(0)


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int, visible) -> Tensor:
    """`q: [T, C]`, `k, v: [S, C]`; `visible(t)` are the keys that query t sees."""
    rows = []
    for t, row in enumerate(q):
        parts = [part.chunk(heads, -1) for part in (row, k[visible(t)], v[visible(t)])]
        rows.append(torch.cat([one_query(*(part[h] for part in parts)) for h in range(heads)]))
    return torch.stack(rows)


def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    return x.double() @ layer.weight.double().T + layer.bias.double()


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_the_formula(heads: int, causal: bool) -> None:
    layer, x = SelfAttention(8, heads), torch.randn(3, 7, 8)
    lengths = torch.tensor([7, 1, 4])
    mask = None if causal else padding_mask(lengths, 7)
    y = layer(x, mask, causal=causal)
    for b, length in enumerate(lengths.tolist()):
        q, k, v = linear(x[b], layer.qkv).chunk(3, -1)

        def visible(t: int, length: int = length) -> slice:
            return slice(t + 1 if causal else length)

        expected = linear(attention_by_hand(q, k, v, heads, visible), layer.output)
        torch.testing.assert_close(y[b], expected.float(), **CLOSE)


def test_stepwise_self_attention_is_the_causal_one() -> None:
    layer, x = SelfAttention(8, 2), torch.randn(3, 5, 8)
    cache = torch.empty(3, 2, 2, 6, 4)  # poisoned: nothing unwritten may be read
    with torch.no_grad():
        steps = [layer.step(x[:, t : t + 1], cache, t) for t in range(5)]
        torch.testing.assert_close(torch.cat(steps, 1), layer(x, causal=True), **CLOSE)


def test_cross_attention_is_the_formula() -> None:
    layer, x, memory = CrossAttention(8, 2), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    lengths = torch.tensor([5, 2])
    y = layer(x, layer.project(memory), padding_mask(lengths, 5))
    for b, length in enumerate(lengths.tolist()):
        k, v = linear(memory[b], layer.key_value).chunk(2, -1)
        attended = attention_by_hand(
            linear(x[b], layer.query), k, v, 2, lambda t, length=length: slice(length)
        )
        torch.testing.assert_close(y[b], linear(attended, layer.output).float(), **CLOSE)


@pytest.mark.parametrize("candidates", [1, 3])
def test_candidates_share_a_memory_as_if_each_had_its_own(candidates: int) -> None:
    layer, memory = CrossAttention(8, 2), torch.randn(3, 5, 8)
    x, lengths = torch.randn(3 * candidates, 4, 8), torch.tensor([5, 1, 3])
    shared = layer(x, layer.project(memory), padding_mask(lengths, 5))
    repeated = layer(
        x,
        layer.project(memory.repeat_interleave(candidates, 0)),
        padding_mask(lengths.repeat_interleave(candidates), 5),
    )
    torch.testing.assert_close(shared, repeated, **CLOSE)


def test_masked_keys_are_never_read() -> None:
    own, cross = SelfAttention(8, 2), CrossAttention(8, 2)
    lengths = torch.tensor([2, 4])
    mask = padding_mask(lengths, 5)
    x, garbage = torch.randn(2, 5, 8), 1e3 * torch.randn(2, 5, 8)
    live = mask[:, 0, 0, :, None]
    dirty = torch.where(live, x, garbage)
    clean = own(x, mask).masked_fill(~live, 0)
    torch.testing.assert_close(own(dirty, mask).masked_fill(~live, 0), clean, **CLOSE)
    queries = torch.randn(2, 3, 8)
    torch.testing.assert_close(
        cross(queries, cross.project(dirty), mask), cross(queries, cross.project(x), mask), **CLOSE
    )


def test_a_sentence_of_no_tokens_gives_numbers() -> None:
    layer, x = SelfAttention(8, 2), torch.randn(2, 3, 8, requires_grad=True)
    y = layer(x, padding_mask(torch.tensor([0, 3]), 3))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention_trains_as_single_precision_does(dtype: torch.dtype) -> None:
    layer, lengths = SelfAttention(8, 2), torch.tensor([4, 2])
    x = torch.randn(2, 4, 8)
    halves = SelfAttention(8, 2).to(dtype)
    halves.load_state_dict(layer.state_dict())
    layer.load_state_dict(halves.state_dict())  # both have the rounded weights
    results = []
    for module, to in ((layer, torch.float32), (halves, dtype)):
        given = x.to(dtype).to(to).requires_grad_()
        y = module(given, padding_mask(lengths, 4))
        assert y.dtype == to
        y.float().square().sum().backward()
        results.append((y.float(), given.grad.float(), module.qkv.weight.grad.float()))
    for single, half in zip(*results, strict=True):
        # Three rounded products in a row, then summed over the batch.
        torch.testing.assert_close(half, single, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape: tuple[int, int]) -> None:
    rows, width = shape
    own, cross = SelfAttention(8, 2), CrossAttention(8, 2)
    x = torch.randn(rows, width, 8)
    memory, lengths = torch.randn(rows, 3, 8), torch.full((rows,), 3)
    y = own(x, causal=True) + own(x, padding_mask(lengths.clamp(max=width), width))
    y = y + cross(x, cross.project(memory), padding_mask(lengths, 3))
    assert y.shape == x.shape
    y.sum().backward()
    for parameter in (*own.parameters(), *cross.parameters()):
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=0)
