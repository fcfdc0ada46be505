"""Parallel decoding: all target tokens at once, then again where the model is least sure."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pynar.decoding.autoregressive import length_limits
from pynar.decoding.graphs import by_graph
from pynar.decoding.hypotheses import Hypotheses
from pynar.models.cmlm import CMLM
from pynar.nn.kept import SMALL, kept
from pynar.nn.transformer import Memory
from pynar.ops import mask_predict_step
from pynar.symbols import MASK, NUM_SPECIAL, PAD

__all__ = ["MaskPredict", "fill", "mask_again"]


@dataclass(frozen=True)
class MaskPredict:
    """Mask-Predict (Ghazvininejad et al. 2019, section 4): `iterations` decoder passes.

    After pass t of N (counted from 1) the floor(n (N - t) / N) tokens of lowest probability are
    masked again. One iteration is plain parallel decoding. A sentence of few tokens has none left
    to mask before the last pass, and leaves the batch.

    The `length_candidates` most probable lengths are decoded side by side; the one of the highest
    mean token log-probability wins. `length_prior` w adds w log p(T | x) before the division by
    T. The paper has w = 0; but a model that was shown a wrong length is often sure of itself.
    A source of S tokens (EOS counted) gives at most `max_ratio` * S + `max_extra` tokens.

    With a `block` of K, decoding is semi-autoregressive (Wang et al. 2018): a pass settles the next
    K tokens, from left to right, and there are ceil(T / K) passes, whatever `iterations` says.

    On CUDA a frozen model decodes batches of up to `pynar.decoding.graphs.MOST_POSITIONS` positions
    by captured CUDA graphs (see there): sizes are rounded up to a bucket, and the first batch of a
    bucket takes longer. `graphs=False` does without, and so does `trace`.
    """

    iterations: int = 10
    length_candidates: int = 5
    length_prior: float = 0.0
    n_best: int = 1
    trace: bool = False
    max_ratio: float = 2.0
    max_extra: int = 10
    graphs: bool = True
    block: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "length_candidates", "n_best"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"MaskPredict: `{name}` must be positive, got {value}")
        for name in ("length_prior", "max_ratio", "max_extra", "block"):
            if not (amount := getattr(self, name)) >= 0:
                raise ValueError(f"MaskPredict: `{name}` must not be negative, got {amount}")
        if self.n_best > self.length_candidates:
            raise ValueError(
                f"MaskPredict: `n_best` must be at most `length_candidates` "
                f"({self.length_candidates}), got {self.n_best}"
            )

    @torch.inference_mode()
    def decode(
        self,
        model: CMLM,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Hypotheses:
        """Decodes `source: [B, S]`, to given `target_lengths: [B, n]` if there are any."""
        longest = 0
        if target_lengths is not None:
            longest = self._longest(target_lengths, source_lengths)
            target_lengths = target_lengths.to(source.device)
        found = None
        if self.graphs and not self.trace:
            candidates = min(self.length_candidates, model.length.classes)
            found = by_graph(
                self,
                functools.partial(self._search, model),
                model,
                source,
                source_lengths,
                target_lengths,
                candidates=candidates if target_lengths is None else target_lengths.shape[1],
                longest=longest,
            )
        if found is None:
            found = self._search(model, source, source_lengths, target_lengths)
        return found

    def _longest(self, target_lengths: Tensor, source_lengths: Tensor) -> int:
        """The greatest of the given lengths, which are checked."""
        if target_lengths.dim() != 2 or target_lengths.shape[0] != len(source_lengths):
            raise ValueError(
                f"MaskPredict: `target_lengths` must have shape [{len(source_lengths)}, n], "
                f"got {list(target_lengths.shape)}"
            )
        on_host = [length for row in target_lengths.tolist() for length in row]
        if min(on_host, default=1) < 1:
            raise ValueError("MaskPredict: `target_lengths` must be positive")
        return max(on_host, default=0)

    def _search(
        self,
        model: CMLM,
        source: Tensor,
        source_lengths: Tensor,
        target_lengths: Tensor | None = None,
        *,
        width: int | None = None,
    ) -> Hypotheses:
        """From sentences to hypotheses.

        With a `width` all tensors have it, whatever the lengths turn out to be, and nothing here
        waits for the device or copies to it, so that a CUDA graph can hold it: no Python branch
        on values, no selection by them, and no scalar where an operator wants a tensor.
        """
        memory = model.encode(source, source_lengths)
        if target_lengths is None:
            most = model.longest if width is None else width
            limits = length_limits(source_lengths, self.max_ratio, self.max_extra, most)
            target_lengths, log_probs = model.length.predict(
                memory.states, source_lengths, self.length_candidates, limits
            )
        else:
            log_probs = torch.zeros(target_lengths.shape, device=source.device)
        sentences, candidates = target_lengths.shape
        lengths = target_lengths.flatten()
        fixed = width is not None
        if width is None:
            on_host = tuple(lengths.tolist())
            width = max(on_host, default=0)
        if not fixed and lengths.is_cpu and len(on_host) * width <= SMALL:
            live, tokens, scores = _kept_start(on_host, width)
        else:
            live, tokens, scores = _start(lengths, width)
        trace = []
        passes = torch.ones_like(source_lengths)
        # To choose sentences or positions on a GPU would mean to wait for their number.
        chooses = not (fixed or tokens.is_cuda)
        iterations = -(-width // self.block) if self.block else self.iterations
        for iteration in range(1, iterations + 1):
            chosen = None
            if iteration > 1:
                open_ = (tokens == MASK).unflatten(0, (sentences, candidates)).flatten(1).any(1)
                passes += open_
                chosen = open_ if chooses else None
            elif chooses and len(tokens) != 1:  # one alone has no padding to leave out
                chosen = torch.ones_like(passes, dtype=torch.bool)
            tokens, scores = fill(model, tokens, scores, lengths, memory, chosen)
            if self.trace:
                trace.append(tokens)
            if iteration < iterations and self.block:
                later = torch.arange(width, device=source.device) >= iteration * self.block
                tokens = tokens.masked_fill(later & live, MASK)
            elif iteration < iterations:
                again = lengths * (iterations - iteration) // iterations
                tokens, scores = mask_again(tokens, scores, lengths, again)
        total = scores.sum(1).view(sentences, candidates)
        if candidates == 1:
            # The most probable length is always a possible one.
            if self.length_prior:
                total = total + self.length_prior * log_probs
            best = total / target_lengths
            return Hypotheses(tokens[:, None], target_lengths, best, passes, trace)
        # A candidate that stands for no possible length cannot win, whatever the prior's weight.
        possible = log_probs > -torch.inf
        total = total + self.length_prior * log_probs.masked_fill(~possible, 0)
        mean = (total / target_lengths.clamp(min=1)).masked_fill(~possible, -torch.inf)
        best, order = mean.topk(min(self.n_best, candidates), -1)
        rows = (torch.arange(sentences, device=source.device)[:, None] * candidates) + order
        return Hypotheses(
            tokens[rows],
            lengths[rows],
            best,
            passes,
            [state[rows[:, 0]] for state in trace],
        )


def _start(lengths: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions are there, `[B, T]`, a mask in each of them, and no scores."""
    live = torch.arange(width, device=lengths.device) < lengths[:, None]
    tokens = torch.full_like(live, PAD, dtype=torch.long).masked_fill_(live, MASK)
    return live, tokens, torch.zeros(tokens.shape, device=lengths.device)


