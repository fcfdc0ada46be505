from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batched_logdet"]


def batched_logdet(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the absolute determinant, and inverse, of each matrix.

    The definition of :func:`pynar.ops.batched_logdet`, in plain PyTorch: the same arguments, the
    same results. The inverse of a singular matrix is NaN.
    """
    logdet = torch.linalg.slogdet(weights)[1]
    inverse, info = torch.linalg.inv_ex(weights)
    regular = (info == 0) & logdet.isfinite()
    return logdet, torch.where(regular[:, None, None], inverse, torch.nan).contiguous()
