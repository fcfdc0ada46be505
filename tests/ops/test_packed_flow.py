from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.ops import (
    PackedActNorm,
    PackedCoupling,
    PackedFlowLinear,
    PackedLayer,
    PackedPositions,
    actnorm,
    affine_coupling,
    batched_logdet,
    flow_linear,
    interval_attention,
    pack_linear,
    packed_flow,
    packed_layers,
    packed_linear,
)
from pynar.ops.packed_flow import _OPERATOR, FlowMap, FlowTensors, RowsOf

FORMATS = [torch.float32, torch.bfloat16, torch.int8]
DIM, HIDDEN, HEADS, EPS = 16, 24, 2, 1e-3
LENGTHS, SOURCES = [4, 2, 6], [3, 1, 5]
SPLITS = ("features", "alternate", "steps")


def spread(lengths: list[int], of: list[int]) -> Tensor:
    """For each row of sentences of these lengths the rows of the same sentence among `of`."""
    ends = torch.tensor(of).cumsum(0)
    bounds = torch.stack([ends - torch.tensor(of), ends], 1).int()
    return bounds.repeat_interleave(torch.tensor(lengths), 0)[:, None]


def make_coupling(
    dtype: torch.dtype, split: str, up: bool, by_position: bool = False
) -> PackedCoupling:
    width = DIM if split == "steps" else DIM // 2
    shapes = [(3 * width, width), (width, width), (HIDDEN, width), (width, HIDDEN)]
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
    layer = PackedLayer(
        tuple(pack_linear(weight, dtype) for weight in weights),
        tuple(torch.randn(shape[0]) for shape in shapes),
        tuple(torch.rand(width) for _ in range(6)),
        HEADS,
        "relu",
        EPS,
    )
    output = pack_linear(torch.randn(2 * width, width) / width, dtype)
    positions = None
    if by_position:
        weights = [torch.randn(outputs, width) / width**0.5 for outputs in (2 * width, width)]
        key_value, query = (pack_linear(weight, dtype) for weight in weights)
        biases = torch.randn(2 * width), torch.randn(width)
        norm = torch.rand(width), torch.rand(width)
        positions = PackedPositions((key_value, query), biases, norm)
    return PackedCoupling(layer, output, torch.randn(2 * width), split, up, positions)


def make_linear(layout: str) -> PackedFlowLinear:
    weight = 1.2 * torch.nn.init.orthogonal_(torch.empty(4, 4))
    logdet, inverse = (part[0] for part in batched_logdet(weight[None]))
    norm = torch.randn(DIM) / 4, torch.randn(DIM)
    return PackedFlowLinear(*norm, weight, inverse, float(logdet), layout)


def make_maps(dtype: torch.dtype) -> list[FlowMap]:
    maps: list[FlowMap] = [PackedActNorm(torch.randn(DIM) / 4, torch.randn(DIM))]
    for split in SPLITS:
        maps += [make_coupling(dtype, split, True), make_linear("contiguous")]
        maps += [make_coupling(dtype, split, False), make_linear("strided")]
    maps.insert(1, make_coupling(dtype, "features", True, by_position=True))
    maps.append(make_coupling(dtype, "features", False, by_position=True))
    return maps


