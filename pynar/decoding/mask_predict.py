"""Parallel decoding: all target tokens at once, then again where the model is least sure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pynar.decoding.hypotheses import Hypotheses
from pynar.models.cmlm import CMLM
from pynar.nn.attention import padding_mask
from pynar.ops import mask_predict_step
from pynar.symbols import MASK, PAD

__all__ = ["MaskPredict"]


@dataclass(frozen=True)
class MaskPredict:
    """Mask-Predict (Ghazvininejad et al. 2019, section 4): `iterations` decoder passes.

    After pass t of N (counted from 1) the floor(n (N - t) / N) tokens of lowest probability are
    masked again. One iteration is plain parallel decoding.

    The `length_candidates` most probable lengths are decoded side by side; the one of the highest
    mean token log-probability wins. `length_prior` w adds w log p(T | x) before the division by
    T. The paper has w = 0; but a model that was shown a wrong length is often sure of itself.
    """

    iterations: int = 10
    length_candidates: int = 5
    length_prior: float = 0.0
    n_best: int = 1
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "length_candidates", "n_best"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"MaskPredict: `{name}` must be positive, got {value}")
        if not self.length_prior >= 0:
            raise ValueError(
                f"MaskPredict: `length_prior` must not be negative, got {self.length_prior}"
            )
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
        memory = model.encode(source, source_lengths)
        if target_lengths is None:
            target_lengths, log_probs = model.length.predict(
                memory.states, source_lengths, self.length_candidates
            )
        else:
            if target_lengths.dim() != 2 or target_lengths.shape[0] != len(source_lengths):
                raise ValueError(
                    f"MaskPredict: `target_lengths` must have shape [{len(source_lengths)}, n], "
                    f"got {list(target_lengths.shape)}"
                )
            if (target_lengths < 1).any():
                raise ValueError("MaskPredict: `target_lengths` must be positive")
            log_probs = torch.zeros(target_lengths.shape, device=source.device)
        sentences, candidates = target_lengths.shape
        lengths = target_lengths.flatten()
        width = int(lengths.max()) if len(lengths) else 0
        live = padding_mask(lengths, width)[:, 0, 0]
        tokens = torch.where(live, MASK, PAD)
        scores = torch.zeros(tokens.shape, device=source.device)
        trace = []
        for iteration in range(1, self.iterations + 1):
            logits = model.logits(model.decode(tokens, lengths, memory))
            logits[..., model.banned] = -torch.inf
            again = lengths * (self.iterations - iteration) // self.iterations
            if self.trace:
                zero = torch.zeros_like(again)
                trace.append(mask_predict_step(logits, tokens, scores, lengths, zero)[0])
            tokens, scores = mask_predict_step(logits, tokens, scores, lengths, again)
        # A candidate that stands for no possible length cannot win, whatever the prior's weight.
        possible = log_probs > -torch.inf
        total = scores.sum(1).view(sentences, candidates)
        total = total + self.length_prior * torch.where(possible, log_probs, 0)
        mean = (total / target_lengths.clamp(min=1)).masked_fill(~possible, -torch.inf)
        best, order = mean.topk(min(self.n_best, candidates), -1)
        rows = (torch.arange(sentences, device=source.device)[:, None] * candidates) + order
        return Hypotheses(
            tokens[rows],
            lengths[rows],
            best,
            torch.full_like(source_lengths, self.iterations),
            [state[rows[:, 0]] for state in trace],
        )
