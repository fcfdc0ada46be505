from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._flow import (
    accumulation,
    backward_on_squeezed_steps,
    check_map,
    check_squeeze,
    log_determinant,
    map_sizes,
    on_squeezed_steps,
    readable,
)
from pynar.ops._operator import Operator
from pynar.ops.batched_logdet import batched_logdet

__all__ = ["LAYOUTS", "flow_linear", "head_products"]

LAYOUTS = ("contiguous", "strided", "alternating")


def flow_linear(
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    *,
    layout: str = "alternating",
    inverse: bool = False,
    factors: tuple[Tensor, Tensor] | None = None,
    squeeze: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Applies :math:`K` steps of :func:`actnorm` and :func:`head_linear`, all in one pass.

    .. math:: x^{k+1} = W_k \cdot (x^k \odot e^{s_k} + b_k), \qquad
              \log|\det J|_b = \mathrm{lengths}_b \sum_k
                  \Big( \sum_c s_{kc} + H \log|\det W_k| \Big),

    with :math:`W_k \cdot` the product with each of the :math:`H = C / d` heads. All steps are maps
    of one position, so that a position goes through all of them while it lies in cache: the states
    are read once and written once, however many steps there are. The gradients keep `x` alone and
    compute what lies between again in the same way, so the memory of a chain of steps does not
    grow with its length. The inverse direction undoes the steps from the last to the first.

    Args:
        x: `[B, T, C]`, float32, bfloat16, float16 or float64. Between steps states are float32
            (float64 for float64). Padding, :math:`t \ge` ``lengths[b]``, may hold anything and
            comes out as zero.
        lengths: `[B]`, int64, each in `[0, T]`.
        log_scale: `[K, C]`, :math:`s`, float32 (float64 for float64 `x`).
        bias: `[K, C]`, :math:`b`, of the same type.
        weight: `[K, d, d]`, :math:`W`, of the same type; `d` divides `C`.
        layout: as of :func:`head_linear`, or ``"alternating"``: contiguous heads in steps 0, 2, ...
            and strided ones in between, as in FlowSeq (Ma et al., 2019).
        inverse: whether to undo the map.
        factors: what :func:`batched_logdet` returned for `weight`, if it is at hand.
        squeeze: joins so many neighbouring steps first, as :func:`squeeze` does, and in the inverse
            direction takes them apart afterwards, in the same pass: `x`, or else the result, is
            `[B, f T, C / f]`, and `lengths` are those of its steps, in `[0, f T]`. The map acts on
            `ceil(lengths / f)` joined steps, which is what the log-determinant counts; of the last
            one, what lies beyond the sentence counts as zero, and comes out as zero where it is
            taken apart.

    Returns:
        The result, `[B, T, C]`, and the log-determinant, `[B]`, of `weight`'s type.

    Example:
        >>> x, lengths = torch.ones(1, 1, 4), torch.tensor([1])
        >>> scale, bias = torch.zeros(2, 4), torch.zeros(2, 4)
        >>> weight = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]).expand(2, 2, 2)
        >>> y, logdet = flow_linear(x, lengths, scale, bias, weight)
        >>> y
        tensor([[[4., 6., 6., 9.]]])
        >>> logdet.exp()
        tensor([1296.])
    """
    check = Check("flow_linear")
    if layout not in LAYOUTS:
        check.fail("layout", f"be one of {', '.join(LAYOUTS)}", repr(layout))
    check.dims("weight", weight, 3, "[K, d, d]")
    logdet, inverses = batched_logdet(weight) if factors is None else factors
    matrices = inverses if inverse else weight
    y = head_products(
        "flow_linear", x, lengths, log_scale, bias, matrices, layout, inverse, squeeze
    )
    heads = map_sizes(x, inverse, squeeze)[0][2] // weight.shape[2]
    by_step = log_scale.sum() + heads * logdet.sum()
    return y, log_determinant(lengths, by_step, inverse, squeeze)


def head_products(
    name: str,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int = 1,
) -> Tensor:
    """The first result of :func:`flow_linear`, for the operator `name`.

    `weight` holds the inverses for the inverse direction; without `log_scale` and `bias` there are
    only products.
    """
    parameters = (x, log_scale, bias, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parameters):
        return _Differentiable.apply(name, *parameters, lengths, layout, inverse, squeeze)
    return _FORWARD.call(name, x, lengths, log_scale, bias, weight, layout, inverse, squeeze)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        x: Tensor,
        log_scale: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        lengths: Tensor,
        layout: str,
        inverse: bool,
        squeeze: int,
    ) -> Tensor:
        return _FORWARD.call(name, x, lengths, log_scale, bias, weight, layout, inverse, squeeze)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, *tensors, ctx.layout, ctx.inverse, ctx.squeeze = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, log_scale, bias, weight, lengths = ctx.saved_tensors
        grad_x, *grads, grad_weight = _BACKWARD.call(
            *(ctx.name, grad_y, x, lengths, log_scale, bias, weight),
            *(ctx.layout, ctx.inverse, ctx.squeeze),
        )
        by_channel = grads if log_scale is not None else (None, None)
        return (None, grad_x, *by_channel, grad_weight, None, None, None, None)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _native(
    extension: Any,
    name: str,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int,
) -> Tensor:
    if x.dim() != 3:
        check_map(Check(name), x, lengths, inverse, squeeze)
    y = _fake(name, x, lengths, log_scale, bias, weight, layout, inverse, squeeze)
    parameters = _contiguous(log_scale, bias, weight)
    plan = extension.flow_linear(
        name, readable(x), lengths, *parameters, LAYOUTS.index(layout), inverse, squeeze, y
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return y


def _backward_native(
    extension: Any,
    name: str,
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _backward_fake(
        name, grad_y, x, lengths, log_scale, bias, weight, layout, inverse, squeeze
    )
    parameters = _contiguous(log_scale, bias, weight)
    workspace = None
    if x.is_cuda and x.dim() == 3 and weight.dim() == 3 and squeeze > 0:
        size = extension.flow_linear_backward_workspace(
            *map_sizes(x, inverse, squeeze)[0], *weight.shape[:2], weight.element_size()
        )
        workspace = weight.new_empty(size)
    plan = extension.flow_linear_backward(
        *(name, readable(grad_y), readable(x), lengths, *parameters, LAYOUTS.index(layout)),
        *(inverse, squeeze, *grads, workspace),
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return grads


def _check(
    check: Check,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    inverse: bool,
    squeeze: int,
) -> None:
    _, channels = check_map(check, x, lengths, inverse, squeeze)
    check.dims("weight", weight, 3, "[K, d, d]")
    steps, dim = len(weight), weight.shape[1]
    check.shape("weight", weight, [steps, dim, dim], "a square matrix a step")
    if dim == 0 or channels % dim != 0:
        check.fail("weight", f"be of a size that divides the {channels} channels of `x`", dim)
    for name, tensor in (("weight", weight), ("log_scale", log_scale), ("bias", bias)):
        if tensor is None:
            continue
        if name != "weight":
            check.shape(name, tensor, [steps, channels], "steps of `weight`, channels of `x`")
        check.dtype(name, tensor, (accumulation(x.dtype),))
        check.device(name, tensor, "x", x)


def _reference(
    name: str,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int,
) -> Tensor:
    _check(Check(name), x, lengths, log_scale, bias, weight, inverse, squeeze)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return reference.flow_linear_map(x, lengths, log_scale, bias, weight, layout, inverse)

    return on_squeezed_steps(run, x, lengths, inverse, squeeze)


def _backward_reference(
    name: str,
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(Check(f"{name}_backward"), x, lengths, log_scale, bias, weight, inverse, squeeze)
    parameters = {"log_scale": log_scale, "bias": bias, "weight": weight, "layout": layout}
    run = functools.partial(reference.flow_linear_map_backward, **parameters)  # type: ignore[arg-type]
    return backward_on_squeezed_steps(run, grad_y, x, lengths, inverse, squeeze)  # type: ignore[return-value]


def _fake(
    name: str,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int,
) -> Tensor:
    check_squeeze(name, x, inverse, squeeze)
    return x.new_empty(map_sizes(x, inverse, squeeze)[1])


def _backward_fake(
    name: str,
    grad_y: Tensor,
    x: Tensor,
    lengths: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    layout: str,
    inverse: bool,
    squeeze: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = (
        log_scale.shape if log_scale is not None else (0, map_sizes(x, inverse, squeeze)[0][2])
    )
    return (
        x.new_empty(x.shape),
        weight.new_empty(channels),
        weight.new_empty(channels),
        weight.new_empty(weight.shape),
    )


_FORWARD = Operator(
    "flow_linear(str name, Tensor x, Tensor lengths, Tensor? log_scale, Tensor? bias, "
    "Tensor weight, str layout, bool inverse, int squeeze) -> Tensor",
    native=_native,
    reference=_reference,
    fake=_fake,
)

_BACKWARD = Operator(
    "flow_linear_backward(str name, Tensor grad_y, Tensor x, Tensor lengths, Tensor? log_scale, "
    "Tensor? bias, Tensor weight, str layout, bool inverse, int squeeze) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    native=_backward_native,
    reference=_backward_reference,
    fake=_backward_fake,
)
