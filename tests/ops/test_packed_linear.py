from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pynar import _backend, reference
from pynar.ops import PackedWeight, pack_linear, packed_linear
from pynar.ops import packed_linear as function
from pynar.ops.packed_linear import _OPERATOR, strip_columns
from pynar.testing import tolerance

FORMATS = [torch.float32, torch.bfloat16, torch.int8]
# (N, K, M): words that the depth does not fill, panels that the columns do not fill, and blocks of
# rows that are complete, begun and short by one.
# The last: panels go by in groups, and more steps than stay in a cache.
GROUPS = (300, 1030, 520)
SHAPES = [(1, 1, 1), (2, 3, 65), (5, 18, 64), (7, 33, 130), (13, 64, 63), (98, 37, 200), GROUPS]


def make_weight(depth: int, columns: int) -> Tensor:
    return torch.randn(columns, depth) / math.sqrt(depth)


def expected(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The map of rounded rows with the weight as it was rounded, in float64."""
    rounded = reference.round_rows(x, weight.data.dtype).double()
    return F.linear(rounded, weight.unpack().double(), None if bias is None else bias.double())


def assert_close(got: Tensor, want: Tensor) -> None:
    limits = tolerance("cpu", torch.float32)
    torch.testing.assert_close(got, want.float(), **limits, equal_nan=True)


def assert_identical(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_matches_reference(rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    x, bias = torch.randn(rows, depth), torch.randn(columns)
    residual, norm = torch.randn(rows, columns), (torch.rand(columns), torch.randn(columns), 0.01)
    weight = pack_linear(make_weight(depth, columns), dtype)
    want = expected(x, weight, bias)
    assert_close(packed_linear(x, weight, bias), want)
    want = F.layer_norm(
        F.gelu(want) + residual, (columns,), norm[0].double(), norm[1].double(), norm[2]
    )
    got = packed_linear(x, weight, bias, activation="gelu", residual=residual, output_norm=norm)
    assert_close(got, want)
    plain = reference.packed_linear(x, weight.unpack(), bias, dtype, "gelu", residual, None, norm)
    assert_close(plain, want)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_simd_level_matches_reference(dtype: torch.dtype) -> None:
    for rows, depth, columns in SHAPES:
        x, bias = torch.randn(rows, depth), torch.randn(columns)
        weight = pack_linear(make_weight(depth, columns), dtype)
        want = expected(x, weight, bias)
        assert_close(packed_linear(x, weight, bias), want)
        assert_close(packed_linear(x, weight, bias, activation="relu"), want.relu())
        assert_close(packed_linear(x, weight, bias, activation="gelu"), F.gelu(want))


# Small whole numbers are exact in every format; a range of 255 in each row of x, and 127 in each of
# the weight, make the scales of int8 equal to 1.
X = [[127.0, 2.0, -128.0], [-128.0, 0.0, 127.0]]
WEIGHT = [[127.0, 0.0, 1.0], [-1.0, 127.0, 0.0]]
PRODUCTS = [[127 * 127 - 128.0, -127 + 254.0], [-128 * 127 + 127.0, 128.0]]
BIAS = [-16001.0 - 50, 1.0]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("run", [packed_linear, "reference"])
def test_cases_worked_by_hand(run: Any, dtype: torch.dtype) -> None:
    def call(x: Any, bias: Any = None, **options: Any) -> Tensor:
        x, bias = torch.tensor(x), None if bias is None else torch.tensor(bias)
        weight = pack_linear(torch.tensor(WEIGHT), dtype)
        if run == "reference":
            options = {"activation": "none", "residual": None, "output_norm": None} | options
            return reference.packed_linear(
                x,
                weight.unpack(),
                bias,
                dtype,
                options["activation"],
                options["residual"],
                options.get("input_norm"),
                options["output_norm"],
            )
        return packed_linear(x, weight, bias, **options)

    assert_identical(call(X), torch.tensor(PRODUCTS))
    assert_identical(call(X, BIAS), torch.tensor([[-50.0, 128.0], [-32180.0, 129.0]]))
    relu = torch.tensor([[0.0, 128.0], [0.0, 129.0]])
    assert_identical(call(X, BIAS, activation="relu"), relu)
    residual = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    assert_identical(call(X, BIAS, activation="relu", residual=residual), relu + residual)
    # Rows of mean 1 and 0 and variance 1; then scale 3 and shift 10.
    norm = (torch.tensor([3.0, 3.0]), torch.tensor([10.0, 10.0]), 0.0)
    x = [[0.0, 2 / 127, 0.0], [-1 / 127, 1 / 127, 0.0]]
    got = call(x, output_norm=norm)
    assert_close(got[0], torch.tensor([7.0, 13.0]))
    # 4, 4, -2 have the mean 2 and the variance 8: with eps = 8 they become 1/2, 1/2, -1, which
    # the 256 steps of int8 hold exactly.
    got = call([[4.0, 4.0, -2.0]], input_norm=8.0)
    assert_close(got, torch.tensor([[62.5, 63.0]]))


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_whole_numbers_are_exact(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 8))
    depth = data.draw(st.integers(2, 9))
    columns = data.draw(st.sampled_from([1, 3, 63, 64, 66]))
    small = st.integers(-9, 9)
    x = [[127, -128, *(data.draw(small) for _ in range(depth - 2))] for _ in range(rows)]
    few = [data.draw(small) for _ in range(7)]
    weight = [[-127, 0, *(few[(c * d) % 7] for d in range(2, depth))] for c in range(columns)]
    want = [[sum(a * b for a, b in zip(r, w, strict=True)) for w in weight] for r in x]
    for dtype in FORMATS:
        packed = pack_linear(torch.tensor(weight).float(), dtype)
        got = packed_linear(torch.tensor(x).float(), packed)
        assert_identical(got, torch.tensor(want).float())


@pytest.mark.parametrize("dtype", FORMATS)
def test_packing_keeps_what_the_format_can_hold(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 19) * torch.logspace(-3, 3, 70)[:, None]
    weight[3] = 0
    packed = pack_linear(weight, dtype)
    assert packed.data.dtype == dtype
    got = packed.unpack()
    if dtype == torch.int8:
        assert packed.scales is not None
        step = packed.scales[:70, None]
        assert ((got - weight).abs() <= 0.5001 * step).all()
        greatest = weight.abs().amax(1, keepdim=True) / 127
        assert (step >= greatest).all() and (step <= 2 * greatest).all()
        assert_identical(got[3], torch.zeros(19))
    else:
        assert_identical(got, weight.to(dtype).float())


def test_int8_is_as_close_as_its_steps() -> None:
    x, weight = torch.randn(31, 256), make_weight(256, 96)
    got = packed_linear(x, pack_linear(weight, torch.int8))
    error = (got - x @ weight.T).abs()
    # Each factor is off by at most half a step of its row.
    packed = pack_linear(weight, torch.int8)
    assert packed.scales is not None
    half_x, half_weight = x.abs().amax(1) / 254, packed.scales[:96] / 2
    bound = x.abs().sum(1)[:, None] * half_weight + half_x[:, None] * weight.abs().sum(1)
    bound += 256 * half_x[:, None] * half_weight
    assert (error <= bound + 1e-5).all()
    assert error.square().mean().sqrt() < 0.02


@pytest.mark.usefixtures("simd_level")
def test_int8_rows_of_any_size() -> None:
    weight = pack_linear(make_weight(37, 70), torch.int8)
    x = torch.randn(9, 37)
    sizes = torch.tensor([1.0, 1e30, 1e-30, 1e-34, 1e-36, 1e-42, 0.0, 1.0, 1.0])[:, None]
    x *= sizes
    x[7, 3] = math.nan
    x[8, 36] = -math.inf
    got = packed_linear(x, weight)
    assert got[7:].isnan().all()
    # Rows below 1e-35 count as zero.
    assert_identical(got[4:7], torch.zeros(3, 70))
    size = sizes[:4].double()
    assert_close((got[:4] / size).float(), expected(x[:4], weight) / size)
    assert_identical(packed_linear(x[:1], weight), got[:1])


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype) -> None:
    weight = pack_linear(make_weight(20, 70), dtype)
    x = torch.randn(8, 20)
    for activation in ("none", "relu", "gelu"):
        want = packed_linear(x, weight, activation=activation)
        broken = x.clone()
        broken[2, 19] = math.nan
        got = packed_linear(broken, weight, activation=activation)
        assert got[2].isnan().all()
        others = torch.arange(8) != 2
        assert_identical(got[others], want[others])


@pytest.mark.usefixtures("simd_level")
def test_gelu_is_good_to_a_millionth() -> None:
    z = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([-1e30, 1e30])])[:, None]
    got = packed_linear(z, pack_linear(torch.ones(1, 1)), activation="gelu").double()
    want = z.double() * torch.special.ndtr(z.double())
    error = (got - want).abs()
    assert error[z.abs() < 12].max() < 5e-7
    assert (error <= 1e-6 * want.abs() + 1e-6).all()
    ends = torch.tensor([[math.inf], [-math.inf], [math.nan]])
    got = packed_linear(ends, pack_linear(torch.ones(1, 1)), activation="gelu")
    assert_close(got, torch.tensor([[math.inf], [0.0], [math.nan]]))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("depth", [1, 31, 33, 100])
def test_norms_are_layer_normalisation(depth: int, dtype: torch.dtype) -> None:
    x = torch.randn(7, depth) * 3 + 5
    weight = pack_linear(make_weight(depth, depth), dtype)
    bias = torch.randn(depth)
    scale, shift = torch.rand(depth), torch.randn(depth)
    h = F.layer_norm(x.double(), (depth,), eps=1e-3)
    want = F.linear(h, weight.unpack().double(), bias.double())
    got = packed_linear(x, weight, bias, input_norm=1e-3)
    # In another order of summation an element can come to lie on the other side of a rounding step.
    step = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 5e-2}[dtype]
    torch.testing.assert_close(got, want.float(), rtol=step, atol=step)
    want = F.layer_norm(expected(x, weight, bias), (depth,), scale.double(), shift.double(), 1e-3)
    assert_close(packed_linear(x, weight, bias, output_norm=(scale, shift, 1e-3)), want)


def test_normalisation_of_equal_numbers_is_zero() -> None:
    x = torch.full((2, 40), 1000.25)
    weight = pack_linear(make_weight(40, 3))
    assert_identical(packed_linear(x, weight, input_norm=1e-5), torch.zeros(2, 3))


@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", FORMATS)
def test_empty(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = pack_linear(torch.randn(columns, 7), dtype)
    ones = torch.ones(columns)
    norm = (ones, ones, 1e-5) if columns > 0 else None
    got = packed_linear(torch.randn(rows, 7), weight, ones, output_norm=norm)
    assert got.shape == (rows, columns)


@pytest.mark.parametrize("dtype", FORMATS)
def test_views_equal_copies(dtype: torch.dtype) -> None:
    weight = pack_linear(make_weight(19, 70), dtype)
    x, residual = torch.randn(14, 40), torch.randn(14, 140)
    bias, scale, shift = torch.randn(140)[::2], torch.rand(140)[::2], torch.randn(140)[1::2]
    for x_view, residual_view in (
        (x[::2, 3:22], residual[1::2, :70]),
        (x[::2, 1:39:2], residual[1::2, ::2]),
        (x[:1, :19].expand(7, 19), residual[:1, :70].expand(7, 70)),
        (x.T[1:8, :].expand(2, 7, 14).reshape(7, 28)[:, :19], residual[7:, 70:]),
    ):
        views: list[Tensor] = [x_view, bias, residual_view, scale, shift]
        copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
        got, want = (
            packed_linear(a, weight, b, residual=r, output_norm=(s, t, 1e-5))
            for a, b, r, s, t in (views, copies)
        )
        if _backend.extension() is None:  # PyTorch's products round views otherwise
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert_identical(got, want)


def test_arguments_are_left_alone() -> None:
    weight = pack_linear(make_weight(19, 70), torch.int8)
    arguments = (torch.randn(3, 19), weight.data, torch.randn(70), torch.randn(3, 70))
    copies = tuple(argument.clone() for argument in arguments)
    norm = (torch.ones(70), torch.zeros(70), 1e-5)
    packed_linear(
        arguments[0],
        weight,
        arguments[2],
        residual=arguments[3],
        input_norm=1e-5,
        output_norm=norm,
    )
    torch.testing.assert_close(arguments, copies, rtol=0, atol=0)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_do_not_depend_on_batch_mates(dtype: torch.dtype) -> None:
    rows, depth, columns = 200, 37, 130
    x, residual = torch.randn(rows, depth), torch.randn(rows, columns)
    weight = pack_linear(make_weight(depth, columns), dtype)
    bias = torch.randn(columns)
    options: dict[str, Any] = {
        "activation": "gelu",
        "input_norm": 1e-5,
        "output_norm": (torch.rand(columns), torch.randn(columns), 1e-5),
    }
    together = packed_linear(x, weight, bias, residual=residual, **options)
    for row in range(rows):
        alone = packed_linear(
            x[row : row + 1].clone(), weight, bias, residual=residual[row : row + 1], **options
        )
        assert torch.equal(alone, together[row : row + 1])
    for count in (*range(2, 14), 95, 96, 97, 100, 199):
        some = packed_linear(x[-count:], weight, bias, residual=residual[-count:], **options)
        assert torch.equal(some, together[-count:])


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 512, 2048), (200, 64, 70), GROUPS])
def test_threads_make_no_difference(
    rows: int, depth: int, columns: int, dtype: torch.dtype
) -> None:
    weight = pack_linear(make_weight(depth, columns), dtype)
    x = torch.randn(rows, depth)
    norm = (torch.rand(columns), torch.randn(columns), 1e-5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(packed_linear(x, weight, input_norm=1e-5, output_norm=norm))
    finally:
        torch.set_num_threads(threads)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def raw_arguments(dtype: torch.dtype = torch.int8) -> tuple[Any, ...]:
    weight = pack_linear(make_weight(19, 70), dtype)
    return (
        torch.randn(3, 19),
        weight.data,
        weight.scales,
        weight.column_sums,
        torch.randn(70),
        torch.randn(3, 70),
        torch.ones(70),
        torch.zeros(70),
        70,
        1,
        1e-5,
        1e-5,
    )


@pytest.mark.parametrize("dtype", FORMATS)
def test_registered_rightly(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.pynar.packed_linear.default, raw_arguments(dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_compiles_into_one_graph(dtype: torch.dtype) -> None:
    weight = pack_linear(make_weight(19, 70), dtype)
    x, bias, residual = torch.randn(3, 19), torch.randn(70), torch.randn(3, 70)
    norm = (torch.ones(70), torch.zeros(70), 1e-5)

    def layer(x: Tensor) -> Tensor:
        h = packed_linear(2 * x, weight, bias, activation="gelu", input_norm=1e-5)
        return packed_linear(x, weight, bias, residual=h, output_norm=norm) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(x), layer(x))
    assert residual.shape == compiled(x).shape


def test_is_not_differentiable() -> None:
    weight = pack_linear(make_weight(19, 70).requires_grad_())
    x, bias = torch.randn(3, 19, requires_grad=True), torch.randn(70, requires_grad=True)
    y = packed_linear(x, weight, bias, output_norm=(bias, bias, 1e-5), residual=x[:, :1] + bias)
    assert not y.requires_grad


@pytest.fixture(params=["chosen", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What rejects a call: the implementation in use, or the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    return request.param


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(19)}, "`x` must have 2 dimensions [N, K], got shape [19]"),
    ({"x": torch.tensor(1.0)}, "`x` must have 2 dimensions [N, K], got shape []"),
    ({"x": torch.ones(3, 19).double()}, "`x` must have dtype float32, got float64"),
    ({"x": torch.ones(3, 20)}, "`x` must have 19 columns (depth of `weight`), got 20"),
    (
        {"weight": torch.ones(70, 19)},
        "`weight` must be a PackedWeight from pack_linear, got Tensor",
    ),
    ({"bias": torch.ones(128)}, "`bias` must have shape [70] (columns of `weight`), got [128]"),
    ({"bias": torch.ones(70).double()}, "`bias` must have dtype float32, got float64"),
    (
        {"residual": torch.ones(3, 71)},
        "`residual` must have shape [3, 70] (rows of `x`, columns of `weight`), got [3, 71]",
    ),
    ({"residual": torch.ones(3, 70).half()}, "`residual` must have dtype float32, got float16"),
    ({"activation": "silu"}, "`activation` must be one of none, relu, gelu, got silu"),
    ({"input_norm": -1.0}, "`input_norm` must be at least 0, got -1.0"),
    (
        {"output_norm": (torch.ones(69), torch.ones(70), 0.0)},
        "`norm_weight` must have shape [70] (columns of `weight`), got [69]",
    ),
    (
        {"output_norm": (torch.ones(70), None, 0.0)},
        "`norm_bias` must be given with `norm_weight`, and only then, got None",
    ),
    (
        {"output_norm": (torch.ones(70), torch.ones(70), math.nan)},
        "`output_norm` must have an epsilon of at least 0, got nan",
    ),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("change", "message"), REJECTED, ids=lambda x: "".join(x) if x else "")
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(3, 19), "weight": pack_linear(torch.ones(70, 19))}
    with pytest.raises(ValueError) as error:
        function(**(arguments | change))
    assert str(error.value) == f"packed_linear: {message}"


STRIP = strip_columns()
STRIPS = 128 // STRIP  # of 70 columns

REJECTED_BY_THE_OPERATOR = [
    (
        1,
        torch.ones(3, 19),
        "`weight` must have 4 dimensions [strips, steps, columns of a strip, depth per word]",
    ),
    (1, torch.ones(2, 5, 64, 4).long(), "`weight` must have dtype float32 or bfloat16 or int8, "),
    (
        1,
        torch.ones(STRIPS, 4, STRIP, 4, dtype=torch.int8),
        f"`weight` must have shape [{STRIPS}, 5, {STRIP}, 4] (strips for all columns, steps for "
        "the depth of `x`), ",
    ),
    (
        1,
        torch.ones(STRIPS + 1, 5, STRIP, 4, dtype=torch.int8),
        f"`weight` must have shape [{STRIPS}, 5, {STRIP}, 4] (strips for all columns, ",
    ),
    (1, torch.ones(4, 5, 32, 4, dtype=torch.int8), "`weight` must be packed for "),
    (2, None, "`scales` must be given for an int8 weight, got None"),
    (2, torch.ones(70), "`scales` must have shape [128] (columns, padded to panels), got [70]"),
    (3, torch.ones(128), "`column_sums` must have dtype int32, got float32"),
    (6, None, "`norm_bias` must be given with `norm_weight`, and only then, got it alone"),
    (9, 3, "`activation` must be in [0, 2], got 3"),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("place", "value", "message"), REJECTED_BY_THE_OPERATOR)
def test_a_wrong_call_of_the_operator_says_so(place: int, value: Any, message: str) -> None:
    arguments = list(raw_arguments())
    arguments[place] = value
    with pytest.raises(ValueError) as error:
        _OPERATOR.call(*arguments)
    assert str(error.value).startswith(f"packed_linear: {message}")


@pytest.mark.usefixtures("implementation")
def test_a_depth_that_int8_cannot_sum_up_is_rejected() -> None:
    depth = (1 << 16) + 1
    with pytest.raises(ValueError, match="pack_linear: `weight` must have at most 65536 columns"):
        pack_linear(torch.ones(1, depth), torch.int8)
    strip = strip_columns()
    data = torch.ones(64 // strip, depth // 4 + 1, strip, 4, dtype=torch.int8)
    scales, sums = torch.ones(64), torch.ones(64, dtype=torch.int32)
    with pytest.raises(ValueError, match="`x` must have at most 65536 columns with an int8"):
        _OPERATOR.call(
            torch.ones(1, depth), data, scales, sums, None, None, None, None, 1, 0, -1.0, 0.0
        )


@pytest.mark.usefixtures("simd_level")
def test_the_greatest_sums_of_int8_fit() -> None:
    depth = 1 << 16
    x = torch.full((1, depth), 255.0)
    for sign in (1, -1):
        rows = torch.zeros(2, depth)
        rows[0, ::2] = 127.0 * sign
        rows[1] = 63.5 * sign
        weight = pack_linear(rows, torch.int8)
        whole = (weight.unpack() / (weight.scales[:2, None])).round().long()  # type: ignore[index]
        want = 255 * whole.sum(1) * weight.scales[:2].double()  # type: ignore[index]
        assert_identical(packed_linear(x, weight)[0], want.float())


def bounded_pairs(columns: int, depth: int) -> Tensor:
    """Whole numbers in [-127, 127] whose neighbours add up to at most 128, and often to that."""
    first = torch.randint(-127, 128, (columns, depth // 2))
    sign = torch.where(first < 0, -1, 1)
    extreme = sign * (128 - first.abs())
    second = torch.randint(-127, 128, first.shape)
    legal = (first + second).abs() <= 128
    second = torch.where(legal & (torch.rand(first.shape) < 0.3), second, extreme)
    return torch.stack([first, second.clamp(-127, 127)], 2).flatten(1)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 8, 64), (2, 36, 128), (9, 2052, 64)])
def test_int8_sums_are_exact_at_the_bound_of_pairs(rows: int, depth: int, columns: int) -> None:
    whole = bounded_pairs(columns, depth)
    assert whole.unflatten(1, (-1, 2)).sum(2).abs().max() == 128
    strips = whole.view(-1, strip_columns(), depth // 4, 4)
    data = strips.transpose(1, 2).to(torch.int8).contiguous()
    sums = whole.sum(1, dtype=torch.int32)
    weight = PackedWeight(data, torch.ones(columns), sums, columns, depth)
    # Rows of 255 everywhere, and of 0 to 255: both are their own rounded values. One has a zero
    # in the middle of its range.
    x = torch.randint(0, 256, (rows, depth))
    x[:, 0] = 255
    x[0] = 255
    if rows > 2:
        x[1] -= 128
        x[1, 1] = -128
    want = x.double() @ whole.double().T
    assert_identical(packed_linear(x.float(), weight), want.float())


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 7, 128])
def test_weights_are_rounded_within_their_bounds(depth: int, pairs: bool) -> None:
    weight = torch.randn(300, depth) * torch.logspace(-6, 6, 300)[:, None]
    weight[7] = 0
    whole, scales = reference.round_weight(weight, pairs=pairs)
    assert ((whole * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert_identical(whole, whole.round())
    assert whole.abs().max() == 127
    neighbours = F.pad(whole, (0, depth % 2)).unflatten(1, (-1, 2)).sum(2).abs().amax(1)
    if pairs:
        assert neighbours.max() <= 128
        # No larger steps than the bound demands.
        tight = torch.maximum(whole.abs().amax(1), neighbours) >= 126
        assert tight.sum() == 299
    else:
        assert (whole.abs().amax(1) == 127).sum() == 299


def test_what_avx2_multiplies_with_is_bounded(simd_level: str) -> None:
    weight = torch.rand(70, 64)
    packed = pack_linear(weight, torch.int8)
    _, scales = reference.round_weight(weight, pairs=simd_level == "avx2")
    assert packed.scales is not None
    assert_identical(packed.scales[:70], scales)


@pytest.mark.parametrize(
    ("weight", "dtype", "message"),
    [
        (torch.ones(3), torch.int8, "`weight` must have 2 dimensions [out_features, in_features]"),
        (torch.ones(3, 0), torch.int8, "`weight` must have at least one column, got 0"),
        (torch.ones(3, 3), torch.half, "`dtype` must be torch.float32, torch.bfloat16 or torch.in"),
        (torch.ones(3, 3, device="meta"), torch.int8, "`weight` must be on cpu, where packed wei"),
    ],
)
def test_what_cannot_be_packed_is_rejected(
    weight: Tensor, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        pack_linear(weight, dtype)
    assert str(error.value).startswith(f"pack_linear: {message}")


@pytest.mark.cuda
def test_other_devices_are_rejected() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(ValueError, match="`x` must be on cpu, where packed weights are used"):
        packed_linear(torch.ones(3, 19, device="cuda"), pack_linear(torch.ones(70, 19)))


def test_extension_takes_numpy_arrays(extension: Any) -> None:
    arguments = raw_arguments()
    out_features, *numbers = arguments[8:]
    arrays = [argument.numpy() for argument in arguments[:8]]
    y = np.empty((3, out_features), dtype=np.float32)
    extension.packed_linear(*arrays, *numbers, y)
    assert_identical(torch.from_numpy(y), _OPERATOR.call(*arguments))
    y.setflags(write=False)
    with pytest.raises(ValueError, match="packed_linear: `y` must be writable"):
        extension.packed_linear(*arrays, *numbers, y)
