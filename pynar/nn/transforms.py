"""What a coupling does to each number of its half, given numbers from its network.

`apply(z, lengths, parameters)` maps `z: [B, T, C]`, or back if `inverse`, with
`parameters: [B, T, n C]`, n for each number; gives the result, zero in the padding, and the
log-determinant `[B]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pynar.nn.attention import padding_mask
from pynar.ops.affine_coupling import affine_coupling

__all__ = ["TRANSFORMS", "Transform", "additive", "affine", "nlsq"]

# So that the slope of the bump never outweighs that of the line: the greatest slope of
# 1 / (1 + u^2) is 3 sqrt(3) / 8, its reciprocal 8 sqrt(3) / 9.
_STEEPEST = 8 * math.sqrt(3) / 9 - 0.05


@dataclass(frozen=True)
class Transform:
    parameters: int  # for each number
    apply: Callable[..., tuple[Tensor, Tensor]]


def affine(
    z: Tensor, lengths: Tensor, parameters: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """sigmoid(scale + 2) z + shift, see `pynar.ops.affine_coupling`."""
    shift, raw_scale = parameters.chunk(2, -1)
    return affine_coupling(z, lengths, shift, raw_scale, inverse=inverse)


def additive(
    z: Tensor, lengths: Tensor, parameters: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """z + shift."""
    y = z - parameters if inverse else z + parameters
    return _live(y, lengths), z.new_zeros(len(z))


def nlsq(
    z: Tensor, lengths: Tensor, parameters: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""A line with a bump, "non-linear squared" (Ziegler and Rush 2019):

    .. math:: y = b z + a + \frac{c}{1 + (d z + g)^2}

    with b = exp(0.4 b'), d = exp(0.4 d') and c = (8 sqrt(3) / 9 - 0.05) b / d tanh(0.3 c'), for
    which it rises everywhere. Back, u = d z + g is the only real root of a cubic, found in float64.
    """
    a, b_, c_, d_, g = parameters.chunk(5, -1)
    b, d = (0.4 * b_).exp(), (0.4 * d_).exp()
    bump = _STEEPEST * (0.3 * c_).tanh()  # c d / b
    if inverse:
        t = (d / b) * (z - a) + g
        u = _root(t, bump)
        y = (u - g) / d
    else:
        u = d * z + g
        y = b * z + a + (b / d) * bump / (1 + u * u)
    logdet = _live((0.4 * b_) + (-2 * bump * u / (1 + u * u).square()).log1p(), lengths)
    total = logdet.sum((1, 2))
    return _live(y, lengths), -total if inverse else total


def _root(t: Tensor, bump: Tensor) -> Tensor:
    """The u with u + bump / (1 + u^2) = t, differentiable by both."""
    with torch.no_grad():
        # As (u - t) (1 + u^2) + bump = 0, and with u = v + t / 3 as v^3 + p v + q = 0.
        s, k = t.double(), bump.double()
        p = 1 - s * s / 3
        q = k - 2 * s / 3 - 2 * s**3 / 27
        # Of both cube roots the one in which nothing cancels; the other one follows from it.
        root = (q * q / 4 + p**3 / 27).clamp(min=0).sqrt()
        cube = -q / 2 - torch.where(q >= 0, root, -root)
        w = cube.sign() * cube.abs().pow(1 / 3)
        v = torch.where(w == 0, 0.0, w - p / (3 * torch.where(w == 0, 1.0, w)))
        u = v + s / 3
        for _ in range(2):  # p / w does cancel, where v is small
            u = u - (u + k / (1 + u * u) - s) / (1 - 2 * k * u / (1 + u * u).square())
        u = u.to(t.dtype)
        slope = 1 - 2 * bump * u / (1 + u * u).square()
    # Newton's step from the root has its value, and its derivatives.
    return u - (u + bump / (1 + u * u) - t) / slope


def _live(x: Tensor, lengths: Tensor) -> Tensor:
    return x.masked_fill(~padding_mask(lengths, x.shape[1])[:, 0, 0, :, None], 0)


TRANSFORMS = {
    "affine": Transform(2, affine),
    "additive": Transform(1, additive),
    "nlsq": Transform(5, nlsq),
}
