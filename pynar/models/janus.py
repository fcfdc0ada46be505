"""JANUS (Liang et al. 2022): one model trained to decode left to right and all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.data.batching import Batch
from pynar.models.base import Example, TransformerConfig
from pynar.models.cmlm import CMLM, CMLMConfig, uniform_masking
from pynar.nn.attention import padding_mask
from pynar.nn.packed import PackedRows, pack
from pynar.nn.transformer import DecoderCache, Memory
from pynar.nn.two_stream import TwoStreams, ar_rows, two_streams
from pynar.ops import divergence_cross_entropy
from pynar.symbols import BOS, EOS, MASK, PAD

__all__ = ["JANUS", "JANUSConfig", "JANUSExample", "disjoint_span_masking", "span_masking"]

# Pairs of distributions whose divergence is a loss term.
_PAIRS = {"kl_ar_nar": ("ar", "nar"), "kl_nar_aux": ("nar", "aux"), "kl_ar_aux": ("ar", "aux")}
_STREAMS = ("ar", "nar", "aux")
_MASKINGS = ("spans", "disjoint_spans", "uniform")
# Span lengths less probable than this are never drawn.
_LEAST = 1e-7


@dataclass(frozen=True, kw_only=True)
class JANUSConfig(CMLMConfig):
    """The weight of every loss term, and the masking; the defaults are those of the released code.

    `masking`: "spans" as there, which leaves nearly half of the tokens; "disjoint_spans" as in the
    paper's text, where 70 % of the tokens are masked; "uniform" as for a CMLM, any number of them:
    so the model also sees what mask-predict begins with, nothing but masks.

    `query_positions`: where the AR query of a token stands. "previous", as there: at the position
    of the token before it. "own": where the mask stands of a token that is predicted in parallel,
    so that a mask predicts the token of its position in every stream.

    A term of weight 0 is not computed, and a stream that no term needs is not built. Without
    `length_weight` there is no length prediction, and the model decodes left to right only.
    """

    ar_weight: float = 1.0
    nar_weight: float = 0.5
    aux_weight: float = 0.5
    kl_ar_nar_weight: float = 1.0
    kl_nar_aux_weight: float = 1.0
    kl_ar_aux_weight: float = 3.0
    query_positions: str = "previous"
    masking: str = "spans"
    mask_ratio: float = 0.7
    mean_span: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for term in (*_STREAMS, *_PAIRS):
            if not (value := getattr(self, f"{term}_weight")) >= 0:
                raise ValueError(f"`{term}_weight` must not be negative, got {value}")
        if not any(getattr(self, f"{stream}_weight") for stream in _STREAMS):
            raise ValueError("one of `ar_weight`, `nar_weight`, `aux_weight` must be positive")
        if self.masking not in _MASKINGS:
            raise ValueError(
                f"`masking` must be one of {', '.join(_MASKINGS)}, got {self.masking!r}"
            )
        if self.query_positions not in ("previous", "own"):
            raise ValueError(
                f"`query_positions` must be one of previous, own, got {self.query_positions!r}"
            )
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"`mask_ratio` must be in (0, 1], got {self.mask_ratio}")
        if not 0 < self.mean_span <= 100:
            raise ValueError(f"`mean_span` must be in (0, 100], got {self.mean_span}")
        if self.positions == "learned" and self.max_length < 3:
            raise ValueError(f"`max_length` must be at least 3, got {self.max_length}")


@dataclass(frozen=True)
class JANUSExample(Example):
    """`inputs` and `labels` are those of the masked sentence, and `streams` what is computed."""

    source: PackedRows
    streams: TwoStreams


def _span_lengths(mean: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Lengths from Poisson(`mean`), at least 1: spans of no token would mask none."""
    k = torch.arange(1, 300, device=generator.device, dtype=torch.float64)
    density = (k * math.log(mean) - mean - torch.lgamma(k + 1)).exp()
    cumulative = density.masked_fill(density < _LEAST, 0).cumsum(0)
    draw = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.searchsorted(cumulative, draw * cumulative[-1], right=True) + 1


