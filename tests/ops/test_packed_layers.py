from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.ops import (
    PackedLayer,
    interval_attention,
    pack_linear,
    packed_layers,
    packed_linear,
)
from pynar.ops.packed_layers import _OPERATOR, layer_tensors
from pynar.testing import tolerance

FORMATS = [torch.float32, torch.bfloat16, torch.int8]
DIM, HIDDEN, HEADS, EPS = 24, 40, 3, 1e-3
LENGTHS, SOURCES = [4, 1, 7, 2], [3, 5, 1, 8]


def spread(lengths: list[int], of: list[int]) -> Tensor:
    """For each row of sentences of these lengths the rows of the same sentence among `of`."""
    ends = torch.tensor(of).cumsum(0)
    bounds = torch.stack([ends - torch.tensor(of), ends], 1).int()
    return bounds.repeat_interleave(torch.tensor(lengths), 0)[:, None]


def make_layer(
    dtype: torch.dtype, *, crosses: bool, norm_first: bool, bare: bool = False
) -> PackedLayer:
    """`bare` attention has no linear map behind it."""
    output = [] if bare else [(DIM, DIM)]
    shapes = [(3 * DIM, DIM), *output] + crosses * [(DIM, DIM), *output]
    shapes += [(HIDDEN, DIM), (DIM, HIDDEN)]
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
    norms = () if norm_first else tuple(torch.rand(DIM) for _ in range(6 if crosses else 4))
    return PackedLayer(
        tuple(pack_linear(weight, dtype) for weight in weights),
        tuple(torch.randn(shape[0]) for shape in shapes),
        norms,
        HEADS,
        "gelu",
        EPS,
    )