def make_inputs(
    maps: list[FlowMap], lengths: list[int] = LENGTHS, sources: list[int] = SOURCES
) -> tuple[Tensor, list[Tensor], RowsOf, RowsOf]:
    halved = [length // 2 for length in lengths]
    rows = torch.randn(sum(lengths), DIM // 2), spread(lengths, lengths), spread(lengths, sources)
    pairs = torch.randn(sum(halved), DIM), spread(halved, halved), spread(halved, sources)
    widths = [len(one.output_bias) for one in maps if isinstance(one, PackedCoupling)]
    memory = [torch.randn(sum(sources), width) for width in widths]
    return torch.randn(sum(lengths), DIM), memory, rows, pairs


def by_parts(
    x: Tensor, maps: list[FlowMap], memory: list[Tensor], rows: RowsOf, pairs: RowsOf, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The same from the operators that it consists of."""
    logdet = torch.zeros(len(x))
    numbers = iter(reversed(memory) if inverse else memory)
    whole = torch.tensor([len(x)])
    for one in reversed(maps) if inverse else maps:
        if isinstance(one, PackedActNorm):
            y, _ = actnorm(x[None], whole, one.log_scale, one.bias, inverse=inverse)
            x = y[0]
            continue
        if isinstance(one, PackedFlowLinear):
            norm = one.log_scale[None], one.bias[None], one.weight[None]
            factors = torch.tensor([one.log_abs_det]), one.inverse[None]
            options: dict[str, Any] = {"layout": one.layout, "factors": factors}
            x = flow_linear(x[None], whole, *norm, inverse=inverse, **options)[0][0]
            continue
        first, second = halves(x, one.split)
        given, changed = (first, second) if one.up else (second, first)
        positions, sees, reads = pairs if one.split == "steps" else rows
        keys, values = (part.unflatten(1, (HEADS, -1)) for part in next(numbers).chunk(2, 1))
        h = given + positions
        if one.positions is not None:
            maps_of = zip(one.positions.weights, one.positions.biases, strict=True)
            found, q = (
                packed_linear(h, *own) for h, own in zip((given, positions), maps_of, strict=True)
            )
            q, k, v = (part.unflatten(1, (HEADS, -1)) for part in (q, *found.chunk(2, 1)))
            gathered = interval_attention(q, k, v, sees, scale=1.0).flatten(1)
            # packed_linear's normalisation, of what a weight of zeros leaves alone.
            nothing = pack_linear(torch.zeros(DIM // 2, DIM // 2), torch.float32)
            norm = *one.positions.norm, EPS
            h = packed_linear(h, nothing, residual=gathered + positions, output_norm=norm)
        h = packed_layers(h, [one.layer], sees, memory=([keys], [values], reads))
        net = packed_linear(h, one.output, one.output_bias)
        ones = torch.ones(len(given), dtype=torch.int64)
        shift, raw_scale = net[:, None].chunk(2, 2)
        new, by_row = affine_coupling(
            changed[:, None].contiguous(), ones, shift, raw_scale, inverse=inverse
        )
        logdet[:: 2 if one.split == "steps" else 1] += by_row
        x = x.clone()
        parts = halves(x, one.split)
        parts[1 if one.up else 0].copy_(new[:, 0])
    return x, logdet


def halves(x: Tensor, split: str) -> tuple[Tensor, Tensor]:
    if split == "features":
        return x[:, : DIM // 2], x[:, DIM // 2 :]
    return (x[:, ::2], x[:, 1::2]) if split == "alternate" else (x[::2], x[1::2])


def constant(maps: list[FlowMap]) -> float:
    return sum(one.logdet for one in maps)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_is_its_parts_to_the_last_bit(dtype: torch.dtype, inverse: bool) -> None:
    maps = make_maps(dtype)
    x, memory, rows, pairs = make_inputs(maps)
    want, logdet = by_parts(x, maps, memory, rows, pairs, inverse)
    got, found = packed_flow(x, maps, memory, rows, pairs, inverse=inverse)
    assert torch.equal(got, want)
    total = logdet + (-constant(maps) if inverse else constant(maps))
    assert torch.equal(found, total)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_simd_level_matches_the_reference(dtype: torch.dtype, inverse: bool) -> None:
    maps = make_maps(dtype)[:9]
    x, *others = make_inputs(maps)
    arguments = raw_arguments(x, maps, *others, inverse)
    limit = {torch.float32: 1e-3, torch.bfloat16: 2e-1, torch.int8: 5e-1}[dtype]
    for got, want in zip(_OPERATOR.call(*arguments), _OPERATOR.reference(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("of", ["operator", "reference"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_is_undone(of: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if of == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    # A rounded network is the same in both directions only where it is given the same half.
    maps = make_maps(dtype) if dtype == torch.float32 else [make_coupling(dtype, "steps", True)]
    x, *others = make_inputs(maps)
    y, logdet = packed_flow(x, maps, *others)
    back, other = packed_flow(y, maps, *others, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other, -logdet, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("split", [*SPLITS, "features by position"])
@pytest.mark.parametrize("of", ["operator", "reference"])
def test_a_coupling_by_plain_attention_and_its_jacobian(
    of: str, split: str, up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, in float64, from PyTorch's own attention; the log-determinant by autograd."""
    if of == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    split, by_position = split.split()[0], " by position" in split
    one = make_coupling(torch.float32, split, up, by_position)
    count, sources = 4, 3
    n, width = (count // 2, DIM) if split == "steps" else (count, DIM // 2)
    own = torch.randn(n, width), spread([n], [n]), spread([n], [sources])
    memory = torch.randn(sources, 2 * width)
    weights = [weight.unpack().double() for weight in (*one.layer.weights, one.output)]
    biases = [bias.double() for bias in (*one.layer.biases, one.output_bias)]
    norms = [norm.double() for norm in one.layer.norms]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(0, 1).flatten(1)

    def couple(x: Tensor) -> Tensor:
        first, second = halves(x, split)
        given, changed = (first, second) if up else (second, first)

        def norm(part: int, h: Tensor) -> Tensor:
            return F.layer_norm(h, (width,), *norms[2 * part : 2 * part + 2], EPS)

        h = positions = own[0].double()
        if one.positions is None:
            h = given + positions
        else:
            key_value, query = (weight.unpack().double() for weight in one.positions.weights)
            bias, query_bias = (bias.double() for bias in one.positions.biases)
            found = F.linear(given, key_value, bias).chunk(2, 1)
            h = h + attend(F.linear(positions, query, query_bias), *found)
            h = F.layer_norm(h, (width,), *(x.double() for x in one.positions.norm), EPS)
        h = norm(0, h + attend(*F.linear(h, weights[0], biases[0]).chunk(3, 1)))
        query = F.linear(h, weights[1], biases[1])
        h = norm(1, h + attend(query, *memory.double().chunk(2, 1)))
        inner = F.relu(F.linear(h, weights[2], biases[2]))
        h = norm(2, h + F.linear(inner, weights[3], biases[3]))
        shift, scale = F.linear(h, weights[4], biases[4]).chunk(2, 1)
        new = torch.sigmoid(scale + 2) * changed + shift
        first, second = (given, new) if up else (new, given)
        if split == "features":
            return torch.cat([first, second], 1)
        stacked = torch.stack([first, second], 2 if split == "alternate" else 1)
        return stacked.reshape(x.shape)

    x = torch.randn(count, DIM)
    tensors = (None, own) if split == "steps" else (own, None)
    # `rows` must be there, though nothing reads it.
    spare = torch.randn(count, DIM // 2), spread([count], [count]), spread([count], [sources])
    got, logdet = packed_flow(x, [one], [memory], tensors[0] or spare, tensors[1])
    torch.testing.assert_close(got, couple(x.double()).float(), rtol=1e-4, atol=1e-4)
    jacobian = torch.autograd.functional.jacobian(couple, x.double())
    want = jacobian.reshape(count * DIM, count * DIM).slogdet().logabsdet  # type: ignore[operator]
    torch.testing.assert_close(logdet.sum(), want.float(), rtol=1e-4, atol=1e-4)


# The latter go through layers in several tiles of at most 96 rows, of which some end in a sentence.
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("lengths", "sources"), [(LENGTHS, SOURCES), ([60, 34, 2, 240, 6], [3, 1, 5, 2, 4])]
)
def test_sentences_do_not_depend_on_batch_mates_or_threads(
    lengths: list[int], sources: list[int], dtype: torch.dtype, inverse: bool
) -> None:
    maps = make_maps(dtype)
    x, memory, rows, pairs = make_inputs(maps, lengths, sources)
    together, logdet = packed_flow(x, maps, memory, rows, pairs, inverse=inverse)
    begin = source = 0
    for length, size in zip(lengths, sources, strict=True):
        own, half = slice(begin, begin + length), slice(begin // 2, (begin + length) // 2)
        alone, by_row = packed_flow(
            x[own],
            maps,
            [part[source : source + size] for part in memory],
            (rows[0][own], rows[1][own] - begin, rows[2][own] - source),
            (pairs[0][half], pairs[1][half] - begin // 2, pairs[2][half] - source),
            inverse=inverse,
        )
        assert torch.equal(alone, together[own])
        assert torch.equal(by_row, logdet[own])
        begin, source = begin + length, source + size
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found, _ = packed_flow(x, maps, memory, rows, pairs, inverse=inverse)
            assert torch.equal(found, together)
    finally:
        torch.set_num_threads(threads)


def test_views_equal_copies_and_nothing_is_overwritten() -> None:
    maps = make_maps(torch.int8)
    x, memory, rows, pairs = make_inputs(maps)
    wide = torch.randn(len(x), 3 * DIM)
    projected = torch.randn(len(memory[0]), sum(part.shape[1] for part in memory))
    views = list(projected.split([part.shape[1] for part in memory], 1))
    for view in (wide[:, DIM : 2 * DIM], wide[:, ::3]):
        before = view.clone()
        got, _ = packed_flow(view, maps, views, rows, pairs)
        copies = [part.contiguous() for part in views]
        want, _ = packed_flow(before, maps, copies, rows, pairs)
        assert torch.equal(got, want)
        assert torch.equal(view, before)


def test_empty() -> None:
    maps = make_maps(torch.int8)
    memory = make_inputs(maps)[1]
    nothing = torch.zeros(0, 1, 2, dtype=torch.int32)
    rows = torch.empty(0, DIM // 2), nothing, nothing
    pairs = torch.empty(0, DIM), nothing, nothing
    y, logdet = packed_flow(torch.empty(0, DIM), maps, memory, rows, pairs)
    assert y.shape == (0, DIM)
    assert logdet.shape == (0,)
    x = torch.randn(3, DIM)
    y, logdet = packed_flow(x, [])
    assert torch.equal(y, x)
    assert y is not x
    assert not logdet.any()


def raw_arguments(
    x: Tensor,
    maps: list[FlowMap],
    memory: list[Tensor],
    rows: RowsOf,
    pairs: RowsOf,
    inverse: bool = False,
) -> tuple[Any, ...]:
    tensors = FlowTensors.of(maps)
    kinds, flat = tensors.arguments(inverse)
    source = torch.cat(memory, 1)
    return (x, kinds, *flat, source, list(rows), list(pairs), *tensors.options, inverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_registered_rightly(dtype: torch.dtype) -> None:
    maps = make_maps(dtype)[:5]
    x, *others = make_inputs(maps)
    arguments = raw_arguments(x, maps, *others, True)
    torch.library.opcheck(torch.ops.pynar.packed_flow.default, arguments)


def test_compiles_into_one_graph() -> None:
    maps = make_maps(torch.int8)
    x, *others = make_inputs(maps)

    def twice(x: Tensor) -> Tensor:
        return packed_flow(packed_flow(2 * x, maps, *others)[0], maps, *others, inverse=True)[0]

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twice(x), rtol=0, atol=0)


def test_is_not_differentiable() -> None:
    maps = make_maps(torch.float32)
    x, *others = make_inputs(maps)
    assert not packed_flow(x.requires_grad_(), maps, *others)[0].requires_grad


COUNT = sum(LENGTHS)
REJECTED: list[tuple[int, Any, str]] = [
    (0, torch.ones(DIM), "`x` must have 2 dimensions [N, C], got shape [16]"),
    (0, torch.ones(COUNT, DIM).double(), "`x` must have dtype float32, got float64"),
    (0, torch.ones(COUNT, DIM + 1), "`x` must have an even number of channels, got 17"),
    (0, torch.ones(COUNT - 1, DIM), "`x` must have an even number of rows, got 11"),
    (1, [11], "`kinds` must be in [0, 10], got 11"),
    (2, torch.ones(1), "`linear` must have shape [320] (numbers of all maps), got [1]"),
    (3, torch.ones(1), "`weights` must have shape [34816] (numbers of all maps), got [1]"),
    (3, torch.ones(1).double(), "`weights` must have dtype float32 or bfloat16 or int8, got flo"),
    (4, torch.ones(1), "`scales` must have shape [2816] (numbers of all maps), got [1]"),
    (5, torch.ones(1), "`column_sums` must have shape [2816] (numbers of all maps), got [1]"),
    (6, torch.ones(1), "`biases` must have shape [800] (numbers of all maps), got [1]"),
    (7, torch.ones(1), "`norms` must have shape [512] (numbers of all maps), got [1]"),
    (7, torch.ones(512).int(), "`norms` must have dtype float32, got int32"),
    (8, torch.ones(9), "`memory` must have 2 dimensions [S, M], got shape [9]"),
    (8, torch.ones(9, 15), "`memory` must have shape [9, 160] (keys and values of each coupling)"),
    (9, [], "`rows` must have 3 tensors (positions, and what a row attends to), got 0"),
    (9, [torch.ones(3, 8)] * 3, "`rows` must have shape [12, 8] (rows, channels of half the stat"),
    (10, [], "`pairs` must have 3 tensors (positions, and what a row attends to), got 0"),
    (
        10,
        [torch.ones(6, 16), torch.zeros(6, 1, 2), torch.zeros(6, 1, 2)],
        "`pairs` must have dtype int32, got float32",
    ),
    (11, 3, "`heads` must divide half the channels of `x` (8), got 3"),
    (12, 0, "`hidden` must be at least 1, got 0"),
    (13, 0, "`matrix` must be at least 1, got 0"),
]


@pytest.mark.parametrize("of", ["operator", "reference"])
@pytest.mark.parametrize(("place", "value", "message"), REJECTED)
def test_a_wrong_call_says_what_is_wanted(
    of: str, place: int, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    maps = make_maps(torch.int8)
    x, *others = make_inputs(maps)
    arguments = list(raw_arguments(x, maps, *others))
    arguments[place] = value
    with pytest.raises(ValueError) as error:
        _OPERATOR.call(*arguments)
    assert str(error.value).startswith(f"packed_flow: {message}")


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interval_outside_is_rejected_on_every_thread(threads: int) -> None:
    maps = make_maps(torch.int8)
    x, memory, rows, pairs = make_inputs(maps)
    for place, most in ((1, sum(LENGTHS)), (2, sum(SOURCES))):
        wrong = list(rows)
        wrong[place] = wrong[place].clone()
        wrong[place][7, 0, 1] = 99
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with pytest.raises(ValueError, match=rf"`intervals` must lie in \[0, {most}\], got"):
                packed_flow(x, maps, memory, tuple(wrong), pairs)  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(before)


def test_wrong_maps_are_rejected() -> None:
    coupling = make_coupling(torch.int8, "features", True)
    other = replace(coupling, layer=replace(coupling.layer, heads=4))
    by_position = make_coupling(torch.int8, "features", True, by_position=True)
    assert by_position.positions is not None
    swapped = replace(by_position.positions, weights=by_position.positions.weights[::-1])
    by_position = replace(by_position, split="alternate")
    x, *others = make_inputs([coupling, coupling])
    for maps, message in (
        ([replace(coupling, split="rows")], "`split` must be one of features, alternate, steps, "),
        ([replace(make_linear("strided"), layout="x")], "`layout` must be one of contiguous, str"),
        (
            [replace(coupling, output=pack_linear(torch.zeros(DIM, DIM // 2), torch.bfloat16))],
            "`maps` must agree in heads, eps, activation, hidden size, type ",
        ),
        (
            [replace(by_position, split="features", positions=swapped)],
            "`maps` must have weights of the sizes [(16, 8), (8, 8), (24, 8), ",
        ),
        ([by_position], "`split` must be \"features\" with `positions`, got 'alternate'"),
        (["actnorm"], "`maps` must be packed maps of a flow, got str"),
        ([coupling, other], "`maps` must agree in heads, eps, activation, hidden size, type "),
    ):
        with pytest.raises(ValueError) as error:
            packed_flow(x, maps, *others)  # type: ignore[arg-type]
        assert str(error.value).startswith(f"packed_flow: {message}")
