"""Decoding through continuous latent variables (FlowSeq, Ma et al. 2019, section 3.5)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pynar.decoding.autoregressive import length_limits
from pynar.decoding.graphs import by_graph
from pynar.decoding.hypotheses import Hypotheses
from pynar.models.flowseq import FlowSeq, fill_with_eos
from pynar.nn.attention import padding_mask
from pynar.nn.transformer import Memory
from pynar.symbols import EOS, PAD

__all__ = ["ImportanceWeighted", "LatentArgmax", "NoisyParallel"]


def _noise(
    seed: int, names: Sequence[int], lengths: Tensor, samples: int, width: int, dim: int
) -> Tensor:
    """Standard normal noise `[B * n * r, T, C]`, drawn for each (seed, sentence, length, sample).

    So it depends on neither the batch nor on how many candidates there are.
    """
    rows = np.zeros((*lengths.shape, samples, width, dim), dtype=np.float32)
    for name, row, own in zip(names, rows, lengths.tolist(), strict=True):
        for places, length in zip(row, own, strict=True):
            for sample, place in enumerate(places):
                generator = np.random.default_rng((seed, name, length, sample))
                place[:length] = generator.standard_normal((length, dim), dtype=np.float32)
    return torch.from_numpy(rows).flatten(0, 2).to(lengths.device)


def _lengths(
    model: FlowSeq, memory: Memory, candidates: int, ratio: float, extra: int
) -> tuple[Tensor, Tensor]:
    """The most probable lengths and their log-probabilities, `[B, n]`; all of them multiples."""
    multiple = model.config.multiple
    limits = length_limits(memory.lengths, ratio, extra, model.longest)
    limits = (limits // multiple * multiple).clamp(min=multiple)
    lengths, log_probs = model.length.predict(memory.states, memory.lengths, candidates, limits)
    return _steps(model, lengths.clamp(min=1)), log_probs


def _steps(model: FlowSeq, lengths: Tensor) -> Tensor:
    """The next multiples, as many as there are latent variables."""
    multiple = model.config.multiple
    return (lengths + multiple - 1) // multiple * multiple


def _cut(tokens: Tensor, lengths: Tensor) -> Tensor:
    beyond = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    return tokens.masked_fill(beyond, PAD)


def _choose(
    tokens: Tensor, scores: Tensor, n_best: int, passes: Tensor, width: int | None = None
) -> Hypotheses:
    """The best of `tokens: [B, n, T]`, each cut at its first EOS; as wide as need be or given."""
    best, order = scores.topk(min(n_best, scores.shape[1]), 1)
    tokens = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
    ended = ((tokens == EOS) | (tokens == PAD)).cumsum(2) > 0
    lengths = (~ended).sum(2)
    if width is None:
        width = int(lengths.max()) if lengths.numel() else 0
    return Hypotheses(tokens.masked_fill(ended, PAD)[..., :width], lengths, best, passes)


@dataclass(frozen=True, kw_only=True)
class _Latent:
    """What every way of decoding through latent variables can be told."""

    samples: int = 1
    temperature: float = 0.3
    seed: int = 0
    max_ratio: float = 2.0
    max_extra: int = 10

    def __post_init__(self) -> None:
        own = type(self).__name__
        for field in ("samples", "length_candidates", "importance_samples", "n_best"):
            if (value := getattr(self, field, 1)) < 1:
                raise ValueError(f"{own}: `{field}` must be positive, got {value}")
        for field in ("temperature", "seed", "max_ratio", "max_extra"):
            if not (amount := getattr(self, field)) >= 0:
                raise ValueError(f"{own}: `{field}` must not be negative, got {amount}")

    def _check_lengths(self, target_lengths: Tensor | None, source_lengths: Tensor) -> int:
        """The greatest of the given lengths, 0 if there are none."""
        if target_lengths is None:
            return 0
        on_host = target_lengths.tolist()
        if target_lengths.shape != source_lengths.shape or min(on_host, default=1) < 1:
            raise ValueError(
                f"{type(self).__name__}: `target_lengths` must be {len(source_lengths)} positive "
                f"lengths, got {on_host}"
            )
        return max(on_host, default=1)

    @property
    def drafts(self) -> int:
        """Of a sentence, all decoded at once: a translator takes as many fewer sentences."""
        return self.samples * getattr(self, "length_candidates", 1)


@dataclass(frozen=True, kw_only=True)
class LatentArgmax(_Latent):
    """The most probable tokens of the latent variables' mode: noise 0 through the flow.

    With several `samples` of noise from N(0, temperature^2), those that the prior finds most
    probable. With `noise` a single sample is drawn, too, so that each `seed` gives other
    translations. Scores are log p(z | x) without the constant of the normal distribution.

    On CUDA a frozen model decodes small batches by captured CUDA graphs, as `MaskPredict` does,
    unless noise is drawn, which the host does for known lengths; `graphs=False` does without.
    """

    noise: bool = False
    graphs: bool = True

    @property
    def _draws(self) -> bool:
        return self.noise or self.samples > 1

    @torch.inference_mode()
    def decode(
        self,
        model: FlowSeq,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Hypotheses:
        """Decodes `source: [B, S]`; `indices` name the sentences, for the noise.

        With `target_lengths: [B]` to these lengths, but for sentences that end before.
        """
        multiple = model.config.multiple
        longest = -(-self._check_lengths(target_lengths, source_lengths) // multiple) * multiple
        if target_lengths is not None:
            target_lengths = target_lengths.to(source.device)
        if self.graphs and not self._draws:
            search = functools.partial(self._search, model)
            inputs = model, source, source_lengths, target_lengths
            found = by_graph(self, search, *inputs, longest=longest, multiple=max(8, multiple))
            if found is not None:
                return found
        return self._search(model, source, source_lengths, target_lengths, indices=indices)

    def _search(
        self,
        model: FlowSeq,
        source: Tensor,
        source_lengths: Tensor,
        target_lengths: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        width: int | None = None,
    ) -> Hypotheses:
        """From sentences to hypotheses.

        With a `width`, a multiple of the model's, the latent variables and the tokens have it,
        whatever the lengths are, and without noise nothing waits for the device.
        """
        memory = model.encode(source, source_lengths)
        if target_lengths is None:
            lengths, _ = _lengths(model, memory, 1, self.max_ratio, self.max_extra)
        else:
            lengths = _steps(model, target_lengths)[:, None]
        steps = width
        if steps is None:
            steps = int(lengths.max()) if len(lengths) else 0
        if self._draws:
            names = range(len(source)) if indices is None else indices.tolist()
            noise = _noise(self.seed, names, lengths, self.samples, steps, model.config.dim)
        else:
            noise = torch.zeros(len(source), steps, model.config.dim, device=source.device)
        z, scores = model.sample_prior(
            noise * self.temperature, lengths.repeat_interleave(self.samples), memory
        )
        scores = scores.view(len(source), self.samples)
        if self.samples > 1:
            scores, best = scores.max(1, keepdim=True)
            z = z.unflatten(0, (-1, self.samples))
            z = z.gather(1, best[..., None, None].expand(-1, -1, *z.shape[2:])).squeeze(1)
        tokens, _ = _tokens(model, z, lengths[:, 0], memory, select=width is None)
        if target_lengths is not None:
            tokens = _cut(tokens, target_lengths)
        passes = torch.ones_like(source_lengths)
        return _choose(tokens[:, None], scores, 1, passes, width)


@dataclass(frozen=True, kw_only=True)
class NoisyParallel(_Latent):
    """The drafts of noisy parallel decoding (NPD): `samples` for each of the likeliest lengths.

    They are decoded from noise of N(0, temperature^2), the first of each length from none, and are
    meant for a rescorer (`pynar.decoding.RescoringTranslator`). Without one they are ranked by the
    mean log p(y_t | z, x), each given its own z, which says little about them.
    """

    length_candidates: int = 3
    samples: int = 10

    @torch.inference_mode()
    def decode(
        self,
        model: FlowSeq,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Hypotheses:
        """As `LatentArgmax.decode`; every draft is a hypothesis.

        With `target_lengths: [B]` there are `samples` of a sentence, all of this length.
        """
        self._check_lengths(target_lengths, source_lengths)
        memory = model.encode(source, source_lengths)
        names = range(len(source)) if indices is None else indices.tolist()
        drafts = _draft(model, memory, names, self, target_lengths)
        shape = len(source), drafts.lengths.shape[1] * self.samples
        scores = drafts.token_scores / drafts.rows.clamp(min=1)
        passes = torch.ones_like(source_lengths)
        return _choose(drafts.tokens.unflatten(0, shape), scores.view(shape), shape[1], passes)


@dataclass(frozen=True, kw_only=True)
class ImportanceWeighted(_Latent):
    """Importance weighted decoding (IWD): the candidate that the model itself finds most probable.

    `samples` drafts at `temperature` for each of the `length_candidates` most probable lengths, the
    first without noise, are scored by an estimate of log p(y | x) from `importance_samples` draws
    of the posterior, plus the length's log-probability, over the length:

    .. math:: \\log \\tfrac1K \\sum_k p(y | z_k, x) p(z_k | x) / q(z_k | x, y), \\quad z_k \\sim q
    """

    length_candidates: int = 3
    samples: int = 5
    importance_samples: int = 4
    n_best: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_best > self.length_candidates * self.samples:
            raise ValueError(
                "ImportanceWeighted: `n_best` must be at most `length_candidates` times `samples` "
                f"({self.length_candidates * self.samples}), got {self.n_best}"
            )

    @torch.inference_mode()
    def decode(
        self,
        model: FlowSeq,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Hypotheses:
        """As `NoisyParallel.decode`, but for the `n_best`; a given length counts as sure."""
        self._check_lengths(target_lengths, source_lengths)
        memory = model.encode(source, source_lengths)
        names = range(len(source)) if indices is None else indices.tolist()
        drafts = _draft(model, memory, names, self, target_lengths)
        tokens, lengths, log_probs = drafts.tokens, drafts.lengths, drafts.log_probs
        prior = log_probs.repeat_interleave(self.samples, 1)
        scores = self._score_distinct(model, tokens.unflatten(0, prior.shape), memory, names)
        scores = (scores + prior) / lengths.repeat_interleave(self.samples, 1)
        # The decoder runs for the drafts, and again for what the posterior makes of them.
        passes = torch.full_like(source_lengths, 2)
        return _choose(tokens.unflatten(0, scores.shape), scores, self.n_best, passes)

    def _score_distinct(
        self, model: FlowSeq, tokens: Tensor, memory: Memory, names: Sequence[int]
    ) -> Tensor:
        """Scores `[B, n]` of drafts `[B, n, T]`, of which equal ones are scored once.

        Equal drafts have equal noise, so that nothing else changes.
        """
        ended = ((tokens == EOS) | (tokens == PAD)).cumsum(2) > 0
        tokens = tokens.masked_fill(ended, PAD)
        equal = (tokens[:, :, None] == tokens[:, None]).all(3)
        first = equal.int().argmax(2)
        distinct = first == torch.arange(first.shape[1], device=first.device)
        order = distinct.int().argsort(dim=1, descending=True, stable=True)
        counts = distinct.sum(1)
        scores = torch.zeros(first.shape, device=first.device)
        # The decoder wants as many drafts of every sentence: those with equally many go together.
        for count in counts.unique().tolist():
            group = (counts == count).nonzero()[:, 0]
            kept = order[group, :count]
            taken = tokens[group[:, None], kept].flatten(0, 1)
            own = [names[i] for i in group.tolist()]
            found = self._score(model, taken, memory.select(group), own).view_as(kept)
            scores[group[:, None], kept] = found.float()
        return scores.gather(1, first)

    def _score(
        self, model: FlowSeq, tokens: Tensor, memory: Memory, names: Sequence[int]
    ) -> Tensor:
        """The estimate of log p(y | x) for `tokens: [B * n, T]`."""
        ended = ((tokens == EOS) | (tokens == PAD)).cumsum(1) > 0
        inputs, lengths = fill_with_eos(
            tokens.masked_fill(ended, PAD), (~ended).sum(1), model.config.multiple
        )
        dim, k = model.config.dim, self.importance_samples
        posterior = model.infer(inputs, lengths, memory)
        # Other draws than those of the candidates.
        per_sentence = lengths.view(len(names), len(lengths) // max(len(names), 1))
        noise = _noise(self.seed + 1, names, per_sentence, k, inputs.shape[1], dim)
        live = padding_mask(lengths, inputs.shape[1])[:, 0, 0]
        mean, log_variance = (
            x.repeat_interleave(k, 0) for x in (posterior.mean, posterior.log_variance)
        )
        z = mean + noise * (0.5 * log_variance).exp()
        log_q = -0.5 * (log_variance + noise.square()).sum((1, 2))
        many, lives = lengths.repeat_interleave(k), live.repeat_interleave(k, 0)
        states = model.decode_latent(z, many, memory, lives)
        found = model.reconstruction(states, inputs.repeat_interleave(k, 0)[lives])
        log_p = found.new_zeros(lives.shape).masked_scatter(lives, found).sum(1)
        weights = log_p + model.log_prior(z, many, memory) - log_q
        return weights.view(-1, k).logsumexp(1) - math.log(k)


@dataclass(frozen=True)
class _Drafts:
    lengths: Tensor  # [B, n], the likeliest ones
    log_probs: Tensor  # [B, n], of the lengths
    rows: Tensor  # [B * n * r], the length of each draft
    tokens: Tensor  # [B * n * r, T]
    token_scores: Tensor  # [B * n * r], sums of log p(y_t | z, x)


def _draft(
    model: FlowSeq,
    memory: Memory,
    names: Sequence[int],
    options: NoisyParallel | ImportanceWeighted,
    target_lengths: Tensor | None,
) -> _Drafts:
    """r samples for each of n lengths, or for the given one; the first without noise."""
    if target_lengths is None:
        lengths, log_probs = _lengths(
            model, memory, options.length_candidates, options.max_ratio, options.max_extra
        )
    else:
        target_lengths = target_lengths.to(memory.lengths.device)
        lengths = _steps(model, target_lengths)[:, None]
        log_probs = torch.zeros(lengths.shape, device=lengths.device)
    width = int(lengths.max()) if len(lengths) else 0
    noise = _noise(options.seed, names, lengths, options.samples, width, model.config.dim)
    noise = noise * options.temperature
    noise.unflatten(0, (-1, options.samples))[:, 0] = 0
    rows = lengths.flatten().repeat_interleave(options.samples)
    z, _ = model.sample_prior(noise, rows, memory)
    tokens, scores = _tokens(model, z, rows, memory)
    if target_lengths is not None:
        tokens = _cut(tokens, target_lengths.repeat_interleave(options.samples))
    return _Drafts(lengths, log_probs, rows, tokens, scores)


def _tokens(
    model: FlowSeq, z: Tensor, lengths: Tensor, memory: Memory, select: bool = True
) -> tuple[Tensor, Tensor]:
    """The most probable tokens `[B * n, T]` of latent variables, and their log p(y | z, x).

    To `select` the live steps a GPU has to say how many they are; otherwise all are computed.
    """
    live = padding_mask(lengths, z.shape[1])[:, 0, 0]
    states = model.decode_latent(z, lengths, memory, live if select else None)
    best, log_probs, _ = model.best(states.flatten(0, -2))
    if select:
        tokens = torch.full(live.shape, PAD, device=z.device).masked_scatter(live, best)
        log_probs = log_probs.new_zeros(live.shape).masked_scatter(live, log_probs)
    else:
        tokens = best.view(live.shape).masked_fill(~live, PAD)
        log_probs = log_probs.view(live.shape).masked_fill(~live, 0)
    return tokens, log_probs.sum(1)
