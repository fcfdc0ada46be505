from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interval_attention", "interval_attention_backward", "interval_mask"]


def interval_mask(intervals: Tensor, key_length: int) -> Tensor:
    """Tells which keys lie in an interval: `[..., R, 2] -> [..., key_length]`, boolean."""
    keys = torch.arange(key_length, device=intervals.device)
    begin, end = intervals[..., None].unbind(-2)
    return ((begin <= keys) & (keys < end)).any(-2)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys in its intervals.

    The definition of :func:`pynar.ops.interval_attention`, in plain PyTorch: the same arguments,
    the same results. Computes in float32, or in float64 for float64 inputs.
    """
    if q.dim() == 3:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    accumulation = torch.float64 if q.dtype == torch.float64 else torch.float32
    visible = interval_mask(intervals, k.shape[-2])
    visible = visible if q.dim() == 3 else visible[:, None]
    scores = q.to(accumulation) @ k.to(accumulation).transpose(-1, -2) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    values = v.to(accumulation)
    out = weights @ values.nan_to_num(0, 0, 0)
    # 0 * NaN is NaN, but a value that is not finite must reach only those who see it.
    undefined = visible.to(accumulation) @ (~values.isfinite()).to(accumulation) > 0
    out = out.masked_fill(undefined, torch.nan).to(q.dtype)
    if q.dim() == 3:
        out, lse = out.transpose(0, 1), lse.transpose(0, 1)
    out, lse = out.contiguous(), lse.contiguous()
    return (out, lse) if return_lse else out


def interval_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`interval_attention` by `q`, `k` and `v`, from what it returned.

    With :math:`p` the weights: :math:`dv_j = \\sum_i p_{ij} g_i` and
    :math:`ds_{ij} = p_{ij} (g_i^\\top v_j - g_i^\\top y_i)`.
    """
    packed = q.dim() == 3
    dtype = q.dtype
    accumulation = lse.dtype
    g, q, k, v, out = (x.to(accumulation) for x in (grad_out, q, k, v, out))
    if packed:
        g, q, k, v, out, lse = (x.transpose(0, 1) for x in (g, q, k, v, out, lse))
    visible = interval_mask(intervals, k.shape[-2])
    visible = visible if packed else visible[:, None]
    # Keys that nobody sees, and queries that see nothing, may hold anything.
    unseen = ~visible.any(-2)[..., None]
    blind = ~visible.any(-1)[..., None]
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    g, q, out = (x.masked_fill(blind, 0) for x in (g, q, out))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    grad_v = weights.transpose(-1, -2) @ g
    grad_scores = weights * (g @ v.transpose(-1, -2) - (g * out).sum(-1, keepdim=True)) * scale
    grad_q = grad_scores @ k
    grad_k = grad_scores.transpose(-1, -2) @ q
    if packed:
        grad_q, grad_k, grad_v = (x.transpose(0, 1) for x in (grad_q, grad_k, grad_v))
    grad_q, grad_k, grad_v = (x.to(dtype).contiguous() for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v
