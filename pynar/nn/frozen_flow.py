"""The flow frozen for inference on the CPU: packed weights, no padding (see pynar/nn/frozen.py).

The states of a level are rows `[N, C]`, sentence after sentence, of which each has an even number
below the top: so halves by steps are every second row. What a map of channels alone adds to the
log-determinant is the same for each row, and known beforehand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.nn.embedding import sinusoids
from pynar.nn.flows import ActNorm, ActNormLinear, Coupling, Flow, PositionAttention, _AttentionNet
from pynar.nn.frozen import PackedLinear, _attend, _Frozen, _heads
from pynar.nn.live_rows import Rows
from pynar.nn.transforms import TRANSFORMS
from pynar.ops import (
    PackedActNorm,
    PackedCoupling,
    PackedFlowLinear,
    PackedLayer,
    PackedPositions,
)
from pynar.ops._operator import OPERATORS
from pynar.ops.packed_flow import FlowMap, FlowTensors
from pynar.ops.packed_layers import layer_tensors
from pynar.ops.packed_linear import PANEL

__all__ = ["FrozenFlow", "FrozenPositionAttention"]

Factors = tuple[Tensor, Tensor]  # log|det| and inverse of every matrix

# From so many rows of the source on, keys and values of all couplings at once would go through
# memory (256 MB for 1,024 rows of the base model); fewer rows are one product.
ROWS_AT_ONCE = 256


@functools.lru_cache(maxsize=64)
def _positions(width: int, dim: int) -> Tensor:
    """`[width, dim]`; the first position of the released code is 1."""
    with torch.inference_mode(False):
        return sinusoids(width + 1, dim)[1:]


@dataclass(frozen=True)
class SourceRows:
    """Keys and values of the source's `count` rows for couplings next to each other.

    Of those from one number to another, that one left out: `[B * S, M]`.
    """

    count: int
    of: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class _Level:
    """What the rows of a level see, by the number of steps in a row of a coupling: one or two."""

    rows: Rows
    positions: Tensor  # [N, W]
    sees: Tensor  # int32 [N, 1, 2], the rows of their sentence
    reads: Tensor  # the same of the source

    @staticmethod
    def of(lengths: Tensor, width: int, source: Tensor, dim: int) -> _Level:
        rows = Rows.of(lengths, width)
        positions = rows.pack(_positions(width, dim).expand(len(lengths), -1, -1)).contiguous()
        sees, reads = rows.own, rows.each(source)
        return _Level(rows, positions, sees.contiguous(), reads.contiguous())

    def tensors(self) -> list[Tensor]:
        """As `packed_flow` wants them."""
        return [self.positions, self.sees, self.reads]


@dataclass(frozen=True)
class _Context:
    whole: _Level
    halves: _Level | None  # of every second row, below the top
    source: SourceRows
    inverse: bool
    logdet: Tensor  # [N], what the rows' couplings have given so far; a pair has it in its first


class _Run:
    """Maps that are one call of `packed_flow`; couplings from number `first` to `last`."""

    def __init__(self, tensors: FlowTensors, first: int, last: int) -> None:
        self.tensors, self.couplings = tensors, (first, last)

    def __call__(self, x: Tensor, context: _Context) -> Tensor:
        kinds, tensors = self.tensors.arguments(context.inverse)
        y, logdet = OPERATORS["packed_flow"](
            x,
            kinds,
            *tensors,
            context.source.of(*self.couplings),
            context.whole.tensors(),
            context.halves.tensors() if context.halves is not None else [],
            *self.tensors.options,
            context.inverse,
        )
        context.logdet.add_(logdet)
        return y  # type: ignore[no-any-return]


class _Maps:
    """Neighbouring maps of a level, in one call or, with many rows of the source, in several.

    Several, so that keys and values of one coupling after the other are made and used.
    """

    def __init__(self, modules: list[nn.Module], factors: Factors, dtype: torch.dtype) -> None:
        maps = [_packed(module, factors, dtype) for module in modules]
        self.logdet = sum(one.logdet for one in maps)
        whole, each = FlowTensors.each(maps)
        numbers = [module.number for module in modules if isinstance(module, Coupling)]
        first, last = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
        self.at_once = _Run(whole, first, last)
        self.each: list[_Run] = []
        for module, tensors in zip(modules, each, strict=True):
            after = first + isinstance(module, Coupling)
            self.each.append(_Run(tensors, first, after))
            first = after

    def __call__(self, x: Tensor, context: _Context) -> Tensor:
        if context.source.count < ROWS_AT_ONCE:
            return self.at_once(x, context)
        for run in reversed(self.each) if context.inverse else self.each:
            x = run(x, context)
        return x


def _is_alone(module: nn.Module) -> bool:
    """Whether it is a coupling that `packed_flow` does not know."""
    return isinstance(module, Coupling) and module.transform is not TRANSFORMS["affine"]


def _packed(module: nn.Module, factors: Factors, dtype: torch.dtype) -> FlowMap:
    if isinstance(module, Coupling):
        net = _Net(module.net, dtype)
        output, positions = net.output, net.positions.packed() if net.positions else None
        return PackedCoupling(
            net.layer, output.packed, output.bias, module.split, module.up, positions
        )
    assert isinstance(module, ActNorm)
    norm = module.log_scale.detach(), module.bias.detach()
    if not isinstance(module, ActNormLinear):
        return PackedActNorm(*norm)
    logdet, inverse = (part[module.number] for part in factors)
    weight = module.weight.detach()
    return PackedFlowLinear(*norm, weight, inverse, float(logdet), module.layout)


class _PositionAttention:
    def __init__(self, module: PositionAttention, dtype: torch.dtype) -> None:
        self.heads, dim = module.heads, module.query.in_features
        scale = (dim // self.heads) ** -0.5
        query, bias = module.query.weight.detach(), module.query.bias.detach()
        self.query = PackedLinear(query * scale, bias * scale, dtype)
        self.key_value = PackedLinear(module.key_value.weight, module.key_value.bias, dtype)
        norm = module.norm
        pair = norm.weight.detach().clone(), norm.bias.detach().clone()
        self.norm = norm.normalized_shape, *pair, norm.eps

    def packed(self) -> PackedPositions:
        maps = self.key_value, self.query
        weights, biases = (maps[0].packed, maps[1].packed), (maps[0].bias, maps[1].bias)
        return PackedPositions(weights, biases, self.norm[1:3])

    def __call__(self, x: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        """Of rows `[N, W]`, positions as many, and what they see `[N, 1, 2]`."""
        keys_values = _heads(self.key_value(x), 2 * self.heads)
        q = _heads(self.query(positions), self.heads)
        k, v = keys_values[:, : self.heads], keys_values[:, self.heads :]
        return F.layer_norm(positions + _attend(q, k, v, sees), *self.norm)


class FrozenPositionAttention(_Frozen):
    """`PositionAttention` with packed weights; the same arguments and results."""

    def __init__(self, module: PositionAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = _PositionAttention(module, dtype)
        self.training = False

    def forward(self, x: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        batch, width, _ = x.shape
        first = torch.arange(batch, dtype=torch.int32)[:, None, None, None] * width
        rows = x.flatten(0, 1), positions.repeat(batch, 1), (sees + first).flatten(0, 1)
        return self.attention(*rows).view_as(x)


class _Net:
    """A coupling's network: one packed layer, and the map to shift and scale."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        if not isinstance(net, _AttentionNet):
            raise ValueError('FrozenFlow: `flow` must have `network` "attention", got "rnn"')
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
        norms = [parameter.detach().clone() for parameter in net.norms.parameters()]
        self.layer = PackedLayer(
            tuple(part.packed for part in maps),
            tuple(part.bias for part in maps),
            tuple(norms),
            net.heads,
            "relu",
            net.norms[0].eps,  # type: ignore[arg-type]
        )
        self._tensors = layer_tensors([self.layer])
        self.output = PackedLinear(net.output.weight, net.output.bias, dtype)

    def __call__(self, x: Tensor, level: _Level, source: Tensor) -> Tensor:
        if self.positions is None:
            x = x + level.positions
        else:
            x = self.positions(x, level.positions, level.sees)
        heads = self.layer.heads
        keys_values = _heads(source, 2 * heads)
        memory = [keys_values[:, :heads]], [keys_values[:, heads:]], level.reads
        states = OPERATORS["packed_layers"](
            x, *self._tensors, level.sees, *memory, None, len(x), 1, *self.layer.options()
        )
        return self.output(states)