@kept
def _kept_start(lengths: tuple[int, ...], width: int) -> tuple[Tensor, Tensor, Tensor]:
    return _start(torch.tensor(lengths, dtype=torch.int64, device="cpu"), width)


def mask_again(
    tokens: Tensor, scores: Tensor, lengths: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Masks the `count: [B]` tokens of lowest score in each row of `tokens: [B, T]`."""
    # Nothing is masked yet, so no logits are read.
    unread = scores.new_empty(1, 1, NUM_SPECIAL).expand(*tokens.shape, -1)
    return mask_predict_step(unread, tokens, scores, lengths, count)


def fill(
    model: CMLM,
    tokens: Tensor,
    scores: Tensor,
    lengths: Tensor,
    memory: Memory,
    open_: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One pass: the most probable token at every masked position, and its log-probability.

    `open_: [B]` marks the sentences that have any; if it is None, everything is computed.
    """
    masked = tokens == MASK
    if open_ is None:
        states = model.decode(tokens, lengths, memory)
        best, log_probs = model.fill(states.flatten(0, 1))
        tokens = torch.where(masked, best.view_as(tokens), tokens)
        return tokens, torch.where(masked, log_probs.view_as(scores), scores)
    index = open_.nonzero()[:, 0]
    if len(index) < len(open_):
        rows = open_.repeat_interleave(len(tokens) // max(len(open_), 1))
        part = model.decode(tokens[rows], lengths[rows], memory.select(index), masked[rows])
    else:
        part = model.decode(tokens, lengths, memory, masked)
    best, log_probs = model.fill(part)
    return tokens.masked_scatter(masked, best), scores.masked_scatter(masked, log_probs)
