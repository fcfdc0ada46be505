"""Target length prediction: a distribution over lengths from the encoder's states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.attention import padding_mask

__all__ = ["LengthPredictor"]


class LengthPredictor(nn.Module):
    """Classifies the target length from the pooled encoder states.

    `pooling="mean"` takes the mean of the live states; `"sum"` their sum, from which a linear map
    can count: each source token adds the target tokens it stands for.
    `kind="absolute"` has one class a length 1 ... `classes`; `kind="difference"` one class a
    difference T - S from -`classes`//2 up. Target lengths outside the range train the nearest
    class, and lengths above `longest` are not predicted. Only multiples of `multiple` are (for
    models that fill their targets). (Ghazvininejad et al. 2019; the pooled form is that of the
    public NAT toolkits.)
    """

    KINDS = ("absolute", "difference")
    POOLINGS = ("mean", "sum")

    def __init__(
        self,
        dim: int,
        *,
        kind: str,
        classes: int,
        pooling: str = "mean",
        longest: int | None = None,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        if pooling not in self.POOLINGS:
            raise ValueError(
                f"LengthPredictor: `pooling` must be one of {', '.join(self.POOLINGS)}, "
                f"got {pooling!r}"
            )
        self.pooling = pooling
        if kind not in self.KINDS:
            raise ValueError(
                f"LengthPredictor: `kind` must be one of {', '.join(self.KINDS)}, got {kind!r}"
            )
        self.kind, self.classes, self.longest, self.multiple = kind, classes, longest, multiple
        self.output = nn.Linear(dim, classes)

    def _lengths(self, source_lengths: Tensor) -> Tensor:
        """The length every class stands for, `[B, classes]`; some are impossible."""
        index = torch.arange(self.classes, device=source_lengths.device)
        if self.kind == "absolute":
            return (index + 1).expand(source_lengths.shape[0], -1)
        return source_lengths[:, None] + index - self.classes // 2

    def forward(self, states: Tensor, source_lengths: Tensor) -> Tensor:
        """Log-probabilities `[B, classes]` in fp32; impossible lengths have -inf."""
        live = padding_mask(source_lengths, states.shape[1])[:, 0, 0, :, None]
        pooled = states.masked_fill(~live, 0).sum(1)
        if self.pooling == "mean":
            pooled = pooled / source_lengths[:, None]
        logits = self.output(pooled.to(states.dtype)).float()
        lengths = self._lengths(source_lengths)
        impossible = (lengths < 1) | (lengths % self.multiple != 0)
        if self.longest is not None:
            impossible |= lengths > self.longest
        return logits.masked_fill(impossible, -torch.inf).log_softmax(-1)

    def loss(self, states: Tensor, source_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """Sum over sentences of the negative log-probability of the true length."""
        log_probs = self(states, source_lengths)
        lengths = self._lengths(source_lengths)
        first, last = lengths[:, 0], lengths[:, -1]
        nearest = target_lengths.clamp(min=1, max=self.longest).clamp(first, last)
        if self.multiple > 1:
            up = -(-nearest // self.multiple) * self.multiple
            nearest = torch.where(up <= last, up, last // self.multiple * self.multiple)
        return F.nll_loss(log_probs, nearest - first, reduction="sum")

    def predict(
        self,
        states: Tensor,
        source_lengths: Tensor,
        candidates: int,
        limits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The `candidates` most probable distinct lengths and their log-probabilities, `[B, n]`.

        There are at most as many as classes. A short source, or its limit in `limits: [B]`, may
        leave fewer possible lengths still: those further candidates have log-probability -inf and
        repeat the best length. Where even the shortest class is above the limit, the limit takes
        its place.
        """
        log_probs = self(states, source_lengths)
        lengths = self._lengths(source_lengths)
        if limits is not None:
            above = lengths > torch.maximum(limits, lengths[:, 0])[:, None]
            log_probs = log_probs.masked_fill(above, -torch.inf)
            lengths = lengths.minimum(limits[:, None])
        top, index = log_probs.topk(min(candidates, self.classes), dim=-1)
        lengths = lengths.gather(1, index)
        return torch.where(top > -torch.inf, lengths, lengths[:, :1]), top
