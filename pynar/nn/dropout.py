"""Dropout with masks that are cheap to draw on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]

_STEPS = 1 << 16


class Dropout(nn.Dropout):
    """`nn.Dropout`, whose mask costs a CPU more than the layer norm beside it, made cheap.

    There each random number of 64 bits decides of four elements: probabilities are multiples of
    2^-16. The scale belongs to the rounded one, so that the expectation is exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        drop = round(self.p * _STEPS)
        if not self.training or drop == 0:
            return x
        if x.device.type != "cpu" or drop == _STEPS:
            return super().forward(x)
        count = -(-x.numel() // 4)
        bits = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), device=x.device)
        draws = bits.view(torch.int16)[: x.numel()].view(x.shape)
        # With `out` the comparison writes numbers at once; through booleans it takes five times as
        # long.
        mask = torch.ge(draws, drop - _STEPS // 2, out=torch.empty_like(x, requires_grad=False))
        return x * mask.mul_(_STEPS / (_STEPS - drop))