def _share_out(budget: Tensor, spans: Tensor) -> Tensor:
    """The `spans: [B, K]` that `budget: [B, 1]` suffices for, the last one trimmed, then zeros."""
    before = spans.cumsum(1) - spans
    return spans.minimum(budget - before).clamp(min=0)


def span_masking(
    target: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    *,
    ratio: float = 0.7,
    mean: float = 2.0,
) -> Tensor:
    r"""Chooses spans of tokens to mask, boolean `[B, T]`; there may be none.

    Of the n = T + 2 positions of `<s> y </s>`, :math:`\lceil 0.7 n \rceil` are shared out to spans
    of Poisson(2) positions, the last of which gets what is left. They start at different random
    positions; one that would reach beyond the end has length 1. They may overlap, and `<s>` and
    `</s>` are never masked, so fewer tokens are: 61 % of 6, 57 % of 20, 55 % of 100. (The rule
    of the released code.)
    """
    sentences, width = target.shape[0], target.shape[1] + 2
    n = (lengths + 2)[:, None]
    # An integer number of positions; in float64, as 0.7 n is computed elsewhere.
    budget = (n.double() * ratio).ceil().long()
    most = min(width, math.ceil(width * ratio))
    spans = _share_out(budget, _span_lengths(mean, (sentences, most), generator))
    place = torch.arange(width, device=target.device)
    draw = torch.rand(sentences, width, generator=generator, device=target.device)
    start = draw.masked_fill(place >= n, 2.0).argsort(1)[:, :most]
    spans = torch.where(start + spans > n, spans.clamp(max=1), spans)
    # Of a span of none, begin and end cancel.
    change = torch.zeros(sentences, width + 1, dtype=torch.long, device=target.device)
    change.scatter_add_(1, start, torch.ones_like(start))
    change.scatter_add_(1, start + spans, torch.full_like(start, -1))
    covered = change.cumsum(1)[:, 1 : width - 1] > 0
    return covered & padding_mask(lengths, target.shape[1])[:, 0, 0]


def disjoint_span_masking(
    target: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    *,
    ratio: float = 0.7,
    mean: float = 2.0,
) -> Tensor:
    """Chooses spans of 70 % of the tokens to mask, boolean `[B, T]`.

    0.7 T tokens, rounded to the nearest number (the even one of two), are shared out to spans of
    Poisson(2) tokens, the last of which gets what is left. The spans and the tokens that stay are
    put in random order, every order as probable. So spans do not overlap, though they may touch.
    (The share is that of the paper's text, the lengths are those of `span_masking`, the order is
    ours.)
    """
    sentences, width = target.shape
    # In float64, as 0.7 T is computed elsewhere.
    masked = (lengths.double() * ratio).round().long()[:, None]
    most = round(width * ratio)
    spans = _share_out(masked, _span_lengths(mean, (sentences, most), generator))
    stay = torch.arange(width, device=target.device) < lengths[:, None] - masked
    sizes = torch.cat([spans, stay.long()], 1)
    order = torch.rand(sizes.shape, generator=generator, device=target.device).argsort(1)
    sizes = sizes.gather(1, order)
    end = sizes.cumsum(1)
    # Spans of none change nothing: begin and end cancel.
    is_span = (order < most).long()
    change = torch.zeros(sentences, width + 1, dtype=torch.long, device=target.device)
    change.scatter_add_(1, end - sizes, is_span)
    change.scatter_add_(1, end, -is_span)
    return change.cumsum(1)[:, :width] > 0


