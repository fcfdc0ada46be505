from __future__ import annotations

import torch
from torch import Tensor

from pynar.reference._live import accumulation_type, only_live

__all__ = ["head_linear", "head_product", "join_heads", "split_heads"]


def split_heads(x: Tensor, width: int, strided: bool) -> Tensor:
    """`[B, T, C]` as heads `[B, T, H, d]`: neighbouring channels, or channels `H` apart."""
    if strided:
        return x.unflatten(-1, (width, x.shape[-1] // width)).transpose(-1, -2)
    return x.unflatten(-1, (x.shape[-1] // width, width))


def join_heads(x: Tensor, strided: bool) -> Tensor:
    """The inverse of :func:`split_heads`."""
    return (x.transpose(-1, -2) if strided else x).flatten(-2)


def head_product(x: Tensor, weight: Tensor, strided: bool) -> Tensor:
    """Multiplies each head by `weight`, `[d, d]`, from the left."""
    return join_heads(split_heads(x, weight.shape[0], strided) @ weight.T, strided)


def head_linear(
    x: Tensor,
    lengths: Tensor,
    weight: Tensor,
    *,
    layout: str = "contiguous",
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multiplies each head of each step by one matrix, or by its inverse.

    The definition of :func:`pynar.ops.head_linear`, in plain PyTorch: the same arguments, the same
    results. Computes in float32, or in float64 for float64.
    """
    matrix = torch.linalg.inv(weight) if inverse else weight
    h = only_live(x, lengths)
    y = head_product(h, matrix, layout == "strided")
    heads = x.shape[2] // weight.shape[0]
    logdet = heads * lengths.to(accumulation_type(x)) * torch.linalg.slogdet(weight)[1]
    return only_live(y, lengths).to(x.dtype), -logdet if inverse else logdet
