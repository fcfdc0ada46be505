"""The most probable outputs of a linear map, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pynar.symbols import UNK

__all__ = ["linear_argmax"]

CHUNK = 512  # rows whose outputs are in memory at the same time


def linear_argmax(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and log-probabilities `[N, k]`, and the log-sum-exp `[N]`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = [_rows(rows, weight, bias, k, wide) for rows in x.split(CHUNK)]
    if not parts:
        empty = x.new_empty(0, k, dtype=wide)
        return empty.long(), empty, empty.sum(1)
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    z = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        z = z + bias
    lse = z.logsumexp(-1)
    lse = torch.where(lse.isfinite(), lse, torch.nan)
    # A stable sort has the lowest symbol first among equals, which topk does not promise.
    values, tokens = z.sort(dim=-1, descending=True, stable=True)
    values, tokens = values[:, :k], tokens[:, :k]
    log_probs = values - lse[:, None]
    nothing = log_probs.isnan() | (values == -torch.inf)
    return tokens.masked_fill(nothing, UNK), log_probs, lse