def make_arguments(
    crosses: bool, lengths: list[int] = LENGTHS, sources: list[int] = SOURCES
) -> tuple[Tensor, Tensor, Any]:
    x = torch.randn(sum(lengths), DIM)
    memory = None
    if crosses:
        keys, values = torch.randn(2, sum(sources), HEADS, DIM // HEADS)
        memory = keys, values, spread(lengths, sources)
    return x, spread(lengths, lengths), memory


def run(x: Tensor, layer: PackedLayer, sees: Tensor, memory: Any = None, **options: Any) -> Tensor:
    """A single layer."""
    if memory is not None:
        memory = [memory[0]], [memory[1]], memory[2]
    return packed_layers(x, [layer], sees, memory=memory, **options)


def by_parts(
    x: Tensor,
    layer: PackedLayer,
    intervals: Tensor,
    memory: Any = None,
    chosen: Tensor | None = None,
    content: int | None = None,
) -> Tensor:
    """The same from the operators that it consists of."""
    norm_first = not layer.norms

    def enter(index: int, x: Tensor, activation: str = "none") -> Tensor:
        eps = EPS if norm_first else None
        weight, bias = layer.weights[index], layer.biases[index]
        return packed_linear(x, weight, bias, activation=activation, input_norm=eps)

    def leave(part: int, index: int | None, x: Tensor, residual: Tensor) -> Tensor:
        norm = None if norm_first else (*layer.norms[2 * part : 2 * part + 2], EPS)
        if index is None:
            return x + residual if norm is None else F.layer_norm(x + residual, (DIM,), *norm)
        weight, bias = layer.weights[index], layer.biases[index]
        return packed_linear(x, weight, bias, residual=residual, output_norm=norm)

    def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        y = interval_attention(q.unflatten(1, (HEADS, -1)), k, v, sees, scale=1.0)
        assert isinstance(y, Tensor)
        return y.flatten(1)

    q, k, v = enter(0, x).chunk(3, 1)
    k, v = (part[:content].unflatten(1, (HEADS, -1)) for part in (k, v))
    rows = torch.arange(len(x)) if chosen is None else chosen
    bare = len(layer.weights) < (4 if memory is None else 6)
    h = leave(0, None if bare else 1, attend(q[rows], k, v, intervals[rows]), x[rows])
    if memory is not None:
        y = attend(enter(1 if bare else 2, h), *memory[:2], memory[2][rows])
        h = leave(1, None if bare else 3, y, h)
    last = len(layer.weights) - 1
    return leave(1 if memory is None else 2, last, enter(last - 1, h, layer.activation), h)


every_layer = pytest.mark.parametrize(
    ("crosses", "norm_first"), [(False, False), (False, True), (True, False), (True, True)]
)


@every_layer
@pytest.mark.parametrize("dtype", FORMATS)
def test_is_its_parts_to_the_last_bit(
    dtype: torch.dtype, crosses: bool, norm_first: bool, extension: Any
) -> None:
    layer = make_layer(dtype, crosses=crosses, norm_first=norm_first)
    x, sees, memory = make_arguments(crosses)
    chosen = torch.tensor([12, 0, 5, 5])
    for options in ({}, {"chosen": chosen}, {"content": 8, "chosen": chosen}, {"content": 8}):
        seen = sees.clamp(max=options.get("content", 99))  # type: ignore[call-overload]
        got = run(x, layer, seen, memory=memory, **options)  # type: ignore[arg-type]
        want = by_parts(x, layer, seen, memory, **options)  # type: ignore[arg-type]
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_several_tiles_are_their_parts_to_the_last_bit(
    threads: int, dtype: torch.dtype, extension: Any
) -> None:
    layer = make_layer(dtype, crosses=True, norm_first=True)
    # A tile has at most 96 rows: one ends between sentences, one within the longest.
    x, sees, memory = make_arguments(True, [50, 45, 1, 260, 30], [3, 5, 1, 8, 2])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for chosen in (None, torch.arange(0, len(x), 3).flip(0)):
            got = run(x, layer, sees, memory=memory, chosen=chosen)
            assert torch.equal(got, by_parts(x, layer, sees, memory, chosen=chosen))
    finally:
        torch.set_num_threads(before)


@every_layer
@pytest.mark.parametrize("dtype", FORMATS)
def test_without_output_maps_it_is_its_parts(
    dtype: torch.dtype, crosses: bool, norm_first: bool
) -> None:
    layer = make_layer(dtype, crosses=crosses, norm_first=norm_first, bare=True)
    x, sees, memory = make_arguments(crosses)
    wide = torch.cat([x, x], 1)
    # Rounding to few bits takes what differs in the last bit of fp32 to another step.
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.int8: 2e-1}[dtype]
    for options in ({}, {"chosen": torch.tensor([12, 0, 5, 5]), "content": 8}):
        seen = sees.clamp(max=options.get("content", 99))  # type: ignore[call-overload]
        got = run(wide[:, DIM:], layer, seen, memory=memory, **options)  # type: ignore[arg-type]
        want = by_parts(x, layer, seen, memory, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=limit, atol=limit)