class JANUS(CMLM):
    """One encoder and decoder with autoregressive, masked and auxiliary predictions.

    Two-stream attention: masks ("queries") look at the states of true tokens ("contents"). The
    AR query that sees t tokens predicts the next; masked tokens are predicted from all others
    (NAR), and from all others with the true values of those before them (AUX). Losses are the three
    cross-entropies and the symmetric divergences between the three (equations 3 to 8).
    """

    Config: ClassVar[type[TransformerConfig]] = JANUSConfig
    name = "janus"
    strategies: tuple[str, ...] = ("beam", "greedy", "sampling", "mask_predict", "draft_and_verify")
    banned = (PAD, BOS, MASK)

    config: JANUSConfig
    parallel_exclusion: Tensor  # [V], as `exclusion`, where the length is given

    def __init__(self, config: JANUSConfig) -> None:
        super().__init__(config)
        exclusion = self._exclude(CMLM.banned)
        self.register_buffer("parallel_exclusion", exclusion, persistent=False)
        self._terms = [t for t in (*_STREAMS, *_PAIRS, "length") if self._weight(t)]
        pairs = [_PAIRS[term] for term in self._terms if term in _PAIRS]
        wanted = {*self._terms, *(stream for pair in pairs for stream in pair)}
        self._streams = tuple(stream for stream in _STREAMS if stream in wanted)
        self._pairs = [(self._streams.index(p), self._streams.index(q)) for p, q in pairs]
        if "length" not in self._terms:
            # Its parameters would never get a gradient.
            del self.length
            self.strategies = ("beam", "greedy", "sampling")

    def _weight(self, term: str) -> float:
        weight: float = getattr(self.config, f"{term}_weight")
        return weight

    @property
    def longest(self) -> int | None:
        """`<s>` and `</s>` take two of the positions."""
        return self.config.max_length - 2 if self.config.positions == "learned" else None

    @property
    def loss_weights(self) -> dict[str, float]:
        return {term: self._weight(term) for term in self._terms}

    def corrupt(self, batch: Batch, generator: torch.Generator) -> JANUSExample:
        """Draws the masks and lays out all rows; on a GPU it reads three numbers back, once."""
        config = self.config
        masked = torch.zeros_like(batch.target, dtype=torch.bool)
        if self._streams != ("ar",) and config.masking == "uniform":
            masked = uniform_masking(batch.target, batch.target_lengths, generator)
        elif self._streams != ("ar",):
            draw = span_masking if config.masking == "spans" else disjoint_span_masking
            masked = draw(
                batch.target,
                batch.target_lengths,
                generator,
                ratio=config.mask_ratio,
                mean=config.mean_span,
            )
        return self.example(batch, masked)

    def example(self, batch: Batch, masked: Tensor) -> JANUSExample:
        """The example of a batch in which the tokens of boolean `masked: [B, T]` are masked."""
        totals = [batch.source_lengths.sum(), batch.target_lengths.sum(), masked.sum()]
        # The only time that the host waits for a GPU: the numbers of rows.
        source_tokens, tokens, num_masked = torch.stack(totals).tolist()
        streams = two_streams(
            batch.target,
            batch.target_lengths,
            masked,
            batch.source_lengths,
            tokens=tokens,
            num_masked=num_masked,
            streams=self._streams,
            query_positions=self.config.query_positions,
        )
        known = {"ar": tokens + len(batch), "length": len(batch)}
        # Filled on the device: a copy from the host would wait once more.
        counts = {
            term: torch.full((), known.get(term, num_masked), device=masked.device)
            for term in self._terms
        }
        return JANUSExample(
            batch,
            batch.target.masked_fill(masked, MASK),
            batch.target.masked_fill(~masked, PAD),
            counts,
            pack(batch.source, batch.source_lengths, source_tokens),
            streams,
        )

    def forward(self, example: JANUSExample) -> dict[str, Tensor]:  # type: ignore[override]
        source = self.encode_rows(example.source)
        losses = self._token_losses(self.states(example, source), example.streams)
        if "length" in self._terms:
            losses["length"] = self._length_loss(example.batch, example.source, source)
        return losses

    def _rows(self, streams: TwoStreams) -> dict[str, int]:
        """How many rows of each stream are read."""
        parts = {"ar": streams.ar, "nar": streams.nar, "aux": streams.aux}
        return {name: len(parts[name]) for name in self._streams}

    def states(self, example: JANUSExample, source: Tensor) -> Tensor:
        """The decoder's states of every stream, with the encoder's `source: [S, C]`.

        One stream after the other: `[sum(T + 1), C]` of AR, the masked tokens' first, `[b, C]` of
        NAR and AUX.
        """
        streams = example.streams
        parts = {"ar": streams.ar, "nar": streams.nar, "aux": streams.aux}
        return self.decoder.rows(
            self.embed_rows(self.target_embedding, streams.rows),
            self.decoder.project_rows(source),
            sees=streams.rows.intervals,
            reads=streams.source,
            content=streams.content,
            read=torch.cat([parts[name] for name in self._streams]),
        )

    def _token_losses(self, states: Tensor, streams: TwoStreams) -> dict[str, Tensor]:
        sizes = self._rows(streams)
        entropies, divergences = divergence_cross_entropy(
            self.logits(states),
            streams.ar_labels if "ar" in sizes else streams.labels,
            self._pairs,
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
            sizes=list(sizes.values()),
        )
        split = entropies.split(list(sizes.values()))
        losses = {s: x.sum() for s, x in zip(sizes, split, strict=True) if s in self._terms}
        names = [term for term in self._terms if term in _PAIRS]
        return {**losses, **dict(zip(names, divergences.sum(1).unbind(), strict=True))}

    def score(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Log-probability `[B * n]` of each `target: [B * n, T]` (no BOS, no EOS) with its EOS.

        That of the AR stream. The n targets of a source follow each other.
        """
        states = self.ahead(
            target,
            target_lengths,
            torch.zeros_like(target_lengths),
            self.encode(source, source_lengths),
        )
        ended = F.pad(target, (0, 1), value=PAD).scatter(1, target_lengths[:, None], EOS)
        live = padding_mask(target_lengths + 1, ended.shape[1])[:, 0, 0]
        labels = ended[live]
        if torch.is_grad_enabled():
            log_probs = self.log_probs(states).gather(-1, labels[:, None])[:, 0]
        else:  # which `best` is made for
            log_probs = self.log_prob(states, labels, self.best(states)[2])
        return log_probs.new_zeros(live.shape).masked_scatter(live, log_probs).sum(-1)

    def ahead(self, tokens: Tensor, lengths: Tensor, first: Tensor, memory: Memory) -> Tensor:
        """AR query states of what follows each prefix of `tokens: [B * n, T]`, in one pass.

        Of prefixes of `first: [B * n]` to `lengths: [B * n]` tokens, sentence after sentence:
        `[sum(lengths - first + 1), C]`.
        """
        rows, content = ar_rows(tokens, lengths, first, query_positions=self.config.query_positions)
        keys_values, bounds = memory.rows()
        candidates = len(tokens) // max(len(bounds), 1)
        return self.decoder.rows(
            self.embed_rows(self.target_embedding, rows),
            keys_values,
            sees=rows.intervals,
            reads=bounds[rows.sentence // max(candidates, 1)][:, None],
            content=content,
            read=torch.arange(content, len(rows.tokens), device=tokens.device),
        )

    def step(self, tokens: Tensor, memory: Memory, cache: DecoderCache) -> Tensor:
        """Query states `[N, C]` from which the token after `tokens: [N]` follows."""
        pair = torch.stack([tokens, torch.full_like(tokens, MASK)], 1)
        at = cache.position
        ahead = self.config.query_positions == "own"
        # Of the content, and of the query: the same one, or the next.
        positions = self.target_embedding.positions(at, at + 1 + ahead)
        x = self.target_embedding.embed(pair) + positions
        return self.decoder.step(self.target_embedding.norm(x), memory, cache)[:, 0]

    def decode(
        self, tokens: Tensor, lengths: Tensor, memory: Memory, wanted: Tensor | None = None
    ) -> Tensor:
        """As `CMLM.decode`, of `tokens: [B * n, T]` between `<s>` and `</s>`."""
        framed = F.pad(tokens, (1, 1), value=PAD)
        framed[:, :1] = BOS
        framed = framed.scatter(1, lengths[:, None] + 1, EOS)
        if wanted is not None:
            wanted = F.pad(wanted, (1, 1))
        states = super().decode(framed, lengths + 2, memory, wanted)
        return states if wanted is not None else states[:, 1:-1]

    def fill(self, states: Tensor) -> tuple[Tensor, Tensor]:
        tokens, log_probs, _ = self.best(states, exclusion=self.parallel_exclusion)
        return tokens, log_probs
