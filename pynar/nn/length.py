"""Target length prediction: a distribution over lengths from the encoder's states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.attention import padding_mask

__all__ = ["LengthPredictor"]


COMPONENTS = 5  # of the mixture of logistics
MIN_LOG_SCALE = -7.0


def logistic_mixture(parameters: Tensor, classes: int) -> Tensor:
    r"""Log-probabilities `[B, classes]` of a discretised mixture of logistic distributions.

    Classes are bins around (k - R) / R, R = `classes`//2, half a step to both sides; the first and
    the last one reach to infinity. `parameters: [B, 3 n]` are logits, means and logarithms of the
    scales of n components (Salimans et al. 2017, section 2.1, in FlowSeq for differences of
    length).
    """
    logits, means, log_scales = parameters.float().unflatten(-1, (3, 1, -1)).unbind(1)
    log_scales = log_scales.clamp(min=MIN_LOG_SCALE)
    radius = max(classes // 2, 1)
    places = torch.arange(classes, device=parameters.device)[:, None] - classes // 2
    above = (((places + 0.5) / radius) - means) * (-log_scales).exp()
    below = (((places - 0.5) / radius) - means) * (-log_scales).exp()
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)).
    left, right = F.logsigmoid(above), F.logsigmoid(-below)
    width = (-(-(-log_scales).exp() / radius).expm1()).log()
    mass = torch.where(places == -(classes // 2), left, left + right + width)
    mass = torch.where(places == classes - 1 - classes // 2, right, mass)
    return (logits.log_softmax(-1) + mass).logsumexp(-1)


class LengthPredictor(nn.Module):
    """Classifies the target length from the pooled encoder states.

    `pooling="mean"` takes the mean of the live states; `"sum"` their sum, from which a linear map
    can count: each source token adds the target tokens it stands for.
    `kind="absolute"` has one class a length 1 ... `classes`; `kind="difference"` one class a
    difference T - S from -`classes`//2 up; `"logistic"` has the same classes, but few numbers for
    all of them: see `logistic_mixture`. Target lengths outside the range train the nearest
    class, and lengths above `longest` are not predicted. Only multiples of `multiple` are (for
    models that fill their targets), and a target trains the next one up, or the last. `classes`
    and `longest` have to leave each source a possible length. (Ghazvininejad et al. 2019; the
    pooled form is that of the public NAT toolkits.)
    """

    KINDS = ("absolute", "difference", "logistic")
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
        self.output = nn.Linear(dim, 3 * COMPONENTS if kind == "logistic" else classes)

    def _lengths(self, source_lengths: Tensor) -> Tensor:
        """The length every class stands for, `[B, classes]`; some are impossible."""
        index = torch.arange(self.classes, device=source_lengths.device)
        if self.kind == "absolute":
            return (index + 1).expand(source_lengths.shape[0], -1)
        return source_lengths[:, None] + index - self.classes // 2

    def forward(self, states: Tensor, source_lengths: Tensor) -> Tensor:
        """Log-probabilities `[B, classes]` in fp32; impossible lengths have -inf."""
        return self._log_probs(states, source_lengths, self._lengths(source_lengths))

    def _log_probs(self, states: Tensor, source_lengths: Tensor, lengths: Tensor) -> Tensor:
        live = padding_mask(source_lengths, states.shape[1])[:, 0, 0, :, None]
        pooled = states.masked_fill(~live, 0).sum(1)
        if self.pooling == "mean":
            pooled = pooled / source_lengths[:, None]
        logits = self.output(pooled.to(states.dtype)).float()
        if self.kind == "logistic":
            logits = logistic_mixture(logits, self.classes)
        impossible = lengths < 1
        if self.multiple > 1:
            impossible |= lengths % self.multiple != 0
        if self.longest is not None:
            impossible |= lengths > self.longest
        return logits.masked_fill(impossible, -torch.inf).log_softmax(-1)

    def loss(self, states: Tensor, source_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """Sum over sentences of the negative log-probability of the true length."""
        lengths = self._lengths(source_lengths)
        log_probs = self._log_probs(states, source_lengths, lengths)
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
        lengths = self._lengths(source_lengths)
        log_probs = self._log_probs(states, source_lengths, lengths)
        if limits is not None:
            above = lengths > torch.maximum(limits, lengths[:, 0])[:, None]
            log_probs = log_probs.masked_fill(above, -torch.inf)
            lengths = lengths.minimum(limits[:, None])
        top, index = log_probs.topk(min(candidates, self.classes), dim=-1)
        lengths = lengths.gather(1, index)
        return torch.where(top > -torch.inf, lengths, lengths[:, :1]), top
