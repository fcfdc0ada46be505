"""A linear map with packed weights, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["packed_linear", "round_rows", "round_weight"]


def round_rows(h: Tensor, dtype: torch.dtype) -> Tensor:
    """What the rows of `h: [N, K]` are once rounded to the type of a packed weight, in float32.

    int8: to (q - zero) times a scale, with q and zero in [0, 255], over the range of the row and 0;
    a row that is not finite becomes NaN.
    """
    if dtype != torch.int8:
        return h.to(dtype).float()
    lowest = h.amin(1, keepdim=True).clamp(max=0)
    half = 0.5 * h.amax(1, keepdim=True).clamp(min=0) - 0.5 * lowest
    scale = torch.where(half.isfinite(), half / 127.5, torch.nan)
    inverse = torch.where(half > 1e-35, 127.5 / half, 0.0)
    zero = (-lowest * inverse).round()
    return ((h * inverse + zero).clamp(0, 255).round() - zero) * scale


def round_weight(weight: Tensor, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """Rounds `weight: [M, K]` to whole numbers in [-127, 127] and a scale `[M]` for each row.

    The greatest number of a row is 127 steps. With `pairs` no sum of two neighbours (columns 2i and
    2i + 1) is more than 127 steps either, so that after rounding it lies within 128: then 255
    times the sum fits 16 bits, which some processors add products of bytes in. That makes the steps
    of normally distributed weights a third larger.
    """
    most = weight.abs().amax(1)
    if pairs:
        padded = F.pad(weight, (0, weight.shape[1] % 2))
        most = torch.maximum(most, (padded[:, ::2] + padded[:, 1::2]).abs().amax(1))
    scales = most / 127
    return (weight / scales.clamp(min=1e-35)[:, None]).round(), scales


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    residual: Tensor | None,
    input_eps: float | None,
    output_norm: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """`weight: [M, K]` is unpacked, float32; `dtype` is what it was packed as."""
    h = x if input_eps is None else F.layer_norm(x, x.shape[1:], eps=input_eps)
    z = F.linear(round_rows(h, dtype), weight, bias)
    if activation != "none":
        z = F.relu(z) if activation == "relu" else F.gelu(z)
    if residual is not None:
        z = z + residual
    if output_norm is not None:
        norm_weight, norm_bias, eps = output_norm
        z = F.layer_norm(z, z.shape[1:], norm_weight, norm_bias, eps)
    return z
