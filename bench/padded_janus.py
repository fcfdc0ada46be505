"""JANUS (Liang et al. 2022) as it is usually written: padded, with masks as matrices.

An encoder pass for each direction, four padded streams, keys and values of the queries' contents
computed again, every row through the last layer, and every query through the vocabulary. The truth
for the tests of `pynar.models.JANUS`, whose weights it reads, and the other side of its benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.data.batching import Batch
from pynar.models import JANUS
from pynar.symbols import BOS, EOS, MASK, PAD

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Streams:
    """Contents and queries of one direction; masks are true where a row may attend."""

    content: Tensor  # [B, T], tokens
    content_positions: Tensor  # [B, T]
    content_mask: Tensor  # [B, 1, T, T]
    query_positions: Tensor  # [B, Q]
    query_mask: Tensor  # [B, 1, Q, T]
    rows: Tensor  # [B, Q], boolean: the live queries
    labels: Tensor  # [B, Q]
    width: int  # no position is as large

    def to(self, device: torch.device | str) -> Streams:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows), default=0)
    padded = [row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), width)


def _masks(seen: list[list[list[int]]], queries: int, keys: int) -> Tensor:
    """Padding sees everything, so that no softmax is empty; nobody reads it."""
    mask = torch.zeros(len(seen), 1, queries, keys, dtype=torch.bool)
    for b, rows in enumerate(seen):
        mask[b, 0, len(rows) :] = True
        for r, row in enumerate(rows):
            mask[b, 0, r, row] = True
    return mask


def autoregressive_streams(targets: list[list[int]], ahead: bool = False) -> Streams:
    """Content t sees 0 ... t, and so does the query at its position or, `ahead`, at the next."""
    content = _padded([[BOS, *y] for y in targets], PAD)
    positions = _padded([list(range(len(y) + 1)) for y in targets], 0)
    seen = [[list(range(t + 1)) for t in range(len(y) + 1)] for y in targets]
    mask = _masks(seen, content.shape[1], content.shape[1])
    labels = _padded([[*y, EOS] for y in targets], PAD)
    width = content.shape[1] + ahead
    return Streams(content, positions, mask, positions + ahead, mask, labels != PAD, labels, width)


def auxiliary_streams(targets: list[list[int]], masked: list[list[bool]]) -> Streams:
    """U, M and G, and a query for each masked token (rules as in the paper's figure)."""
    tokens, positions, seen, query_positions, query_seen, labels = [], [], [], [], [], []
    for y, hidden in zip(targets, masked, strict=True):
        full, flags = [BOS, *y, EOS], [False, *hidden[: len(y)], False]
        given = [p for p, flag in enumerate(flags) if not flag]
        covered = [p for p, flag in enumerate(flags) if flag]
        u, b = len(given), len(covered)
        tokens.append([full[p] for p in given] + [MASK] * b + [full[p] for p in covered])
        positions.append(given + covered + covered)
        m, g = [u + c for c in range(b)], [u + b + c for c in range(b)]
        plain = list(range(u + b))
        true = [[*range(u), *m[r + 1 :], *g[: r + 1]] for r in range(b)]
        seen.append([plain] * (u + b) + true)
        query_positions.append(covered)
        query_seen.append([[*range(u), *m[r:], *g[:r]] for r in range(b)])
        labels.append([full[p] for p in covered])
    content = _padded(tokens, PAD)
    queries = _padded(labels, PAD)
    return Streams(
        content,
        _padded(positions, 0),
        _masks(seen, content.shape[1], content.shape[1]),
        _padded(query_positions, 0),
        _masks(query_seen, queries.shape[1], content.shape[1]),
        queries != PAD,
        queries,
        max((len(y) + 2 for y in targets), default=0),
    )


def _attention(module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)

    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask)
    return module.output(y.transpose(1, 2).flatten(2))


def _self_attention(module, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    dim = x.shape[-1]
    weights, biases = module.qkv.weight.split(dim), module.qkv.bias.split(dim)
    q = F.linear(x, weights[0], biases[0])
    k, v = (F.linear(context, weights[i], biases[i]) for i in (1, 2))
    return _attention(module, q, k, v, mask)


def _residual(module, x: Tensor, sublayer) -> Tensor:
    if module.norm_first:
        return x + module.dropout(sublayer(module.norm(x)))
    return module.norm(x + module.dropout(sublayer(x)))


def _layer(layer, x: Tensor, context: Tensor, mask: Tensor, source: Heads) -> Tensor:
    first, second, third = layer.residual
    cross = layer.cross_attention
    x = _residual(first, x, lambda h: _self_attention(layer.self_attention, h, context, mask))
    x = _residual(second, x, lambda h: _attention(cross, cross.query(h), *source))
    return _residual(third, x, layer.feed_forward)


def decode(
    model: JANUS, streams: Streams, memory: Tensor, source_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The states of both streams, `[B, T, C]` and `[B, Q, C]`."""

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        embedding = model.target_embedding
        table = embedding.positions(0, streams.width)
        return model.dropout(embedding.norm(embedding.embed(tokens) + table[positions]))

    content = embed(streams.content, streams.content_positions)
    masks = torch.full_like(streams.query_positions, MASK)
    query = embed(masks, streams.query_positions)
    for layer in model.decoder.layers:
        first = layer.residual[0]
        context = first.norm(content) if first.norm_first else content
        source = (*layer.cross_attention.key_value(memory).chunk(2, -1), source_mask)
        query = _layer(layer, query, context, streams.query_mask, source)
        content = _layer(layer, content, context, streams.content_mask, source)
    return model.decoder.norm(content), model.decoder.norm(query)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """The symmetric divergence of log-probabilities `[N, V]`, summed over rows."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="sum", log_target=True)

    return (kl(p, q) + kl(q, p)) / 2


def losses(
    model: JANUS, batch: Batch, masked: Tensor, ar: Streams, aux: Streams
) -> dict[str, Tensor]:
    """The sum of every term for boolean `masked: [B, T]`."""
    lengths = batch.source_lengths
    columns = torch.arange(batch.source.shape[1], device=lengths.device)
    source_mask = (columns < lengths[:, None])[:, None, None]

    def encode() -> Tensor:
        return model.encoder(model.dropout(model.source_embedding(batch.source)), lengths)

    memory = encode()
    log_probs = {}
    _, query = decode(model, ar, memory, source_mask)
    every = model.logits(query).log_softmax(-1)
    log_probs["ar"] = every[F.pad(masked, (0, ar.rows.shape[1] - masked.shape[1]))]
    memory = encode()
    content, query = decode(model, aux, memory, source_mask)
    log_probs["nar"] = model.logits(content[aux.content == MASK]).log_softmax(-1)
    log_probs["aux"] = model.logits(query).log_softmax(-1)[aux.rows]

    smoothing = model.config.label_smoothing if model.training else 0.0

    def entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
        nll = -log_probs.gather(1, labels[:, None]).sum()
        return (1 - smoothing) * nll - smoothing * log_probs.mean(-1).sum()

    labels = aux.labels[aux.rows]
    return {
        "ar": entropy(every[ar.rows], ar.labels[ar.rows]),
        "nar": entropy(log_probs["nar"], labels),
        "aux": entropy(log_probs["aux"], labels),
        "kl_ar_nar": _divergence(log_probs["ar"], log_probs["nar"]),
        "kl_nar_aux": _divergence(log_probs["nar"], log_probs["aux"]),
        "kl_ar_aux": _divergence(log_probs["ar"], log_probs["aux"]),
        "length": model.length.loss(memory, lengths, batch.target_lengths),
    }
