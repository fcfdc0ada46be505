"""Left-to-right results in few passes: one mode of a model drafts, the other verifies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.decoding.autoregressive import length_limits
from pynar.decoding.hypotheses import Hypotheses
from pynar.decoding.mask_predict import fill, mask_again
from pynar.models.janus import JANUS
from pynar.nn.transformer import Memory
from pynar.symbols import EOS, MASK, PAD

__all__ = ["DraftAndVerify"]


@dataclass(frozen=True)
class DraftAndVerify:
    """Greedy search of a model that also predicts in parallel, in fewer passes.

    Each round the rest of the sentence is drafted by `iterations` passes of mask-predict, given
    the tokens that are settled; then one autoregressive pass finds the greedy choice at every
    position of the draft at once. The longest part of it that agrees is settled, and so is the
    greedy choice after it. Tokens and scores are those of `Greedy`: every choice was made from the
    same prefix. (Blockwise parallel decoding, Stern et al. 2018, with the model's own
    non-autoregressive mode for the proposal.) Exactly so where a row's states do not depend on how
    many rows are computed with it, as in frozen models on the CPU; else two choices whose
    probabilities are equal to the last bits can change places.

    Two settings give up exactness: a drafted token is also settled if it is among the `top_k` most
    probable ones, or if its log-probability is less than `margin` below the best one's.

    `passes` counts drafting and verifying passes, `verified` the latter alone, and `accepted` the
    drafted tokens that they settled. Every verifying pass settles one choice more, the last time
    the end of the sentence, so that `accepted + verified` is the length with its EOS. `trace` keeps
    the settled tokens after every round. Lengths are limited as in `Greedy`.
    """

    iterations: int = 1
    top_k: int = 1
    margin: float = 0.0
    max_ratio: float = 2.0
    max_extra: int = 10
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "top_k"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"DraftAndVerify: `{name}` must be positive, got {value}")
        for name in ("margin", "max_ratio", "max_extra"):
            if not (amount := getattr(self, name)) >= 0:
                raise ValueError(f"DraftAndVerify: `{name}` must not be negative, got {amount}")

    @torch.inference_mode()
    def decode(
        self,
        model: JANUS,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
    ) -> Hypotheses:
        """Decodes `source: [B, S]`; the score is the log-probability divided by the length."""
        memory = model.encode(source, source_lengths)
        # One of the tokens that `Greedy` allows is the end.
        limits = length_limits(source_lengths, self.max_ratio, self.max_extra, model.longest) - 1
        expected, _ = model.length.predict(memory.states, source_lengths, 1, limits.clamp(min=1))
        rows = len(limits)
        width = int(limits.max()) if rows else 0
        live = torch.arange(rows, device=source.device)
        found = source.new_full((rows, width), PAD)
        lengths = torch.zeros_like(limits)
        scores = torch.zeros(rows, device=source.device)
        passes = torch.zeros_like(limits)
        accepted = torch.zeros_like(limits)
        verified = torch.zeros_like(limits)
        trace = []
        while len(live):
            settled, limit = lengths[live], limits[live]
            ends = torch.maximum(expected[live, 0], settled + 1).minimum(limit)
            tokens = found[live, : int(ends.max())]
            tokens, made = self._draft(model, tokens, settled, ends, memory)
            agreed, chosen, gained = self._verify(model, tokens, settled, ends, limit, memory)
            # What follows the agreed part is the model's own choice, or the limit's: the end.
            place = torch.arange(tokens.shape[1], device=source.device)
            tokens = torch.where(place < agreed[:, None], tokens, PAD)
            found[live, : tokens.shape[1]] = tokens
            on = chosen != EOS
            found[live[on], agreed[on]] = chosen[on]
            lengths[live] = agreed + on
            scores[live] += gained
            passes[live] += made + 1
            accepted[live] += agreed - settled
            verified[live] += 1
            if self.trace:
                trace.append(found.clone())
            keep = on.nonzero()[:, 0]
            if len(keep) < len(live):
                live, memory = live[keep], memory.select(keep)
        width = int(lengths.max()) if rows else 0
        return Hypotheses(
            found[:, None, :width],
            lengths[:, None],
            (scores / (lengths + 1))[:, None],
            passes,
            [state[:, :width] for state in trace],
            accepted,
            verified,
        )

    def _draft(
        self, model: JANUS, tokens: Tensor, settled: Tensor, ends: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Fills `tokens: [B, T]` from `settled: [B]` to `ends: [B]`; and how many passes it took.

        As in mask-predict; but what is settled is sure.
        """
        place = torch.arange(tokens.shape[1], device=tokens.device)
        drafted = (place >= settled[:, None]) & (place < ends[:, None])
        tokens = tokens.masked_fill(drafted, MASK)
        scores = torch.zeros(tokens.shape, device=tokens.device).masked_fill(~drafted, torch.inf)
        passes = torch.zeros_like(settled)
        for iteration in range(1, self.iterations + 1):
            open_ = (tokens == MASK).any(1)
            if not open_.any():
                break
            passes += open_
            tokens, scores = fill(model, tokens, scores, ends, memory, open_)
            if iteration < self.iterations:
                again = (ends - settled) * (self.iterations - iteration) // self.iterations
                tokens, scores = mask_again(tokens, scores, ends, again)
        return tokens, passes

    def _verify(
        self,
        model: JANUS,
        tokens: Tensor,
        settled: Tensor,
        ends: Tensor,
        limits: Tensor,
        memory: Memory,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How much of each row is right, the choice that follows, and the log-probability gained.

        All three are `[B]`. A choice at the limit is the end of the sentence.
        """
        states = model.ahead(tokens, ends, settled, memory)
        best, log_probs, lse = model.best(states, self.top_k)
        counts = ends - settled + 1
        first = counts.cumsum(0) - counts
        row = torch.arange(len(ends), device=ends.device).repeat_interleave(counts)
        number = torch.arange(len(row), device=ends.device)
        place = number - first[row] + settled[row]
        drafted = F.pad(tokens, (0, 1), value=PAD)[row, place]
        same = best == drafted[:, None]
        right = same.any(1)
        price = log_probs.masked_fill(~same, 0).sum(1)
        if self.margin:
            other = model.log_prob(states, drafted, lse)
            price = torch.where(right, price, other)
            right |= other > log_probs[:, 0] - self.margin
        # The last position of each row has no draft, so each row has a first wrong one.
        wrong = (~right | (place == ends[row])).nonzero()[:, 0]
        stop = torch.full_like(first, len(row)).scatter_reduce(0, row[wrong], wrong, "amin")
        agreed = stop - first + settled
        gained = price.masked_fill(number >= stop[row], 0)
        gained = torch.zeros_like(gained[: len(ends)]).index_add(0, row, gained)
        chosen, last = best[stop, 0], log_probs[stop, 0]
        at_limit = agreed == limits
        if at_limit.any():
            # The last allowed token is the end of the sentence, at its own price.
            chosen = torch.where(at_limit, EOS, chosen)
            last = torch.where(at_limit, model.log_prob(states[stop], chosen, lse[stop]), last)
        return agreed, chosen, gained + last
