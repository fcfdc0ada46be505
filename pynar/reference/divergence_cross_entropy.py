from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["divergence_cross_entropy", "divergence_cross_entropy_backward"]

Pairs = Sequence[tuple[int, int]]


def _difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`log p - log q`; 0 where both probabilities are zero."""
    both_zero = (log_p == -torch.inf) & (log_q == -torch.inf)
    return (log_p - log_q).masked_fill(both_zero, 0)


def _directed(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row: a symbol that only p can produce makes it infinite, however small p
    is, and one that p cannot produce adds nothing."""
    terms = log_p.exp() * _difference(log_p, log_q)
    terms = terms.masked_fill((log_q == -torch.inf) & (log_p > -torch.inf), torch.inf)
    return terms.masked_fill(log_p == -torch.inf, 0).sum(-1)


def divergence_cross_entropy(
    logits: Sequence[Tensor], targets: Tensor, pairs: Pairs = (), *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each head and symmetric Kullback-Leibler divergence of pairs of heads.

    The definition of :func:`pynar.ops.divergence_cross_entropy`, in plain PyTorch: the same
    arguments, the same results, and in addition the statistics that the gradients need,
    `[2 C + 2 P, N]`: the greatest logit of each head, the logarithm of its sum of exponentials of
    logits less that, and KL(p || q) and KL(q || p) of each pair in turn. Computes in float32, or in
    float64 for float64 logits.
    """
    accumulation = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    maxima, log_sums, log_probs, cross_entropy = [], [], [], []
    for head in logits:
        x = head.to(accumulation)
        maximum = x.amax(-1)
        shifted = x - maximum[:, None]
        log_sum = shifted.exp().sum(-1).log()
        log_prob = shifted - log_sum[:, None]
        loss = -(1 - label_smoothing) * log_prob.gather(1, targets[:, None])[:, 0]
        if label_smoothing != 0:
            loss = loss - label_smoothing * log_prob.mean(-1)
        maxima.append(maximum)
        log_sums.append(log_sum)
        log_probs.append(log_prob)
        cross_entropy.append(loss)
    directed = [
        _directed(log_probs[a], log_probs[b]) for p, q in pairs for a, b in ((p, q), (q, p))
    ]
    rows = targets.shape[0]
    divergence = torch.empty(len(pairs), rows, dtype=accumulation, device=targets.device)
    if pairs:
        divergence = torch.stack(directed).view(len(pairs), 2, rows).mean(1)
    return torch.stack(cross_entropy), divergence, torch.stack(maxima + log_sums + directed)


def divergence_cross_entropy_backward(
    grad_cross_entropy: Tensor,
    grad_divergence: Tensor,
    logits: Sequence[Tensor],
    targets: Tensor,
    statistics: Tensor,
    pairs: Pairs,
    label_smoothing: float,
) -> list[Tensor]:
    """The gradients of :func:`divergence_cross_entropy` by each head's logits.

    With :math:`K` half the sum of both directed divergences of :math:`p` and :math:`q`,
    :math:`dK / dx^p_v = ((p_v - q_v) + p_v (\\log p_v - \\log q_v - KL(p \\| q))) / 2`. A term
    whose factor is zero has no part in a row, even where it is not finite; an infinite divergence
    with another factor makes the row NaN.
    """
    count = len(logits)
    maxima, log_sums, directed = statistics.split([count, count, 2 * len(pairs)])
    log_probs = [
        x.to(statistics.dtype) - m[:, None] - s[:, None]
        for x, m, s in zip(logits, maxima, log_sums, strict=True)
    ]
    probs = [x.exp() for x in log_probs]
    grads = []
    for head, factor in zip(probs, grad_cross_entropy[:, :, None].unbind(), strict=True):
        smooth = head - label_smoothing / head.shape[1]
        source = torch.full_like(targets, label_smoothing - 1, dtype=head.dtype)[:, None]
        grad = factor * smooth.scatter_add(1, targets[:, None], source)
        grads.append(torch.where(factor == 0, 0, grad))
    for i, (p, q) in enumerate(pairs):
        factor = grad_divergence[i, :, None]
        both = directed[2 * i : 2 * i + 2]
        both = torch.where(both.isfinite().all(0), both, torch.nan)
        for a, b, mean in ((p, q, both[0]), (q, p, both[1])):
            centred = _difference(log_probs[a], log_probs[b]) - mean[:, None]
            grad = factor / 2 * (probs[a] - probs[b] + probs[a] * centred)
            grads[a] = grads[a] + torch.where(factor == 0, 0, grad)
    return [grad.to(x.dtype) for grad, x in zip(grads, logits, strict=True)]
