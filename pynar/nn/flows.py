"""The generative flow of FlowSeq (Ma et al. 2019): invertible maps of sequences, given a source.

Every map takes and returns states `[B, T, C]` and gives the log-determinant `[B]` of what it did.
Forward is the direction of density, from latent states to noise; inverse that of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.dropout import Dropout
from pynar.nn.embedding import sinusoids
from pynar.nn.recurrent import BiLSTM, look_up
from pynar.nn.transformer import FeedForward, KeysValues
from pynar.nn.transforms import TRANSFORMS
from pynar.ops import (
    actnorm,
    batched_logdet,
    flow_linear,
    interval_attention,
    padding_intervals,
    squeeze,
    squeeze_split,
    unsqueeze_join,
)

__all__ = [
    "NETWORKS",
    "ActNorm",
    "ActNormLinear",
    "Coupling",
    "Flow",
    "PositionAttention",
    "PositionSum",
    "WeightNormLinear",
]

HEAD_WIDTHS = (32, 16, 8)
NETWORKS = ("attention", "rnn")  # of couplings
_SPLITS = ("features", "alternate", "steps")


class WeightNormLinear(nn.Module):
    """A linear map with the length of each weight row apart: `y = g v / |v| x + b`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(outputs, inputs).normal_(std=0.05))
        self.gain = nn.Parameter(self.direction.detach().norm(dim=1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def weight(self) -> Tensor:
        return self.direction * (self.gain / self.direction.norm(dim=1))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, x: Tensor, std: float) -> None:
        """Has the outputs for rows `x: [N, C]` mean 0 and the given standard deviation."""
        self.gain.copy_(self.direction.norm(dim=1))
        self.bias.zero_()
        mean, scale = _moments(self(x))
        self.gain.mul_(std / scale)
        self.bias.copy_(-std * mean / scale)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column; of what does not vary the latter is 1."""
    if len(rows) == 0:
        return rows.new_zeros(rows.shape[1]), rows.new_ones(rows.shape[1])
    std = rows.std(0, correction=0)
    return rows.mean(0), torch.where(std > 1e-6, std, 1.0)


@dataclass(frozen=True)
class _Rows:
    """The steps that a map works on: which are live, and what they attend to."""

    lengths: Tensor  # [B * n]
    source_lengths: Tensor  # [B]
    sees: Tensor  # int32 [B * n, T, 1, 2], the steps of the sequence
    reads: Tensor  # int32 [B, n * T, 1, 2], the same of the source
    positions: Tensor  # [T, W], as wide as what couplings condition on

    @staticmethod
    def of(lengths: Tensor, width: int, source_lengths: Tensor, like: Tensor, dim: int) -> _Rows:
        candidates = len(lengths) // max(len(source_lengths), 1)
        ends = torch.stack([torch.zeros_like(source_lengths), source_lengths], -1).int()
        reads = ends[:, None, None].repeat(1, candidates * width, 1, 1)
        # The first position of the released code is 1.
        positions = sinusoids(width + 1, dim, like.device)[1:].to(like.dtype)
        sees = padding_intervals(lengths, width)
        return _Rows(lengths, source_lengths, sees, reads, positions)


@dataclass(frozen=True)
class _Context:
    """What the maps of a level need beside the states."""

    whole: _Rows
    halves: _Rows  # of every second step
    keys_values: KeysValues  # of the source, for every coupling of the flow, [B, H, S, D]
    factors: tuple[Tensor, Tensor]  # of the matrices of the flow, from `batched_logdet`

    def lengths(self, squeeze: int) -> Tensor:
        """In steps of which so many are one of this level."""
        return self.whole.lengths * squeeze if squeeze > 1 else self.whole.lengths


class ActNorm(nn.Module):
    """An affine map of each channel, see `pynar.ops.actnorm`.

    With `squeeze`, of so many steps of the level below side by side.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(dim).normal_(std=0.05))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Tensor, context: _Context, inverse: bool = False, squeeze: int = 1
    ) -> tuple[Tensor, Tensor]:
        norm = self.log_scale, self.bias
        return actnorm(x, context.lengths(squeeze), *norm, inverse=inverse, squeeze=squeeze)

    @torch.no_grad()
    def fit(self, x: Tensor, lengths: Tensor) -> None:
        """Has the results for `x` mean 0 and variance 1 over the live steps.

        Padding does not count (in the released code it does).
        """
        live = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        mean, std = _moments(x[live])
        self.log_scale.copy_(-std.log())
        self.bias.copy_(-mean / std)


