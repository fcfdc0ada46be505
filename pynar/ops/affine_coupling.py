from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._flow import accumulation, check_steps, readable
from pynar.ops._operator import Operator

__all__ = ["affine_coupling"]


def affine_coupling(
    z: Tensor, lengths: Tensor, shift: Tensor, raw_scale: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts by what a coupling network made of the other half, or undoes it.

    .. math:: y = \sigma(r + 2) \odot z + \mu, \qquad
              \log|\det J|_b = \sum_{t < \mathrm{lengths}_b} \sum_c \log \sigma(r_{btc} + 2),

    the affine coupling of FlowSeq (Ma et al., 2019), with the scale below one, and 0.88 for a
    network that starts at zero. The inverse direction computes
    :math:`z = (y - \mu) / \sigma(r + 2)` and the negative log-determinant. Padding may hold
    anything and comes out as zero.

    Args:
        z: `[B, T, C]`, float32, bfloat16, float16 or float64.
        lengths: `[B]`, int64, each in `[0, T]`.
        shift: `[B, T, C]`, :math:`\mu`, of the same type; halves of one tensor are read in place.
        raw_scale: `[B, T, C]`, :math:`r`, of the same type.
        inverse: whether to undo the map.

    Returns:
        The result, `[B, T, C]`, and the log-determinant, `[B]`, float32 (float64 for float64).

    Example:
        >>> zero = torch.zeros(1, 2, 1)
        >>> y, logdet = affine_coupling(zero + 1, torch.tensor([1]), zero, zero)
        >>> y
        tensor([[[0.8808],
                 [0.0000]]])
        >>> logdet
        tensor([-0.1269])
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, shift, raw_scale)):
        return _Differentiable.apply(z, lengths, shift, raw_scale, inverse)
    return _FORWARD(z, lengths, shift, raw_scale, inverse)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        z: Tensor, lengths: Tensor, shift: Tensor, raw_scale: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return _FORWARD.call(z, lengths, shift, raw_scale, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        z, lengths, _, raw_scale, ctx.inverse = inputs
        ctx.save_for_backward(output[0] if ctx.inverse else z, raw_scale, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        grad_z, grad_shift, grad_raw_scale = _BACKWARD.call(
            grad_y, grad_logdet, *ctx.saved_tensors, ctx.inverse
        )
        return grad_z, None, grad_shift, grad_raw_scale, None


def _native(
    extension: Any, z: Tensor, lengths: Tensor, shift: Tensor, raw_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, logdet = _fake(z, lengths, shift, raw_scale, inverse)
    workspace = logdet.new_empty(z.shape[:2])
    plan = extension.affine_coupling(
        readable(z), lengths, readable(shift), readable(raw_scale), inverse, y, logdet, workspace
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return y, logdet


def _backward_native(
    extension: Any,
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    lengths: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(grad_y, grad_logdet, x, raw_scale, lengths, inverse)
    plan = extension.affine_coupling_backward(
        *(readable(grad_y), grad_logdet, readable(x), readable(raw_scale), lengths, inverse),
        *grads,
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return grads


def _check(check: Check, name: str, z: Tensor, lengths: Tensor, **others: Tensor) -> None:
    check_steps(check, name, z, lengths)
    for other_name, tensor in others.items():
        check.shape(other_name, tensor, list(z.shape), f"that of `{name}`")
        check.dtype(other_name, tensor, (z.dtype,))
        check.device(other_name, tensor, name, z)


def _reference(
    z: Tensor, lengths: Tensor, shift: Tensor, raw_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    _check(Check("affine_coupling"), "z", z, lengths, shift=shift, raw_scale=raw_scale)
    return reference.affine_coupling(z, lengths, shift, raw_scale, inverse=inverse)


def _backward_reference(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    lengths: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check = Check("affine_coupling_backward")
    _check(check, "grad_y", grad_y, lengths, x=x, raw_scale=raw_scale)
    check.shape("grad_logdet", grad_logdet, [grad_y.shape[0]], "batch of `grad_y`")
    check.dtype("grad_logdet", grad_logdet, (accumulation(grad_y.dtype),))
    return reference.affine_coupling_backward(grad_y, grad_logdet, x, raw_scale, lengths, inverse)


def _fake(
    z: Tensor, lengths: Tensor, shift: Tensor, raw_scale: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[:1], dtype=accumulation(z.dtype))


def _backward_fake(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    lengths: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)


_FORWARD = Operator(
    "affine_coupling(Tensor z, Tensor lengths, Tensor shift, Tensor raw_scale, bool inverse) "
    "-> (Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
)

_BACKWARD = Operator(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor raw_scale, "
    "Tensor lengths, bool inverse) -> (Tensor, Tensor, Tensor)",
    native=_backward_native,
    reference=_backward_reference,
    fake=_backward_fake,
)
