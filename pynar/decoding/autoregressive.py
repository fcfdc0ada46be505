"""Left-to-right decoding: greedy search, beam search and sampling over a key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pynar.decoding.hypotheses import Hypotheses
from pynar.models.autoregressive import AutoregressiveTransformer
from pynar.models.janus import JANUS
from pynar.nn.transformer import Memory
from pynar.symbols import BOS, EOS, PAD

__all__ = ["BeamSearch", "Greedy", "Sampling", "length_limits"]

LeftToRight = AutoregressiveTransformer | JANUS
Choose = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]


def _positive(owner: str, **options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{owner}: `{name}` must be positive, got {value}")


def _not_negative(owner: str, **options: float) -> None:
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{owner}: `{name}` must not be negative, got {value}")


def length_limits(
    source_lengths: Tensor, ratio: float, extra: int, longest: int | None = None
) -> Tensor:
    """The most tokens (EOS counted) each sentence may produce, from its own length alone.

    At least one, and at most the `longest` that the model has positions for.
    """
    return ((source_lengths * ratio).long() + extra).clamp(min=1, max=longest)


@dataclass(frozen=True)
class Greedy:
    """The most probable token at every step; finished sentences leave the batch.

    A source of S tokens (EOS counted) gives at most `max_ratio` * S + `max_extra` tokens, the last
    of which is the EOS, at its own price, and at least `min_length` before it where the limit
    lets them.
    """

    max_ratio: float = 2.0
    max_extra: int = 10
    min_length: int = 0

    def __post_init__(self) -> None:
        _not_negative("Greedy", max_ratio=self.max_ratio, max_extra=self.max_extra)
        _not_negative("Greedy", min_length=self.min_length)

    @torch.inference_mode()
    def decode(
        self,
        model: LeftToRight,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
    ) -> Hypotheses:
        """Decodes `source: [B, S]`; the score is the log-probability divided by the length."""

        def choose(states: Tensor, step: int, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            best = model.best(states)
            if step >= self.min_length or not (best[0] == EOS).any():
                return best
            # Who would end too early goes on with the second choice.
            tokens, log_probs, lse = model.best(states, 2)
            place = (tokens[:, :1] == EOS).long()
            return tokens.gather(1, place)[:, 0], log_probs.gather(1, place)[:, 0], lse

        return _extend(
            model,
            source,
            length_limits(source_lengths, self.max_ratio, self.max_extra, model.longest),
            model.encode(source, source_lengths),
            choose,
        )


@dataclass(frozen=True)
class Sampling:
    """Draws tokens from the model's distribution, or from its `top_k` most probable ones.

    Every (seed, sentence, sample, step) has its own random number, so a draw depends on neither
    the batch nor its order; `indices` names the sentences. Lengths are limited as in `Greedy`.
    """

    samples: int = 1
    top_k: int = 0
    temperature: float = 1.0
    seed: int = 0
    max_ratio: float = 2.0
    max_extra: int = 10

    def __post_init__(self) -> None:
        _positive("Sampling", samples=self.samples, temperature=self.temperature)
        _not_negative("Sampling", seed=self.seed, max_ratio=self.max_ratio)
        _not_negative("Sampling", max_extra=self.max_extra)
        if self.top_k < 0:
            raise ValueError(f"Sampling: `top_k` must be 0 (off) or positive, got {self.top_k}")

    @torch.inference_mode()
    def decode(
        self,
        model: LeftToRight,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
    ) -> Hypotheses:
        """Decodes `source: [B, S]`; samples come in order of their score, as in `Greedy`."""
        sentences, n = source.shape[0], self.samples
        names = range(sentences) if indices is None else indices.tolist()
        limits = length_limits(source_lengths, self.max_ratio, self.max_extra, model.longest)
        numbers = np.empty((sentences * n, int(limits.max()) if sentences else 0))
        places = ((name, sample) for name in names for sample in range(n))
        for row, place in zip(numbers, places, strict=True):
            np.random.default_rng((self.seed, *place)).random(out=row)
        uniform = torch.from_numpy(numbers).to(source.device)

        def draw(states: Tensor, step: int, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = model.logits(states).float() + model.exclusion
            lse = logits.logsumexp(-1)
            log_probs = logits - lse[:, None]
            scaled = log_probs / self.temperature
            if self.top_k:
                scaled, kept = scaled.topk(min(self.top_k, scaled.shape[-1]), -1)
            cumulative = scaled.double().softmax(-1).cumsum(-1)
            point = uniform[live, step, None] * cumulative[:, -1:]
            choice = torch.searchsorted(cumulative, point, right=True)
            choice = choice.clamp(max=cumulative.shape[-1] - 1)
            token = kept.gather(1, choice) if self.top_k else choice
            return token[:, 0], log_probs.gather(1, token)[:, 0], lse

        memory = model.encode(source, source_lengths)
        rows = torch.arange(sentences, device=source.device).repeat_interleave(n)
        flat = _extend(model, source, limits[rows], memory.select(rows), draw)
        scores, order = torch.sort(
            flat.scores.view(sentences, n), dim=1, descending=True, stable=True
        )
        width = flat.tokens.shape[-1]
        tokens = flat.tokens.view(sentences, n, width)
        return Hypotheses(
            tokens.gather(1, order[..., None].expand(-1, -1, width)),
            flat.lengths.view(sentences, n).gather(1, order),
            scores,
            flat.passes.view(sentences, n).amax(1),
        )


def _extend(
    model: LeftToRight,
    source: Tensor,
    limits: Tensor,
    memory: Memory,
    choose: Choose,
) -> Hypotheses:
    """Extends one prefix a row by `choose(states, step, live rows) -> token, log_prob, lse`."""
    rows = len(limits)
    live = torch.arange(rows, device=source.device)
    on_host = limits.tolist()
    tokens = source.new_full((rows, max(on_host, default=0)), PAD)
    lengths = torch.zeros_like(limits)
    scores = torch.zeros(rows, device=source.device)
    cache = model.decoder.cache(rows, memory.states)
    # Of the live rows: their last tokens, scores and limits.
    last, total, most = source.new_full((rows,), BOS), scores, limits
    nearest = min(on_host, default=0)
    for step in range(tokens.shape[1]):
        states = model.step(last, memory, cache)
        last, gained, lse = choose(states, step, live)
        if step + 1 >= nearest:
            # The last allowed token is the end of the sentence, at its own price.
            at_limit = step + 1 >= most
            last = torch.where(at_limit, EOS, last)
            gained = torch.where(at_limit, model.log_prob(states, last, lse), gained)
        total = total + gained
        if len(live) == rows:
            tokens[:, step] = last
        else:
            tokens[live, step] = last
        keep = (last != EOS).nonzero()[:, 0]
        if len(keep) < len(live):
            # Those that go on overwrite it when they end.
            scores[live], lengths[live] = total, step + 1
            if not len(keep):
                break
            live, last, memory = live[keep], last[keep], memory.select(keep)
            total, most = total[keep], most[keep]
            cache.select(keep)
    tokens = tokens.masked_fill(tokens == EOS, PAD)
    width = int(lengths.max()) - 1 if rows else 0
    return Hypotheses(
        tokens[:, None, :width],
        (lengths - 1)[:, None],
        (scores / lengths.clamp(min=1))[:, None],
        lengths,
    )


@dataclass(frozen=True)
class BeamSearch:
    """Beam search with length-normalised scores, log p(y | x) / |y|^length_penalty.

    |y| counts the EOS. A sentence is finished when `beam` hypotheses have ended (`early_stop`), or
    when no live hypothesis can still beat the worst of them; finished sentences leave the batch.
    Lengths are limited as in `Greedy`, on both sides. Where a sentence has fewer hypotheses than
    `n_best`, the missing ones are empty and score -inf.
    """

    beam: int = 5
    length_penalty: float = 1.0
    n_best: int = 1
    early_stop: bool = True
    max_ratio: float = 2.0
    max_extra: int = 10
    min_length: int = 0

    def __post_init__(self) -> None:
        _positive("BeamSearch", beam=self.beam, n_best=self.n_best)
        _not_negative("BeamSearch", max_ratio=self.max_ratio, max_extra=self.max_extra)
        _not_negative("BeamSearch", min_length=self.min_length)
        if self.n_best > self.beam:
            raise ValueError(
                f"BeamSearch: `n_best` must be at most `beam` ({self.beam}), got {self.n_best}"
            )

    @torch.inference_mode()
    def decode(
        self,
        model: LeftToRight,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
    ) -> Hypotheses:
        """Decodes `source: [B, S]` to the `n_best` hypotheses of every sentence."""
        device, beam, sentences = source.device, self.beam, source.shape[0]
        limits = length_limits(source_lengths, self.max_ratio, self.max_extra, model.longest)
        longest = int(limits.max()) if sentences else 1
        # Finished hypotheses, worst replaced first; -inf marks a free place.
        done_scores = torch.full((sentences, beam), -torch.inf, device=device)
        done_tokens = source.new_full((sentences, beam, longest), PAD)
        done_lengths = torch.zeros(sentences, beam, dtype=torch.long, device=device)
        passes = torch.zeros_like(limits)

        live = torch.arange(sentences, device=device)
        memory = model.encode(source, source_lengths)
        cache = model.decoder.cache(sentences * beam, memory.states)
        prefix = source.new_full((sentences, beam, longest), PAD)
        # All rows begin alike, so only the first may be extended.
        totals = torch.full((sentences, beam), -torch.inf, device=device)
        totals[:, 0] = 0.0
        last = source.new_full((sentences * beam,), BOS)
        # No more of one hypothesis' extensions can be among the best 2 * beam of all.
        k = min(2 * beam, model.config.target_vocabulary)
        for step in range(longest):
            if not len(live):
                break
            states = model.step(last, memory, cache)
            tokens, log_probs, lse = model.best(states, k)
            at_limit = step + 1 >= limits[live]
            if step < self.min_length:
                log_probs = log_probs.masked_fill(tokens == EOS, -torch.inf)
            if at_limit.any():
                tokens, log_probs = _only_end(
                    model, states, tokens, log_probs, lse, at_limit.repeat_interleave(beam)
                )
            # At most `beam` of the best 2 * beam extensions end, so `beam` go on.
            extended = totals[..., None] + log_probs.view(len(live), beam, k)
            score, flat = extended.flatten(1).topk(2 * beam, -1)
            parent, token = flat // k, tokens.view(len(live), -1).gather(1, flat)
            ends = token == EOS

            ended = torch.where(ends, score / (step + 1) ** self.length_penalty, -torch.inf)
            # Only an end among the best `beam` counts: behind them, live ones are preferred.
            ended[:, beam:] = -torch.inf
            pool = torch.cat([done_scores[live], ended], 1)
            kept, place = pool.topk(beam, -1)
            written = torch.cat([done_tokens[live], prefix.gather(1, _expand(parent, longest))], 1)
            done_scores[live] = kept
            done_tokens[live] = written.gather(1, _expand(place, longest))
            lengths = torch.cat([done_lengths[live], torch.full_like(parent, step)], 1)
            done_lengths[live] = lengths.gather(1, place)
            passes[live] = step + 1

            order = torch.where(ends, 2 * beam, 0) + torch.arange(2 * beam, device=device)
            going = order.topk(beam, -1, largest=False, sorted=True).indices
            totals = torch.where(ends, -torch.inf, score).gather(1, going)
            parent, last = parent.gather(1, going), token.gather(1, going)
            prefix = prefix.gather(1, _expand(parent, longest))
            prefix[:, :, step] = last

            finished = at_limit | self._finished(kept, totals, step, limits[live])
            keep = (~finished).nonzero()[:, 0]
            rows = torch.arange(len(live), device=device)[:, None] * beam + parent
            if len(keep) < len(live):
                live, memory = live[keep], memory.select(keep)
                totals, prefix, last, rows = totals[keep], prefix[keep], last[keep], rows[keep]
            cache.select(rows.flatten())
            last = last.flatten()
        scores = done_scores[:, : self.n_best]
        free = scores == -torch.inf
        lengths = done_lengths[:, : self.n_best].masked_fill(free, 0)
        width = int(lengths.max()) if sentences else 0
        tokens = done_tokens[:, : self.n_best, :width].masked_fill(free[..., None], PAD)
        return Hypotheses(tokens, lengths, scores, passes)

    def _finished(self, ended: Tensor, totals: Tensor, step: int, limits: Tensor) -> Tensor:
        """Whether no live hypothesis matters any more, `[B]`."""
        if self.early_stop:
            return ended[:, -1] > -torch.inf
        # A log-probability only falls, so the best score still possible divides by the most
        # favourable length.
        best = totals[:, 0]
        longest = limits.to(best.dtype) if self.length_penalty > 0 else step + 2
        return ended[:, -1] >= best / longest**self.length_penalty


def _only_end(
    model: LeftToRight,
    states: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    where: Tensor,
) -> tuple[Tensor, Tensor]:
    """Leaves the rows of `where: [N]` the end of the sentence as their one extension."""
    end = torch.full_like(lse, EOS, dtype=torch.long)
    alone = torch.full_like(log_probs, -torch.inf)
    alone[:, 0] = model.log_prob(states, end, lse)
    tokens = torch.where(where[:, None], EOS, tokens)
    return tokens, torch.where(where[:, None], alone, log_probs)


def _expand(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)
