"""A linear map with packed weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["packed_linear", "round_rows", "round_weight"]


def round_rows(h: Tensor, dtype: torch.dtype, steps: int = 255) -> Tensor:
    """What the rows of `h: [N, K]` are once rounded to the type of a packed weight, in float32.

    int8: to (q - zero) times a scale, with q and zero in [0, steps], over the range of the row and
    0; a row that is not finite becomes NaN.
    """
    if dtype != torch.int8:
        return h.to(dtype).float()
    lowest = h.amin(1, keepdim=True).clamp(max=0)
    half = 0.5 * h.amax(1, keepdim=True).clamp(min=0) - 0.5 * lowest
    scale = torch.where(half.isfinite(), half / (0.5 * steps), torch.nan)
    inverse = torch.where(half > 1e-35, 0.5 * steps / half, 0.0)
    zero = (-lowest * inverse).round()
    return ((h * inverse + zero).clamp(0, steps).round() - zero) * scale


def round_weight(weight: Tensor, input_steps: int = 255) -> tuple[Tensor, Tensor]:
    """Rounds `weight: [M, K]` to whole numbers in [-127, 127] and a scale `[M]` for each row.

    The greatest number of a row is 127 steps. Where inputs have fewer than 255 steps, products of
    four weights (columns 8i + (0, 1, 4, 5) and 8i + (2, 3, 6, 7)) are added in 16 bits. Then
    neither the positive nor the negative ones of four are more than 2^15 / `input_steps` steps
    after rounding, which may add half a step to each. With 204 steps that makes the steps of
    normally distributed weights a third larger.
    """
    scales = weight.abs().amax(1) / 127
    if input_steps < 255:
        padded = F.pad(weight, (0, -weight.shape[1] % 8))
        fours = padded.unflatten(1, (-1, 2, 2, 2)).transpose(2, 3).flatten(3)
        sums = torch.maximum(fours.clamp(min=0).sum(3), (-fours).clamp(min=0).sum(3))
        scales = torch.maximum(scales, sums.amax((1, 2)) / ((1 << 15) // input_steps - 2))
    return (weight / scales.clamp(min=1e-35)[:, None]).round(), scales


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rounding: Callable[[Tensor], Tensor],
    activation: str,
    residual: Tensor | None,
    input_eps: float | None,
    output_norm: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """`weight: [M, K]` is unpacked, float32; `rounding` is what happens to rows (`round_rows`)."""
    h = x if input_eps is None else F.layer_norm(x, x.shape[1:], eps=input_eps)
    z = F.linear(rounding(h), weight, bias)
    if activation != "none":
        z = F.relu(z) if activation == "relu" else F.gelu(z)
    if residual is not None:
        z = z + residual
    if output_norm is not None:
        norm_weight, norm_bias, eps = output_norm
        z = F.layer_norm(z, z.shape[1:], norm_weight, norm_bias, eps)
    return z
