"""Multi-head attention with merged projections and a memory shared by all candidates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CrossAttention", "SelfAttention", "padding_mask"]


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """Returns the boolean key mask `[B, 1, 1, width]`, true where a position is live."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None, None]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of `q: [B, H, Tq, D]` over `k`, `v: [B, H, Tk, D]`.

    PyTorch's half-precision backward on CPU takes several times as long as the fp32 one at
    sentence lengths (30 against 4 ms at B=128, H=4, T=16, D=64), so training goes through fp32.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.requires_grad:
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, scale=scale
            )
        return y.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class SelfAttention(nn.Module):
    """Self-attention (Vaswani et al. 2017, eq. 1) over `x: [B, T, C]`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        q, k, v = (_split_heads(h, self.heads) for h in self.qkv(x).chunk(3, -1))
        return self.output(_merge_heads(_attend(q, k, v, mask, causal=causal)))

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """Attends from one new position `x: [N, 1, C]` to itself and the cached ones.

        `cache: [N, 2, H, capacity, C / H]` receives the new key and value at `position`.
        """
        q, k, v = (_split_heads(h, self.heads) for h in self.qkv(x).chunk(3, -1))
        cache[:, 0, :, position] = k[:, :, 0]
        cache[:, 1, :, position] = v[:, :, 0]
        keys, values = cache[:, :, :, : position + 1].unbind(1)
        return self.output(_merge_heads(_attend(q, keys, values)))


class CrossAttention(nn.Module):
    """Attention from decoder states to the encoder's memory.

    `project` computes keys and values once a sentence. Several decoder rows of one sentence
    (beam hypotheses, length candidates) follow each other in the batch and share them: rows
    `[B * n, T, C]` attend to a memory of `B` sentences as `[B, n * T, C]`, without a copy.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values `[B, H, S, C / H]` of `memory: [B, S, C]`."""
        k, v = (_split_heads(h, self.heads) for h in self.key_value(memory).chunk(2, -1))
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        k, v = keys_values
        candidates = x.shape[0] // max(k.shape[0], 1)
        rows = x.reshape(k.shape[0], candidates * x.shape[1], x.shape[2])
        q = _split_heads(self.query(rows), self.heads)
        return self.output(_merge_heads(_attend(q, k, v, mask))).view_as(x)