class Module(nn.Module):
    """PyTorch's own attention and normalisation, sentence by sentence, in float64."""

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__()
        self.weights = [weight.unpack().double() for weight in layer.weights]
        self.biases = [bias.double() for bias in layer.biases]
        self.norms = [norm.double() for norm in layer.norms]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(0, 1).flatten(1)

    def linear(self, index: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[index], self.biases[index])

    def forward(self, h: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        last = len(self.weights) - 1

        bare = len(self.weights) < (4 if keys is None else 6)

        def self_attention(x: Tensor) -> Tensor:
            y = self.attend(*self.linear(0, x).chunk(3, 1))
            return y if bare else self.linear(1, y)

        def cross_attention(x: Tensor) -> Tensor:
            assert keys is not None and values is not None
            query = self.linear(1 if bare else 2, x)
            y = self.attend(query, keys.flatten(1), values.flatten(1))
            return y if bare else self.linear(3, y)

        def feed_forward(x: Tensor) -> Tensor:
            return self.linear(last, F.gelu(self.linear(last - 1, x)))

        sublayers = [self_attention, cross_attention, feed_forward]
        if keys is None:
            del sublayers[1]
        for index, sublayer in enumerate(sublayers):
            if not self.norms:
                h = h + sublayer(F.layer_norm(h, (DIM,), eps=EPS))
            else:
                norm = self.norms[2 * index : 2 * index + 2]
                h = F.layer_norm(h + sublayer(h), (DIM,), *norm, EPS)
        return h


@every_layer
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("of", ["operator", "reference"])
def test_is_a_transformer_layer_of_each_sentence(
    of: str, bare: bool, crosses: bool, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    layer = make_layer(torch.float32, crosses=crosses, norm_first=norm_first, bare=bare)
    x, sees, memory = make_arguments(crosses)
    got = run(x, layer, sees, memory=memory)
    module, want = Module(layer), []
    keys, values = (part.double().split(SOURCES) for part in memory[:2]) if memory else ([], [])
    for index, sentence in enumerate(x.double().split(LENGTHS)):
        pair = (keys[index], values[index]) if memory else (None, None)
        want.append(module(sentence, *pair))
    limits = {name: 10 * limit for name, limit in tolerance("cpu", torch.float32).items()}
    torch.testing.assert_close(got, torch.cat(want).float(), **limits)  # type: ignore[arg-type]
    chosen = torch.tensor([3, 13, 0])
    part = run(x, layer, sees, memory=memory, chosen=chosen)
    torch.testing.assert_close(part, got[chosen], **limits)  # type: ignore[arg-type]


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_simd_level_matches_the_reference(dtype: torch.dtype) -> None:
    layer = make_layer(dtype, crosses=True, norm_first=True)
    x, sees, memory = make_arguments(True)
    arguments = raw_arguments(layer, x, sees, memory)
    # Few bits: a sum in another order can come to lie on the other side of a rounding step.
    limit = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.int8: 2e-1}[dtype]
    torch.testing.assert_close(
        _OPERATOR.call(*arguments), _OPERATOR.reference(*arguments), rtol=limit, atol=limit
    )


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", FORMATS)
def test_sentences_do_not_depend_on_batch_mates_or_threads(dtype: torch.dtype) -> None:
    layer = make_layer(dtype, crosses=True, norm_first=False)
    x, sees, memory = make_arguments(True)
    together = run(x, layer, sees, memory=memory)
    begin = source = 0
    for length, size in zip(LENGTHS, SOURCES, strict=True):
        own = slice(begin, begin + length)
        part = *(m[source : source + size] for m in memory[:2]), memory[2][own] - source
        alone = run(x[own], layer, sees[own] - begin, memory=part)
        assert torch.equal(alone, together[own])
        begin, source = begin + length, source + size
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x, layer, sees, memory=memory), together)
    finally:
        torch.set_num_threads(threads)


