from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._operator import Operator
from pynar.symbols import NUM_SPECIAL

__all__ = ["mask_predict_step"]


def mask_predict_step(
    logits: Tensor, tokens: Tensor, scores: Tensor, lengths: Tensor, num_masked: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Fills the masked slots of each sentence, then masks the least certain ones again.

    One step of mask-predict decoding (Ghazvininejad et al., 2019). A slot :math:`t <`
    ``lengths[b]`` that holds ``<mask>`` gets

    .. math:: y = \arg\max_v x_v, \qquad s = x_y - \log \sum_v e^{x_v},

    with :math:`x` its row of `logits` and :math:`v` over all symbols but ``<pad>`` and ``<mask>``,
    which are never produced and have no share in the sum; the lowest :math:`v` of equals. All other
    slots keep token and score, and their rows of `logits` are not read. Then the ``num_masked[b]``
    slots with the lowest scores become ``<mask>`` again and keep their scores: the lower :math:`t`
    of equals, and all there are if ``num_masked[b]`` is more. Slots that came in as ``<pad>``,
    ``<s>`` or ``</s>`` are never masked; a slot that came in as ``<mask>`` can be, whatever was
    predicted for it.

    A row without a distribution (a NaN or +inf among its logits, or all of them -inf) yields
    ``<unk>`` with score NaN, and is the first to be masked again. Padding, :math:`t \ge`
    ``lengths[b]``, comes out as ``<pad>`` with score 0. The results are not differentiable.

    Args:
        logits: `[B, T, V]`, float32, bfloat16, float16 or float64.
        tokens: `[B, T]`, int64.
        scores: `[B, T]`, log-probabilities in float32, or in float64 with float64 logits.
        lengths: `[B]`, int64, each in `[0, T]`.
        num_masked: `[B]`, int64, how many slots to mask again.

    Returns:
        The new tokens, `[B, T]`, and the new scores, `[B, T]`.

    Example:
        >>> logits = torch.zeros(1, 3, 8)
        >>> logits[0, 1, 6] = 2.0
        >>> tokens = torch.tensor([[7, 4, 5]])  # 4 is <mask>
        >>> scores = torch.tensor([[-0.1, 0.0, -3.0]])
        >>> tokens, scores = mask_predict_step(
        ...     logits, tokens, scores, torch.tensor([3]), torch.tensor([1])
        ... )
        >>> tokens
        tensor([[7, 6, 4]])
    """
    if torch.is_grad_enabled() and (logits.requires_grad or scores.requires_grad):
        logits, scores = logits.detach(), scores.detach()
    return _OPERATOR(logits, tokens, scores, lengths, num_masked)


def _native(
    extension: Any,
    logits: Tensor,
    tokens: Tensor,
    scores: Tensor,
    lengths: Tensor,
    num_masked: Tensor,
) -> tuple[Tensor, Tensor]:
    if logits.dim() == 3 and logits.stride(2) != 1:
        logits = logits.contiguous()
    # A third of the time that torch.empty takes with shape, dtype and device.
    new_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    new_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    workspace = None
    if logits.is_cuda and logits.dim() == 3:
        size = extension.mask_predict_step_workspace(*logits.shape, logits.element_size())
        workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
    plan = extension.mask_predict_step(
        logits, tokens, scores, lengths, num_masked, new_tokens, new_scores, workspace
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return new_tokens, new_scores


def _reference(
    logits: Tensor, tokens: Tensor, scores: Tensor, lengths: Tensor, num_masked: Tensor
) -> tuple[Tensor, Tensor]:
    check = Check("mask_predict_step")
    check.dims("logits", logits, 3, "[B, T, V]")
    check.dtype("logits", logits, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    batch, steps, vocabulary = logits.shape
    if vocabulary < NUM_SPECIAL:
        check.fail("logits", f"have at least {NUM_SPECIAL} symbols (the special ones)", vocabulary)
    accumulation = torch.float64 if logits.dtype == torch.float64 else torch.float32
    check.shape("tokens", tokens, [batch, steps], "batch and steps of `logits`")
    check.dtype("tokens", tokens, (torch.int64,))
    check.shape("scores", scores, [batch, steps], "batch and steps of `logits`")
    check.dtype("scores", scores, (accumulation,))
    check.shape("lengths", lengths, [batch], "batch of `logits`")
    check.dtype("lengths", lengths, (torch.int64,))
    check.shape("num_masked", num_masked, [batch], "batch of `logits`")
    check.dtype("num_masked", num_masked, (torch.int64,))
    for name, tensor in (
        ("tokens", tokens),
        ("scores", scores),
        ("lengths", lengths),
        ("num_masked", num_masked),
    ):
        check.device(name, tensor, "logits", logits)
    if batch > 0 and steps > 0:
        check.values("lengths", lengths, f"in [0, {steps}]", 0, steps)
        check.values("num_masked", num_masked, "of at least 0", 0)
    return reference.mask_predict_step(logits, tokens, scores, lengths, num_masked)


def _fake(
    logits: Tensor, tokens: Tensor, scores: Tensor, lengths: Tensor, num_masked: Tensor
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), scores.new_empty(scores.shape)


_OPERATOR = Operator(
    "mask_predict_step(Tensor logits, Tensor tokens, Tensor scores, Tensor lengths, "
    "Tensor num_masked) -> (Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
)
