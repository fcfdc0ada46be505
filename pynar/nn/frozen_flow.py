"""The flow frozen for inference on the CPU: packed weights, no padding (see pynar/nn/frozen.py).

The states of a level are rows `[N, C]`, sentence after sentence, of which each has an even number
below the top: so halves by steps are every second row. What a map of channels alone adds to the
log-determinant is the same for each row, and known beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.nn.embedding import sinusoids
from pynar.nn.flows import ActNorm, ActNormLinear, Coupling, Flow, PositionAttention, _CouplingNet
from pynar.nn.frozen import PackedLinear, Rows, _attend, _Frozen, _heads
from pynar.ops import PackedLayer
from pynar.ops._operator import OPERATORS
from pynar.ops.packed_layers import layer_tensors
from pynar.ops.packed_linear import PANEL

__all__ = ["FrozenFlow"]

# From so many rows of the source on, keys and values of all couplings at once would go through
# memory (256 MB for 1,024 rows of the base model); fewer rows are one product.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class RowKeysValues:
    """Keys and values `[B * S, H, D]` of the source, for each coupling."""

    rows: int  # B * S
    of: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Level:
    """What the rows of a level see, by the number of steps in a row of a coupling: one or two."""

    sees: Tensor  # int32 [N, 1, 2], the rows of their sentence
    reads: Tensor  # the same of the source
    positions: Tensor  # [N, W]
    ones: Tensor  # int64 [N]

    @staticmethod
    def of(lengths: Tensor, width: int, source: Tensor, dim: int) -> _Level:
        rows = Rows.of(lengths, width)
        # The first position of the released code is 1.
        table = sinusoids(width + 1, dim)[1:]
        positions = rows.pack(table.expand(len(lengths), -1, -1)).contiguous()
        ones = torch.ones(rows.count, dtype=torch.int64)
        return _Level(rows.each(rows.bounds), rows.each(source), positions, ones)


@dataclass(frozen=True)
class _Context:
    whole: _Level
    halves: _Level | None  # of every second row, below the top
    keys_values: RowKeysValues
    inverse: bool
    count: Tensor  # int64 [1], of the rows
    logdets: list[Tensor]  # of couplings, one number a row; filled as maps go by


class _Affine:
    """ActNorm of rows."""

    def __init__(self, module: ActNorm) -> None:
        scale, bias = module.log_scale.detach().double(), module.bias.detach().double()
        self.there = bias.float(), scale.exp().float()
        self.back = (-bias * (-scale).exp()).float(), (-scale).exp().float()
        self.logdet = float(scale.sum())  # of a row

    def __call__(self, x: Tensor, context: _Context) -> Tensor:
        bias, scale = self.back if context.inverse else self.there
        return torch.addcmul(bias, x, scale)


class _Linear:
    """ActNorm and the matrix of the heads."""

    def __init__(self, module: ActNormLinear, factors: tuple[Tensor, Tensor]) -> None:
        self.layout = module.layout
        norm = tuple(part.detach()[None] for part in (module.log_scale, module.bias))
        here = slice(module.number, module.number + 1)
        logdet, inverse = (part[here] for part in factors)
        self.there = *norm, module.weight.detach()[None]
        self.back = *norm, inverse
        heads = norm[0].shape[1] // inverse.shape[1]
        self.logdet = float(norm[0].double().sum() + heads * logdet.double())  # of a row

    def __call__(self, x: Tensor, context: _Context) -> Tensor:
        weights = self.back if context.inverse else self.there
        call = OPERATORS["flow_linear"].call
        y: Tensor = call(
            "flow_linear", x[None], context.count, *weights, self.layout, context.inverse
        )
        return y[0]


class _PositionAttention:
    def __init__(self, module: PositionAttention, dtype: torch.dtype) -> None:
        self.heads, dim = module.heads, module.query.in_features
        scale = (dim // self.heads) ** -0.5
        query, bias = module.query.weight.detach(), module.query.bias.detach()
        self.query = PackedLinear(query * scale, bias * scale, dtype)
        self.key_value = PackedLinear(module.key_value.weight, module.key_value.bias, dtype)
        norm = module.norm
        self.norm = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps

    def __call__(self, x: Tensor, level: _Level) -> Tensor:
        keys_values = _heads(self.key_value(x), 2 * self.heads)
        q = _heads(self.query(level.positions), self.heads)
        k, v = keys_values[:, : self.heads], keys_values[:, self.heads :]
        return F.layer_norm(level.positions + _attend(q, k, v, level.sees), *self.norm)


class _Net:
    """A coupling's network: one packed layer, and the map to shift and scale."""

    def __init__(self, net: _CouplingNet, dtype: torch.dtype) -> None:
        self.positions = None
        if net.positions is not None:
            self.positions = _PositionAttention(net.positions, dtype)
        dim = net.query.in_features
        scale = (dim // net.heads) ** -0.5
        qkv_scale = torch.ones(3 * dim, 1)
        qkv_scale[:dim] = scale
        qkv, qkv_bias = net.qkv.weight.detach(), net.qkv.bias.detach()
        query, query_bias = net.query.weight.detach(), net.query.bias.detach()
        maps = [
            PackedLinear(qkv * qkv_scale, qkv_bias * qkv_scale[:, 0], dtype),
            PackedLinear(query * scale, query_bias * scale, dtype),
            PackedLinear(net.feed_forward.inner.weight, net.feed_forward.inner.bias, dtype),
            PackedLinear(net.feed_forward.outer.weight, net.feed_forward.outer.bias, dtype),
        ]
        norms = [parameter.detach() for parameter in net.norms.parameters()]
        layer = PackedLayer(
            tuple(part.packed for part in maps),
            tuple(part.bias for part in maps),
            tuple(norms),
            net.heads,
            "relu",
            net.norms[0].eps,  # type: ignore[arg-type]
        )
        self._tensors = layer_tensors([layer])
        self._options = layer.options()
        self.output = PackedLinear(net.output.weight, net.output.bias, dtype)

    def __call__(self, x: Tensor, level: _Level, source: tuple[Tensor, Tensor]) -> Tensor:
        x = x + level.positions if self.positions is None else self.positions(x, level)
        keys, values = source
        memory = [keys], [values], level.reads
        states = OPERATORS["packed_layers"](
            x, *self._tensors, level.sees, *memory, None, len(x), 1, *self._options
        )
        return self.output(states)


class _Coupling:
    logdet = 0.0  # that of its rows depends on them

    def __init__(self, module: Coupling, dtype: torch.dtype) -> None:
        self.halves, self.join = module._halves, module._join
        self.up, self.number = module.up, module.number
        self.by_steps = module.split == "steps"
        self.apply = module.transform.apply
        self.net = _Net(module.net, dtype)

    def __call__(self, x: Tensor, context: _Context) -> Tensor:
        level = context.halves if self.by_steps else context.whole
        assert level is not None
        first, second = (part[0] for part in self.halves(x[None]))
        given, changed = (first, second) if self.up else (second, first)
        net = self.net(given, level, context.keys_values.of(self.number))
        # Each row is a sequence of one step, which has a log-determinant of its own.
        changed, logdet = self.apply(changed[:, None], level.ones, net[:, None], context.inverse)
        context.logdets.append(logdet)
        pair = (given, changed[:, 0]) if self.up else (changed[:, 0], given)
        return self.join(*(part[None] for part in pair))[0]


class FrozenFlow(_Frozen):
    """`Flow` with packed weights; the same arguments and results."""

    def __init__(self, flow: Flow, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.heads, self.multiple = flow.dim, flow.heads, flow.multiple
        self.widths = flow._widths
        factors = tuple(part.detach() for part in flow.factors())

        def freeze(module: object) -> _Affine | _Linear | _Coupling:
            if isinstance(module, Coupling):
                return _Coupling(module, dtype)
            if isinstance(module, ActNormLinear):
                return _Linear(module, factors)  # type: ignore[arg-type]
            assert isinstance(module, ActNorm)
            return _Affine(module)

        self.levels = [[freeze(module) for module in level] for level in flow.levels]  # type: ignore[union-attr, attr-defined]
        self.key_value = PackedLinear(flow.key_value_weight, flow.key_value_bias, dtype)
        self.each: list[PackedLinear] = []
        if all(2 * width % PANEL == 0 for width in self.widths):
            ends = [*itertools.accumulate(2 * width for width in self.widths)]
            bounds = zip([0, *ends], ends, strict=False)
            self.each = [self.key_value.columns(*pair) for pair in bounds]
        self.training = False

    def project(self, source: Tensor) -> RowKeysValues:
        """Keys and values of `source: [B, S, C]`, to be asked for by each coupling."""
        rows = source.flatten(0, 1)
        if len(rows) < ROWS_AT_ONCE or not self.each:
            parts = self.key_value(rows).split([2 * width for width in self.widths], 1)
            return RowKeysValues(len(rows), lambda number: self._halves(parts[number]))
        return RowKeysValues(len(rows), lambda number: self._halves(self.each[number](rows)))

    def _halves(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        heads = _heads(projected, 2 * self.heads)
        return heads[:, : self.heads], heads[:, self.heads :]

    def forward(
        self,
        z: Tensor,
        lengths: Tensor,
        keys_values: RowKeysValues,
        source_lengths: Tensor,
        *,
        inverse: bool = False,
        factors: object = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Flow.forward`; it has its own factors."""
        batch, width, _ = z.shape
        if width % self.multiple:
            raise ValueError(
                f"Flow: `z` must have a multiple of {self.multiple} steps, got {width}"
            )
        sentences = len(source_lengths)
        stride = keys_values.rows // max(sentences, 1)
        begins = torch.arange(sentences) * stride
        source = torch.stack([begins, begins + source_lengths], 1).int()
        source = source.repeat_interleave(batch // max(sentences, 1), 0)
        contexts, own, steps = [], lengths, width
        for level in self.levels:
            whole = _Level.of(own, steps, source, self.dim // 2)
            halves = None
            if level is not self.levels[-1]:
                halves = _Level.of(own // 2, steps // 2, source, self.dim)
            count = torch.tensor([len(whole.ones)])
            contexts.append(_Context(whole, halves, keys_values, inverse, count, []))
            own, steps = own // 2, steps // 2
        rows = Rows.of(lengths, width)
        run = self._sample if inverse else self._encode
        x = rows.unpack(run(rows.pack(z), contexts))
        return x, self._logdet(lengths, contexts)

    def _logdet(self, lengths: Tensor, contexts: list[_Context]) -> Tensor:
        """The sums over the rows of each sentence, `[B * n]`."""
        total = torch.zeros(len(lengths))
        for level, context in zip(self.levels, contexts, strict=True):
            constant = sum(one.logdet for one in level)
            total += lengths * (-constant if context.inverse else constant)
            # A coupling by steps has half as many rows as the level.
            for own in (lengths, lengths // 2):
                size = int(own.sum())
                rows = [logdet for logdet in context.logdets if len(logdet) == size]
                if rows:
                    sentence = torch.arange(len(own)).repeat_interleave(own)
                    total.index_add_(0, sentence, torch.stack(rows).sum(0))
            lengths = lengths // 2
        return total

    def _encode(self, x: Tensor, contexts: list[_Context]) -> Tensor:
        left, kept = [], self.dim // 2
        for level, context in zip(self.levels, contexts, strict=True):
            for one in level:
                x = one(x, context)
            if context is not contexts[-1]:
                left.append(x[:, kept:])
                x = x[:, :kept].reshape(-1, self.dim)
        for dropped in reversed(left):
            x = torch.cat([x.view(-1, kept), dropped], 1)
        return x

    def _sample(self, x: Tensor, contexts: list[_Context]) -> Tensor:
        left, kept = [], self.dim // 2
        for _ in contexts[:-1]:
            left.append(x[:, kept:])
            x = x[:, :kept].reshape(-1, self.dim)
        for level, context in zip(reversed(self.levels), reversed(contexts), strict=True):
            if context is not contexts[-1]:
                x = torch.cat([x.reshape(-1, kept), left.pop()], 1)
            for one in reversed(level):
                x = one(x, context)
        return x
