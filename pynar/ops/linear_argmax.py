"""The vocabulary projection and its argmax in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._operator import Operator
from pynar.ops.packed_linear import PackedWeight, check_packed

__all__ = ["linear_argmax"]

MOST_ON_GPU = 16  # candidates that a GPU thread holds; csrc/linear/linear_argmax.h


def linear_argmax(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    k: int | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    r"""The most probable symbols of each row, without the logits in memory.

    With :math:`z = x W^T + b`,

    .. math:: y = \arg\max_v z_v, \qquad s = z_y - \log \sum_v e^{z_v},

    the lowest :math:`v` of equals. With `k`, the k greatest in descending order. A symbol whose
    bias is -inf is never chosen and has no share in the sum; where fewer than `k` are left, the
    rest is ``<unk>`` with log-probability -inf. A row without a distribution (a NaN or +inf among
    its logits, or all of them -inf) yields ``<unk>`` and NaN.

    Rows are independent of each other to the last bit, and so of the batch. The results are not
    differentiable.

    Args:
        x: `[N, C]`, float32, bfloat16 or float16. In float64, and on a GPU with `k` above 16, the
            reference computes.
        weight: `[V, C]` in the type of `x`, or a `PackedWeight` with float32 `x` on the CPU.
        bias: `[V]`, float32 (float64 with float64 `x`).
        k: how many symbols of each row; None for one, without a dimension for it.
        return_lse: also return the log-sum-exp of every row, `[N]`.

    Returns:
        Tokens, int64 `[N]` or `[N, k]`; log-probabilities of the same shape in float32 (float64
        for float64); with `return_lse` the log-sum-exp `[N]`.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> weight = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> linear_argmax(x, weight)[0]
        tensor([1])
    """
    if torch.is_grad_enabled():
        x, bias = x.detach(), None if bias is None else bias.detach()
    if isinstance(weight, PackedWeight):
        weight.check_input(Check("linear_argmax"), x)
        tensors = (weight.data, weight.scales, weight.column_sums)
        columns = weight.out_features
    else:
        tensors = (weight.detach(), None, None)
        columns = weight.shape[0] if weight.dim() > 0 else 0
    tokens, log_probs, lse = _OPERATOR(
        x,
        *tensors,
        bias,
        columns,
        1 if k is None else k,
    )
    if k is None:
        tokens, log_probs = tokens[:, 0], log_probs[:, 0]
    return (tokens, log_probs, lse) if return_lse else (tokens, log_probs)


def _outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.shape[0] if x.dim() > 0 else 0
    tokens = x.new_empty(rows, k, dtype=torch.int64)
    return tokens, x.new_empty(rows, k, dtype=dtype), x.new_empty(rows, dtype=dtype)


def _native(
    extension: Any,
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    columns: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64 or (x.is_cuda and k > MOST_ON_GPU):
        return _reference(x, weight, scales, column_sums, bias, columns, k)
    if x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    if weight.dim() == 2 and weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    outputs = _outputs(x, max(k, 0))
    workspace = None
    if x.is_cuda and x.dim() == 2 and k > 0:
        size = extension.linear_argmax_workspace(x.shape[0], columns, k)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    plan = extension.linear_argmax(
        x, weight, scales, column_sums, bias, columns, k, *outputs, workspace
    )
    if plan is not None:
        _nvrtc.launch(plan)
    return outputs


def _reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    columns: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check = Check("linear_argmax")
    check.dims("x", x, 2, "[N, C]")
    check.dtype("x", x, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    if weight.dim() == 4:
        check.dtype("x", x, (torch.float32,))
        check.cpu("x", x)
        check_packed(check, weight, scales, column_sums, x.shape[1], columns)
        dtype = weight.dtype
        packed = PackedWeight(weight, scales, column_sums, columns, x.shape[1])
        x, weight = reference.round_rows(x, dtype), packed.unpack()
    else:
        check.dims("weight", weight, 2, "[V, C]")
        check.shape("weight", weight, [columns, x.shape[1]], "symbols, channels of `x`")
        check.dtype("weight", weight, (x.dtype,))
        check.device("weight", weight, "x", x)
    if not 1 <= k <= columns:
        check.fail("k", f"be in [1, {columns}]", k)
    if bias is not None:
        check.shape("bias", bias, [columns], "symbols of `weight`")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        check.dtype("bias", bias, (wide,))
        check.device("bias", bias, "x", x)
    return reference.linear_argmax(x, weight, bias, k)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, rest[5])


_OPERATOR = Operator(
    "linear_argmax(Tensor x, Tensor weight, Tensor? scales, Tensor? column_sums, Tensor? bias, "
    "int columns, int k) -> (Tensor, Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
)