class ActNormLinear(ActNorm):
    """ActNorm and an invertible matrix for each head, shared by all heads, in one pass."""

    def __init__(self, dim: int, *, layout: str, number: int) -> None:
        super().__init__(dim)
        width = next((width for width in HEAD_WIDTHS if dim % width == 0), 0)
        if not width:
            raise ValueError(f"Flow: `dim` must be a multiple of {HEAD_WIDTHS[-1]}, got {dim}")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width)))
        self.layout, self.number = layout, number

    def forward(
        self, x: Tensor, context: _Context, inverse: bool = False, squeeze: int = 1
    ) -> tuple[Tensor, Tensor]:
        here = slice(self.number, self.number + 1)
        logdet, inverses = context.factors
        return flow_linear(
            x,
            context.lengths(squeeze),
            self.log_scale[None],
            self.bias[None],
            self.weight[None],
            layout=self.layout,
            inverse=inverse,
            factors=(logdet[here], inverses[here]),
            squeeze=squeeze,
        )


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
    """Attention of `q: [B, T, C]` to `k`, `v: [B, H, T, D]` in their intervals."""
    y: Tensor = interval_attention(_heads(q, k.shape[1]), k, v, intervals)  # type: ignore[assignment]
    return y.transpose(1, 2).flatten(2)


class PositionAttention(nn.Module):
    """Gathers a sequence at its positions: sinusoids ask, states answer; post-norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        k, v = (_heads(h, self.heads) for h in self.key_value(x).chunk(2, -1))
        q = self.query(positions).expand_as(x)
        return self.norm(positions + _attend(q, k, v, sees))


class PositionSum(nn.Module):
    """Each step's state beside its position; `PositionAttention` has to find it. Post-norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        return self.norm(positions + self.value(x))


