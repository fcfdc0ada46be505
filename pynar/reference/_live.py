"""What the references of the flow have in common."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_type", "live_steps", "only_live"]


def accumulation_type(x: Tensor) -> torch.dtype:
    """The type in which an operator computes: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def live_steps(lengths: Tensor, steps: int) -> Tensor:
    """Which steps are no padding, `[B, T, 1]`."""
    return (torch.arange(steps, device=lengths.device) < lengths[:, None])[..., None]


def only_live(x: Tensor, lengths: Tensor) -> Tensor:
    """`[B, T, C]` in the accumulation type, zero in the padding, whatever was there."""
    return torch.where(live_steps(lengths, x.shape[1]), x.to(accumulation_type(x)), 0)
