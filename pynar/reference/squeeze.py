from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.reference._live import live_steps

__all__ = ["squeeze", "unsqueeze"]


def squeeze(x: Tensor, lengths: Tensor, factor: int, kept: int) -> tuple[Tensor, Tensor]:
    """Joins the first `kept` channels of every `factor` neighbouring steps; the others stay apart.

    The definition of :func:`pynar.ops.squeeze` and :func:`pynar.ops.squeeze_split`, in plain
    PyTorch: the joined steps, `[B, ceil(T / factor), factor kept]`, and the channels dropped,
    `[B, T, C - kept]`, both with zeros for the padding.
    """
    x = torch.where(live_steps(lengths, x.shape[1]), x, 0)
    y = F.pad(x[..., :kept], (0, 0, 0, -x.shape[1] % factor))
    steps = y.shape[1] // factor
    return y.reshape(y.shape[0], steps, factor * kept), x[..., kept:].contiguous()


def unsqueeze(y: Tensor, dropped: Tensor, lengths: Tensor, factor: int, steps: int) -> Tensor:
    """Undoes :func:`squeeze`, for `lengths` and `steps` of the result."""
    kept = y.shape[2] // factor
    x = y.reshape(y.shape[0], y.shape[1] * factor, kept)[:, :steps]
    return torch.where(live_steps(lengths, steps), torch.cat([x, dropped], -1), 0)