class _AttentionNet(nn.Module):
    """One decoder layer, post-norm, and a linear map to the `outputs` for each channel.

    Attention has no output projection, as in the released code. Keys and values of the source
    come from `Flow.project`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        heads: int,
        *,
        outputs: int,
        dropout: float,
        attends_by_position: bool,
    ) -> None:
        super().__init__()
        self.heads, self.key_width = heads, dim
        self.positions = PositionAttention(dim, heads) if attends_by_position else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query = nn.Linear(dim, dim)
        self.feed_forward = FeedForward(dim, hidden, "relu")
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = Dropout(dropout)
        self.output = WeightNormLinear(dim, outputs * dim)

    def forward(self, x: Tensor, rows: _Rows, source: tuple[Tensor, Tensor]) -> Tensor:
        positions = rows.positions.to(x.dtype)
        if self.positions is None:
            x = x + positions
        else:
            x = self.positions(x, positions, rows.sees)
        q, k, v = self.qkv(x).chunk(3, -1)
        y = _attend(q, _heads(k, self.heads), _heads(v, self.heads), rows.sees)
        x = self.norms[0](x + self.dropout(y))
        # Candidates of one sentence follow each other and read the same source.
        q = self.query(x).reshape(*rows.reads.shape[:2], x.shape[2])
        x = self.norms[1](x + self.dropout(_attend(q, *source, rows.reads).view_as(x)))
        x = self.norms[2](x + self.dropout(self.feed_forward(x)))
        return self.output(x)


class _RecurrentNet(nn.Module):
    """A bidirectional LSTM, global attention, and a linear map of both.

    Keys and values of the source come from `Flow.project`.
    """

    def __init__(self, dim: int, hidden: int, *, outputs: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.key_width = 1, hidden
        self.lstm = BiLSTM(dim, hidden)
        self.dropout = Dropout(dropout)
        self.output = WeightNormLinear(2 * hidden, outputs * dim)

    def forward(self, x: Tensor, rows: _Rows, source: tuple[Tensor, Tensor]) -> Tensor:
        found = look_up(self.lstm(x, rows.lengths), source, rows.source_lengths)
        return self.output(self.dropout(found))  # type: ignore[no-any-return]


class Coupling(nn.Module):
    """Transforms one half of the states by what a network makes of the other.

    Args:
        dim: channels of the states.
        split: the halves: "features", the first and last channels; "alternate", even and odd ones;
            "steps", even and odd steps.
        up: the first half decides about the second; otherwise the reverse.
        number: of the coupling in its flow.
        transform: of `pynar.nn.transforms`.
        network: "attention", one layer of a Transformer's decoder with a feed-forward layer of
            `hidden` channels, or "rnn", a bidirectional LSTM of as many.
        attends_by_position: whether a network of attention gathers its input by
            `PositionAttention`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        heads: int,
        *,
        split: str,
        up: bool,
        number: int,
        transform: str = "affine",
        network: str = "attention",
        dropout: float = 0.0,
        attends_by_position: bool = False,
    ) -> None:
        super().__init__()
        self.split, self.up, self.number = split, up, number
        self.width = dim if split == "steps" else dim // 2
        self.transform = TRANSFORMS[transform]
        outputs = self.transform.parameters
        self.net: _AttentionNet | _RecurrentNet
        if network == "rnn":
            self.net = _RecurrentNet(self.width, hidden, outputs=outputs, dropout=dropout)
        else:
            self.net = _AttentionNet(
                self.width,
                hidden,
                heads,
                outputs=outputs,
                dropout=dropout,
                attends_by_position=attends_by_position,
            )

    def forward(self, x: Tensor, context: _Context, inverse: bool = False) -> tuple[Tensor, Tensor]:
        rows = context.halves if self.split == "steps" else context.whole
        first, second = self._halves(x)
        given, changed = (first, second) if self.up else (second, first)
        # Under autocast, and frozen on a GPU, the network has fewer bits than the states.
        given_net = given.to(self.net.output.bias.dtype)
        net = self.net(given_net, rows, context.keys_values[self.number]).to(x.dtype)
        changed, logdet = self.transform.apply(changed, rows.lengths, net, inverse)
        return self._join(*((given, changed) if self.up else (changed, given))), logdet

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.split == "features":
            first, second = x.chunk(2, -1)
            return first, second
        if self.split == "alternate":
            return x[..., 0::2], x[..., 1::2]
        return x[:, 0::2], x[:, 1::2]

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        if self.split == "features":
            return torch.cat([first, second], -1)
        if self.split == "alternate":
            return torch.stack([first, second], -1).flatten(-2)
        return torch.stack([first, second], 2).flatten(1, 2)


