from __future__ import annotations

import torch
from torch import Tensor

from pynar.symbols import BOS, EOS, MASK, PAD, UNK

__all__ = ["mask_predict_step"]


def mask_predict_step(
    logits: Tensor, tokens: Tensor, scores: Tensor, lengths: Tensor, num_masked: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Fills the masked slots of each sentence, then masks the least certain ones again.

    The definition of :func:`pynar.ops.mask_predict_step`, in plain PyTorch: the same arguments, the
    same results. Computes in float32, or in float64 for float64 logits.
    """
    steps = logits.shape[1]
    excluded = torch.tensor([PAD, MASK], device=logits.device)
    allowed = logits.to(scores.dtype).contiguous().index_fill(-1, excluded, -torch.inf)
    # The argmax of the logits themselves: two of them can differ by less than the rounding of their
    # log-probabilities.
    best_tokens = allowed.argmax(-1)
    best = allowed.gather(-1, best_tokens[..., None])
    # log_softmax adds up a row of 32,000 float32 one after another and is off by 1e-5.
    best_scores = -allowed.sub_(best).logsumexp(-1)
    # NaN: the row has no distribution (a NaN or +inf in it, or -inf throughout).
    best_tokens = best_tokens.masked_fill(best_scores.isnan(), UNK)

    position = torch.arange(steps, device=logits.device)
    live = position < lengths[:, None]
    masked = live & (tokens == MASK)
    new_tokens = torch.where(masked, best_tokens, tokens)
    new_scores = torch.where(masked, best_scores, scores)

    candidate = live & (tokens != PAD) & (tokens != BOS) & (tokens != EOS)
    # Two stable sorts order the slots by (is no candidate, score, position), and the inverse of the
    # permutation is each slot's rank.
    order = new_scores.masked_fill(new_scores.isnan(), -torch.inf).argsort(dim=1, stable=True)
    others = (~candidate).gather(1, order).to(torch.int8)
    order = order.gather(1, others.argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)
    masked_again = candidate & (rank < num_masked[:, None])

    new_tokens = new_tokens.masked_fill(masked_again, MASK).masked_fill(~live, PAD)
    new_scores = new_scores.masked_fill(~live, 0)
    return new_tokens, new_scores