def test_views_equal_copies() -> None:
    layer = make_layer(torch.int8, crosses=True, norm_first=True)
    rows = sum(LENGTHS)
    wide = torch.randn(2 * rows, 3 * DIM)
    projected = torch.randn(sum(SOURCES), 6, HEADS, DIM // HEADS)
    bounds = torch.tensor([[0, 5]], dtype=torch.int32)
    sees = bounds.expand(rows, 2)[:, None]
    for x in (wide[::2, 2 : 2 + DIM], wide[:rows, ::3]):
        memory = projected[:, 1], projected[:, 4], sees.flip(2).flip(2)
        chosen = torch.tensor([1, 9, 2, 9])[::2]
        views = run(x, layer, sees, memory=memory, chosen=chosen)
        copies = run(
            x.clone(memory_format=torch.contiguous_format),
            layer,
            sees.contiguous(),
            memory=tuple(part.contiguous() for part in memory),  # type: ignore[arg-type]
            chosen=chosen.contiguous(),
        )
        torch.testing.assert_close(views, copies, rtol=1e-5, atol=1e-5)


@every_layer
@pytest.mark.parametrize("of", ["operator", "reference"])
def test_a_stack_is_its_layers_one_after_another(
    of: str, crosses: bool, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    layers = [make_layer(torch.int8, crosses=crosses, norm_first=norm_first) for _ in range(3)]
    x, sees, memory = make_arguments(crosses)
    chosen, content = torch.tensor([12, 0, 5, 5]), 8
    seen = sees.clamp(max=content)
    pairs = torch.randn(2, 3, sum(SOURCES), HEADS, DIM // HEADS)
    each: list[Any] = [(*pairs[:, i], memory[2]) if crosses else None for i in range(3)]
    h = x
    for layer, own in zip(layers[:-1], each[:-1], strict=True):
        h = run(h, layer, seen, own, content=content)
    want = run(h, layers[-1], seen, each[-1], content=content, chosen=chosen)
    whole = (list(pairs[0]), list(pairs[1]), memory[2]) if crosses else None
    got = packed_layers(x, layers, seen, memory=whole, content=content, chosen=chosen)
    assert torch.equal(got, want)


def test_nothing_is_read_of_what_no_row_sees() -> None:
    layer = make_layer(torch.float32, crosses=True, norm_first=False)
    x, sees, (keys, values, reads) = make_arguments(True)
    want = run(x, layer, sees, memory=(keys, values, reads))
    spare = torch.full((3, *keys.shape[1:]), torch.nan)
    more = torch.cat([keys, spare]), torch.cat([values, spare]), reads
    assert torch.equal(run(x, layer, sees, memory=more), want)
    x[5:12] = torch.nan  # the third sentence
    got = run(x, layer, sees, memory=(keys, values, reads))
    others = torch.cat([torch.arange(5), torch.arange(12, 14)])
    assert got[5:12].isnan().all()
    torch.testing.assert_close(got[others], want[others], rtol=1e-5, atol=1e-5)


def test_empty() -> None:
    layer = make_layer(torch.int8, crosses=False, norm_first=True)
    sees = torch.zeros(0, 1, 2, dtype=torch.int32)
    assert run(torch.empty(0, DIM), layer, sees).shape == (0, DIM)
    x, sees, _ = make_arguments(False)
    nothing = torch.zeros(0, dtype=torch.long)
    assert run(x, layer, sees, chosen=nothing).shape == (0, DIM)


def raw_arguments(layer: PackedLayer, x: Tensor, sees: Tensor, memory: Any) -> tuple[Any, ...]:
    """Of two layers with the same weights."""
    keys, values, reads = memory or (None, None, None)
    pairs = ([], []) if memory is None else ([keys, keys], [values, values])
    return (x, *layer_tensors([layer] * 2), sees, *pairs, reads, None, len(x), 2, *layer.options())


@pytest.mark.parametrize(("dtype", "crosses"), [(torch.float32, False), (torch.int8, True)])
def test_registered_rightly(dtype: torch.dtype, crosses: bool) -> None:
    layer = make_layer(dtype, crosses=crosses, norm_first=not crosses)
    arguments = list(raw_arguments(layer, *make_arguments(crosses)))
    arguments[10] = torch.tensor([3, 1]) if crosses else None
    torch.library.opcheck(torch.ops.pynar.packed_layers.default, tuple(arguments))


def test_compiles_into_one_graph() -> None:
    layer = make_layer(torch.int8, crosses=True, norm_first=False)
    x, sees, memory = make_arguments(True)

    def twice(x: Tensor) -> Tensor:
        return run(run(2 * x, layer, sees, memory=memory), layer, sees, memory=memory)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twice(x), rtol=0, atol=0)


def test_is_not_differentiable() -> None:
    layer = make_layer(torch.float32, crosses=False, norm_first=True)
    layer = replace(layer, biases=tuple(bias.requires_grad_() for bias in layer.biases))
    x, sees, _ = make_arguments(False)
    assert not run(x.requires_grad_(), layer, sees).requires_grad


@pytest.fixture(params=["chosen", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What rejects a call: the implementation in use, or the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    return request.param


ROWS = sum(LENGTHS)
REJECTED: list[tuple[int, Any, str]] = [
    (0, torch.ones(DIM), "packed_layers: `x` must have 2 dimensions [N, C], got shape [24]"),
    (0, torch.ones(ROWS, DIM).double(), "packed_layers: `x` must have dtype float32, got float64"),
    (1, [], "packed_layers: `weights` must have 12 tensors (one for each linear map), got 0"),
    (
        2,
        [torch.ones(1)],
        "packed_layers: `scales` must have 12 tensors (one for each linear map, ",
    ),
    (3, [], "packed_layers: `column_sums` must have 12 tensors (one for each linear map, or none)"),
    (
        4,
        [torch.ones(1)] * 12,
        "packed_layers: `biases` must have shape [72] (3 C, then C each, F ",
    ),
    (5, [torch.ones(DIM)], "packed_layers: `norms` must have 12 tensors (weight and bias for eac"),
    (
        5,
        [torch.ones(3)] * 12,
        "packed_layers: `norms` must have shape [24] (channels of `x`), got [3]",
    ),
    (
        6,
        torch.zeros(3, 1, 2).int(),
        "packed_layers: `intervals` must have shape [14, 1, 2] (rows ",
    ),
    (6, torch.zeros(ROWS, 1, 2).long(), "packed_layers: `intervals` must have dtype int32, got in"),
    (7, [], "packed_layers: `values` must have 0 tensors (one for each of `keys`), got 2"),
    (7, [torch.ones(1)], "packed_layers: `keys` must have 2 tensors (one for each layer, or none)"),
    (8, [], "packed_layers: `values` must have 2 tensors (one for each of `keys`), got 0"),
    (9, None, "packed_layers: `memory_intervals` must be given with `keys`, and only then, got No"),
    (9, torch.zeros(3, 1, 2).int(), "packed_layers: `memory_intervals` must have shape [14, 1, 2]"),
    (10, torch.tensor([14]), "packed_layers: `chosen` must lie in [0, 14), got 14"),
    (10, torch.tensor([1]).int(), "packed_layers: `chosen` must have dtype int64, got int32"),
    (11, 15, "packed_layers: `content` must be in [0, 14], got 15"),
    (12, 0, "packed_layers: `layers` must be at least 1, got 0"),
    (13, 5, "packed_layers: `heads` must divide the channels of `x` (24), got 5"),
    (14, 3, "packed_linear: `activation` must be in [0, 2], got 3"),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("place", "value", "message"), REJECTED)
def test_a_wrong_call_says_what_is_wanted(place: int, value: Any, message: str) -> None:
    layer = make_layer(torch.int8, crosses=True, norm_first=False)
    arguments = list(raw_arguments(layer, *make_arguments(True)))
    arguments[place] = value
    if place == 7 and not value:
        arguments[1:6] = layer_tensors(
            [make_layer(torch.int8, crosses=False, norm_first=False)] * 2
        )
    with pytest.raises(ValueError) as error:
        _OPERATOR.call(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interval_outside_is_rejected_on_every_thread(threads: int) -> None:
    layer = make_layer(torch.int8, crosses=True, norm_first=False)
    x, sees, memory = make_arguments(True)
    memory[2][9, 0, 1] = 99
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match=r"`intervals` must lie in \[0, 17\], got"):
            run(x, layer, sees, memory)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "silu"}, "`activation` must be one of none, relu, gelu, got silu"),
        ({"eps": -1.0}, "`eps` must be at least 0, got -1.0"),
    ],
)
def test_a_wrong_layer_is_rejected(change: dict[str, Any], message: str) -> None:
    layer = make_layer(torch.int8, crosses=False, norm_first=True)
    x, sees, _ = make_arguments(False)
    with pytest.raises(ValueError, match="packed_layers: ") as error:
        run(x, replace(layer, **change), sees)
    assert str(error.value) == f"packed_layers: {message}"
    other = replace(layer, eps=0.5)
    with pytest.raises(
        ValueError, match=r"`eps` must be the same in all layers \(0.001\), got 0.5"
    ):
        packed_layers(x, [layer, other], sees)
    with pytest.raises(ValueError, match="`layers` must have at least one layer, got none"):
        packed_layers(x, [], sees)
    with pytest.raises(ValueError, match="`layers` must be PackedLayers, got Tensor"):
        run(x, x, sees)  # type: ignore[arg-type]