class _Coupling:
    """One that `packed_flow` does not know, with another transform."""

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
        net = self.net(given, level, context.source.of(self.number, self.number + 1))
        # Each row is a sequence of one step, which has a log-determinant of its own.
        ones = torch.ones(len(changed), dtype=torch.int64)
        changed, logdet = self.apply(changed[:, None], ones, net[:, None], context.inverse)
        context.logdet[:: 2 if self.by_steps else 1] += logdet
        pair = (given, changed[:, 0]) if self.up else (changed[:, 0], given)
        return self.join(*(part[None] for part in pair))[0]


class FrozenFlow(_Frozen):
    """`Flow` with packed weights; the same arguments and results.

    Raises:
        ValueError: the flow has recurrent networks, which have no packed form.
    """

    def __init__(self, flow: Flow, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.heads, self.multiple = flow.dim, flow.heads, flow.multiple
        self.columns = [0, *itertools.accumulate(2 * width for width in flow._widths)]
        logdets, inverses = flow.factors()
        factors = logdets.detach(), inverses.detach()

        def freeze(level: Iterable[nn.Module]) -> list[_Maps | _Coupling]:
            parts: list[_Maps | _Coupling] = []
            for alone, modules in itertools.groupby(level, _is_alone):
                if alone:
                    parts += [_Coupling(module, dtype) for module in modules]  # type: ignore[arg-type]
                else:
                    parts.append(_Maps(list(modules), factors, dtype))
            return parts

        self.levels = [freeze(level) for level in flow.levels]  # type: ignore[arg-type]
        self.key_value = PackedLinear(flow.key_value_weight, flow.key_value_bias, dtype)
        self.by_panels = all(column % PANEL == 0 for column in self.columns)
        self.training = False

    def project(self, source: Tensor) -> SourceRows:
        """Keys and values of `source: [B, S, C]`, to be asked for by each coupling."""
        rows = source.flatten(0, 1)
        columns, key_value = self.columns, self.key_value
        if len(rows) < ROWS_AT_ONCE or not self.by_panels:
            whole = key_value(rows)
            return SourceRows(len(rows), lambda a, b: whole[:, columns[a] : columns[b]])
        return SourceRows(len(rows), lambda a, b: key_value.columns(columns[a], columns[b])(rows))

    def forward(
        self,
        z: Tensor,
        lengths: Tensor,
        keys_values: SourceRows,
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
        stride = keys_values.count // max(sentences, 1)
        begins = torch.arange(sentences) * stride
        source = torch.stack([begins, begins + source_lengths], 1).int()
        source = source.repeat_interleave(batch // max(sentences, 1), 0)
        contexts, own, steps = [], lengths, width
        for level in self.levels:
            whole = _Level.of(own, steps, source, self.dim // 2)
            halves = None
            if level is not self.levels[-1]:
                halves = _Level.of(own // 2, steps // 2, source, self.dim)
            logdet = torch.zeros(len(whole.positions))
            contexts.append(_Context(whole, halves, keys_values, inverse, logdet))
            own, steps = own // 2, steps // 2
        rows = Rows.of(lengths, width)
        run = self._sample if inverse else self._encode
        x = rows.unpack(run(rows.pack(z), contexts))
        return x, self._logdet(lengths, contexts)

    def _logdet(self, lengths: Tensor, contexts: list[_Context]) -> Tensor:
        """The sums over the rows of each sentence, `[B * n]`."""
        # Of a step: a level's rows are half as many as those of the one below.
        constant = sum(
            part.logdet / 2**number for number, level in enumerate(self.levels) for part in level
        )
        total = lengths * (-constant if contexts[0].inverse else constant)
        for context in contexts:
            total.index_add_(0, context.whole.rows.sentences, context.logdet)
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
