from __future__ import annotations

from torch import Tensor

from pynar.ops._checks import Check
from pynar.ops._flow import log_determinant
from pynar.ops.batched_logdet import batched_logdet
from pynar.ops.flow_linear import head_products

__all__ = ["head_linear"]

LAYOUTS = ("contiguous", "strided")


def head_linear(
    x: Tensor,
    lengths: Tensor,
    weight: Tensor,
    *,
    layout: str = "contiguous",
    inverse: bool = False,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Multiplies each head of each step by one matrix, or by its inverse.

    .. math:: y_h = W x_h, \qquad
              \log|\det J|_b = \mathrm{lengths}_b \, H \log|\det W|,

    the multi-head linear map of FlowSeq (Ma et al., 2019): :math:`C` channels are :math:`H = C / d`
    heads that share one :math:`d \times d` matrix. With contiguous heads, channel :math:`i` of head
    :math:`h` is :math:`hd + i`; with strided ones it is :math:`iH + h`.

    Args:
        x: `[B, T, C]`, float32, bfloat16, float16 or float64. Padding, :math:`t \ge`
            ``lengths[b]``, may hold anything and comes out as zero.
        lengths: `[B]`, int64, each in `[0, T]`.
        weight: `[d, d]`, :math:`W`, float32 (float64 for float64 `x`); `d` divides `C`.
        layout: ``"contiguous"`` or ``"strided"``.
        inverse: whether to undo the map.
        factors: what :func:`batched_logdet` returned for `weight`, a number and a matrix, if it is
            at hand: a model factors all its matrices in one call.

    Returns:
        The result, `[B, T, C]`, and the log-determinant, `[B]`, of `weight`'s type.

    Example:
        >>> x, lengths = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([1])
        >>> weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> head_linear(x, lengths, weight)[0]
        tensor([[[2., 2., 4., 6.]]])
        >>> head_linear(x, lengths, weight, layout="strided")[0]
        tensor([[[3., 4., 2., 4.]]])
    """
    check = Check("head_linear")
    if layout not in LAYOUTS:
        check.fail("layout", f"be one of {', '.join(LAYOUTS)}", repr(layout))
    check.dims("weight", weight, 2, "[d, d]")
    if factors is None:
        logdets, inverses = batched_logdet(weight[None])
        factors = (logdets[0], inverses[0])
    matrix = factors[1] if inverse else weight
    y = head_products("head_linear", x, lengths, None, None, matrix[None], layout, inverse)
    heads = x.shape[2] // weight.shape[1]
    return y, log_determinant(lengths, heads * factors[0], inverse)
