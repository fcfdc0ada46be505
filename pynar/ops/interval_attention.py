from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._operator import Operator

__all__ = ["interval_attention"]

MAX_INTERVALS = 4
MAX_HEAD_DIM = 128


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attends from each query to the keys that lie in its intervals.

    With :math:`J_i` the keys :math:`j` in any of the half-open intervals of query :math:`i`,

    .. math:: s_{ij} = \mathrm{scale} \cdot q_i^\top k_j, \qquad
              \mathrm{lse}_i = \log \sum_{j \in J_i} e^{s_{ij}}, \qquad
              y_i = \sum_{j \in J_i} e^{s_{ij} - \mathrm{lse}_i} v_j.

    One to four intervals a query give the masks of the non-autoregressive family without a matrix
    of `[T, T]`: padding is one interval, a causal mask :math:`[0, i + 1)`, and two are enough for
    the two-stream patterns of JANUS; see :func:`two_stream_intervals`. In the packed form the
    sentences of a batch follow each other without padding, and are intervals too.

    An interval with begin :math:`\ge` end is empty; a key in several intervals counts once. A query
    without keys gets zeros, an lse of -inf and no gradient. A key that a query does not see has no
    influence on its result, even if it holds NaN. What else is in the batch changes no bit of a
    result; only 16-bit calls of the packed form on a GPU depend on it, within rounding. Sums are in
    float32, or in float64 for float64 inputs. Where bfloat16 is multiplied as it is (GPUs, and CPUs
    with AVX512_BF16), so are the weights, rounded; such CPUs take subnormal numbers as zeros.
    Gradients have no gradients: a second derivative is an error.

    Args:
        q: `[N, H, D]` (packed) or `[B, H, T, D]`, float32, bfloat16, float16 or float64; D up to
            128.
        k: `[M, H, D]` or `[B, H, S, D]`. Of `k` and `v` only the last dimension must be contiguous:
            views of one projection and slices of a cache are read in place.
        v: of the shape of `k`.
        intervals: `[N, R, 2]` or `[B, T, R, 2]`, int32, R from 1 to 4: begin and end, as indices of
            keys of the whole batch (packed) or of the sentence.
        scale: of the scores; :math:`D^{-1/2}` by default.
        return_lse: whether to return the log-sum-exp of the scores too. It carries no gradient.

    Returns:
        The outputs, in the shape and dtype of `q`, contiguous; with `return_lse` also lse, `[N, H]`
        or `[B, H, T]`, in float32 (float64 for float64 inputs).

    Example:
        >>> v = torch.tensor([1.0, 3.0, 5.0]).reshape(3, 1, 1)
        >>> intervals = torch.tensor([[[0, 1]], [[0, 2]], [[2, 2]]], dtype=torch.int32)
        >>> interval_attention(torch.zeros_like(v), v, v, intervals).flatten()
        tensor([1., 2., 0.])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _Differentiable.apply(q, k, v, intervals, scale)
    else:
        out, lse = _FORWARD(q, k, v, intervals, scale)
    return (out, lse) if return_lse else out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return _FORWARD.call(q, k, v, intervals, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, intervals, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, intervals, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 5
        return (*_BACKWARD.call(grad_out, *ctx.saved_tensors, ctx.scale), None, None)


def _readable(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def _native(
    extension: Any, q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if q.dim() in (3, 4):
        q, k, v, intervals = _readable(q), _readable(k), _readable(v), _readable(intervals)
    out, lse = _fake(q, k, v, intervals, scale)
    plan = extension.interval_attention(q, k, v, intervals, scale, out, lse)
    if plan is not None:
        _nvrtc.launch(plan)
    return out, lse


def _check(check: Check, q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> None:
    packed = q.dim() == 3
    if not packed:
        check.dims("q", q, 4, "[B, H, T, D], or 3 [N, H, D]")
    check.dtype("q", q, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    dim = q.shape[-1]
    if not 1 <= dim <= MAX_HEAD_DIM:
        check.fail("q", f"have 1 to {MAX_HEAD_DIM} channels a head", dim)
    if packed:
        check.dims("k", k, 3, "[N, H, D]")
        check.shape("k", k, [k.shape[0], *q.shape[1:]], "heads and channels of `q`")
        check.shape("v", v, list(k.shape), "that of `k`")
        check.dims("intervals", intervals, 3, "[N, R, 2]")
        wanted = [q.shape[0], intervals.shape[1], 2]
        check.shape("intervals", intervals, wanted, "queries of `q`, R, begin and end")
    else:
        check.dims("k", k, 4, "[B, H, T, D]")
        wanted = [*q.shape[:2], k.shape[2], dim]
        check.shape("k", k, wanted, "batch, heads and channels of `q`")
        check.shape("v", v, list(k.shape), "that of `k`")
        check.dims("intervals", intervals, 4, "[B, T, R, 2]")
        wanted = [q.shape[0], q.shape[2], intervals.shape[2], 2]
        check.shape("intervals", intervals, wanted, "batch and queries of `q`, R, begin and end")
    check.dtype("k", k, (q.dtype,))
    check.dtype("v", v, (q.dtype,))
    check.dtype("intervals", intervals, (torch.int32,))
    if not 1 <= intervals.shape[-2] <= MAX_INTERVALS:
        check.fail("intervals", f"have 1 to {MAX_INTERVALS} intervals a query", intervals.shape[-2])
    for name, tensor in (("k", k), ("v", v), ("intervals", intervals)):
        check.device(name, tensor, "q", q)
    if q.device.type != "cpu" or q.numel() == 0:
        return
    keys = k.shape[-3 if packed else -2]
    begin, end = intervals.unbind(-1)
    wrong = ((begin < end) & ((begin < 0) | (end > keys))).reshape(-1, *intervals.shape[-3:-1])
    for b, t, r in wrong.nonzero()[:1].tolist():
        first, last = intervals.reshape(*wrong.shape, 2)[b, t, r].tolist()
        got = f"[{first}, {last}) (sentence {b}, query {t})"
        check.fail("intervals", f"lie in [0, {keys}]", got)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    _check(Check("interval_attention"), q, k, v, intervals)
    return reference.interval_attention(q, k, v, intervals, scale=scale, return_lse=True)  # type: ignore[return-value]


def _fake(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Made from a torch.Size a tensor takes three times as long as from a tuple.
    shape = tuple(q.shape[:-1])
    if q.dtype in (torch.bfloat16, torch.float16):
        return out, q.new_empty(shape, dtype=torch.float32)
    return out, q.new_empty(shape)


def _backward_native(
    extension: Any,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.dim() in (3, 4):
        q, k, v, intervals = _readable(q), _readable(k), _readable(v), _readable(intervals)
        grad_out, out = _readable(grad_out), _readable(out)
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    workspace = None
    if q.is_cuda:
        batch, heads, queries, _ = q.shape if q.dim() == 4 else (1, q.shape[1], q.shape[0], 0)
        size = extension.interval_attention_backward_workspace(
            batch, heads, queries, q.element_size()
        )
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    plan = extension.interval_attention_backward(
        grad_out, q, k, v, intervals, out, lse, scale, *grads, workspace
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return grads  # type: ignore[return-value]


def _backward_reference(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check = Check("interval_attention_backward")
    _check(check, q, k, v, intervals)
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        check.shape(name, tensor, list(q.shape), "that of `q`")
        check.dtype(name, tensor, (q.dtype,))
        check.device(name, tensor, "q", q)
    return reference.interval_attention_backward(grad_out, q, k, v, intervals, out, lse, scale)


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_FORWARD = Operator(
    "interval_attention(Tensor q, Tensor k, Tensor v, Tensor intervals, float scale) "
    "-> (Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
)

_BACKWARD = Operator(
    "interval_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor intervals, "
    "Tensor out, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    native=_backward_native,
    reference=_backward_reference,
    fake=_backward_fake,
)