class Flow(nn.Module):
    r"""A multi-scale flow over sequences :math:`z: [B, T, C]`, given a source.

    A level is a positional unit (if wanted), steps, and, except at the top, a coupling by which the
    half of the channels that goes no further depends on the half that does. This one is squeezed:
    two neighbouring steps become one of as many channels as before. A step is actnorm, linear map
    (contiguous heads), unit, actnorm, linear map (strided heads), unit; a unit pairs of couplings
    that split the channels in halves, then by parity, and below the top the steps by parity,
    with an actnorm between the pairs (section 3.3 and 3.4; what the paper counts as steps are
    couplings). The positional unit's networks are always of attention.

    Args:
        dim: C.
        source_dim: channels of the source's states.
        hidden: width of the coupling networks' feed-forward layers or LSTMs.
        heads: of the coupling networks' attention; LSTMs have one.
        steps: of each level, from the bottom.
        dropout: in the coupling networks.
        position_attention: whether levels begin with a positional unit.
        transform: what couplings do, "affine", "additive" or "nlsq" (`pynar.nn.transforms`).
        network: what decides about it, "attention" or "rnn", see `Coupling`.

    Raises:
        ValueError: an unknown `transform` or `network`, or sizes that do not go together.
    """

    def __init__(
        self,
        dim: int,
        source_dim: int,
        *,
        hidden: int,
        heads: int,
        steps: Sequence[int] = (4, 4, 2),
        dropout: float = 0.0,
        position_attention: bool = True,
        transform: str = "affine",
        network: str = "attention",
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(
                f"Flow: `network` must be one of {', '.join(NETWORKS)}, got {network!r}"
            )
        if transform not in TRANSFORMS:
            raise ValueError(
                f"Flow: `transform` must be one of {', '.join(TRANSFORMS)}, got {transform!r}"
            )
        if not steps or min(steps) < 1:
            raise ValueError(f"Flow: `steps` must be positive numbers, got {list(steps)}")
        if (dim // 2) % heads:
            raise ValueError(
                f"Flow: half of `dim` must be a multiple of `heads` ({heads}), got {dim}"
            )
        self.dim, self.heads = dim, heads
        self.multiple = 2 ** (len(steps) - 1)
        couplings: list[Coupling] = []
        linears: list[ActNormLinear] = []

        def coupling(
            split: str, up: bool, network: str = network, attends_by_position: bool = False
        ) -> Coupling:
            made = Coupling(
                dim,
                hidden,
                heads,
                split=split,
                up=up,
                number=len(couplings),
                transform=transform,
                network=network,
                dropout=dropout,
                attends_by_position=attends_by_position,
            )
            couplings.append(made)
            return made

        def unit(top: bool) -> list[nn.Module]:
            maps: list[nn.Module] = []
            for split in _SPLITS[: 2 if top else 3]:
                maps += [ActNorm(dim)] if maps else []
                maps += [coupling(split, True), coupling(split, False)]
            return maps

        def step(top: bool) -> list[nn.Module]:
            maps: list[nn.Module] = []
            for layout in ("contiguous", "strided"):
                linears.append(ActNormLinear(dim, layout=layout, number=len(linears)))
                maps += [linears[-1], *unit(top)]
            return maps

        self.levels = nn.ModuleList()
        for level, count in enumerate(steps):
            top = level == len(steps) - 1
            maps: list[nn.Module] = []
            if position_attention:
                maps += [
                    ActNorm(dim),
                    coupling("features", True, "attention", attends_by_position=True),
                    coupling("features", False, "attention"),
                ]
            for _ in range(count):
                maps += step(top)
            if not top:
                maps.append(coupling("features", True))
            self.levels.append(nn.ModuleList(maps))
        self._widths = [c.net.key_width for c in couplings]
        self._heads = [c.net.heads for c in couplings]
        # One matrix for the keys and values of every coupling, so that they are one product; each
        # coupling's part is initialised by itself.
        parts = [torch.empty(2 * width, source_dim) for width in self._widths]
        self.key_value_weight = nn.Parameter(torch.cat([nn.init.xavier_uniform_(p) for p in parts]))
        self.key_value_bias = nn.Parameter(torch.zeros(2 * sum(self._widths)))

    def project(self, source: Tensor) -> KeysValues:
        """Keys and values of `source: [B, S, C]` for every coupling, `[B, H, S, D]` each."""
        projected = F.linear(source, self.key_value_weight, self.key_value_bias)
        parts = projected.split([2 * width for width in self._widths], -1)
        halves = zip((part.chunk(2, -1) for part in parts), self._heads, strict=True)
        return [(_heads(k, heads), _heads(v, heads)) for (k, v), heads in halves]

    def factors(self) -> tuple[Tensor, Tensor]:
        """log|det| and inverse of all matrices; to be computed anew when weights have changed."""
        weights: list[Tensor] = [m.weight for m in self.modules() if isinstance(m, ActNormLinear)]
        return batched_logdet(torch.stack(weights))

    def forward(
        self,
        z: Tensor,
        lengths: Tensor,
        keys_values: KeysValues,
        source_lengths: Tensor,
        *,
        inverse: bool = False,
        factors: tuple[Tensor, Tensor] | None = None,
        by_level: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Maps latent states to noise, or noise to latent states if `inverse`.

        Args:
            z: `[B * n, T, C]`, n sequences for each source, one after the other. T is a multiple
                of `multiple`, two for every level but one. Padding may hold anything.
            lengths: `[B * n]`, multiples as well.
            keys_values: from `project`.
            source_lengths: `[B]`.
            factors: from `factors`, if they are at hand.
            by_level: gives the log-determinant of every level.

        Returns:
            The result, `[B * n, T, C]`, zero in the padding, and the log-determinant, `[B * n]` or
            `[B * n, levels]`.

        Raises:
            ValueError: T is no multiple.
        """
        if z.shape[1] % self.multiple:
            raise ValueError(
                f"Flow: `z` must have a multiple of {self.multiple} steps, got {z.shape[1]}"
            )
        factors = self.factors() if factors is None else factors
        contexts, width = [], z.shape[1]
        for _ in self.levels:
            whole = _Rows.of(lengths, width, source_lengths, z, self.dim // 2)
            halves = _Rows.of(lengths // 2, width // 2, source_lengths, z, self.dim)
            contexts.append(_Context(whole, halves, keys_values, factors))
            lengths, width = lengths // 2, width // 2
        x, logdets = self._sample(z, contexts) if inverse else self._encode(z, contexts)
        return x, logdets if by_level else logdets.sum(1)

    def _encode(self, x: Tensor, contexts: list[_Context]) -> tuple[Tensor, Tensor]:
        totals = [x.new_zeros(len(x)) for _ in contexts]
        left: list[Tensor] = []
        for number, (level, context) in enumerate(zip(self.levels, contexts, strict=True)):
            options = {}
            if number > 0:
                # A level begins with a map of channels, which squeezes the steps as it reads them.
                x, dropped = x.chunk(2, -1)
                left.append(dropped)
                options = {"squeeze": 2}
            for one in level:  # type: ignore[attr-defined]
                x, logdet = one(x, context, **options)
                totals[number] = totals[number] + logdet
                options = {}
        for dropped, context in zip(reversed(left), reversed(contexts[:-1]), strict=True):
            x = unsqueeze_join(x, dropped, context.whole.lengths)
        return x, torch.stack(totals, 1)

    def _sample(self, x: Tensor, contexts: list[_Context]) -> tuple[Tensor, Tensor]:
        totals = [x.new_zeros(len(x)) for _ in contexts]
        left: list[Tensor] = []
        for context in contexts[:-1]:
            x, dropped, _ = squeeze_split(x, context.whole.lengths, self.dim // 2)
            left.append(dropped)
        levels = [*enumerate(zip(self.levels, contexts, strict=True))]
        for number, (level, context) in reversed(levels):
            for one in reversed(level):  # type: ignore[call-overload]
                options = {"squeeze": 2} if number > 0 and one is level[0] else {}  # type: ignore[index]
                x, logdet = one(x, context, inverse=True, **options)
                totals[number] = totals[number] + logdet
            if number > 0:
                x = torch.cat([x, left.pop()], -1)
        return x, torch.stack(totals, 1)

    @torch.no_grad()
    def initialise(
        self, z: Tensor, lengths: Tensor, keys_values: KeysValues, source_lengths: Tensor
    ) -> None:
        """Fits the flow to a batch (data-dependent initialisation, Kingma and Dhariwal 2018).

        The states after every actnorm have mean 0 and variance 1 over the live steps, and every
        coupling begins as if its network gave zeros, whatever the source: an affine one as a
        multiplication by sigmoid(2), others as the identity.
        """

        def fit(
            module: ActNorm, arguments: tuple[Tensor, _Context], options: dict[str, int]
        ) -> None:
            x, context = arguments
            factor = options.get("squeeze", 1)
            module.fit(*squeeze(x, context.lengths(factor), factor))

        handles = []
        for module in self.modules():
            if isinstance(module, WeightNormLinear):
                module.gain.zero_()
                module.bias.zero_()
            elif isinstance(module, ActNorm):
                handles.append(module.register_forward_pre_hook(fit, with_kwargs=True))
        try:
            self(z, lengths, keys_values, source_lengths)
        finally:
            for handle in handles:
                handle.remove()
