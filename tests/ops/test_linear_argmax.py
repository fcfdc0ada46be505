from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pynar import _backend, reference
from pynar.ops import PackedWeight, linear_argmax, pack_linear
from pynar.ops.linear_argmax import _OPERATOR
from pynar.symbols import UNK
from pynar.testing import tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = ["packed float32", "packed bfloat16", "packed int8"]
FORMATS = [*map(str, DTYPES), *PACKED]
# (N, C, V, k): words and vectors that C does not fill, panels and segments that V does not fill,
# more candidates than a panel has symbols.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 65, 3),
    (3, 18, 64, 1),
    (7, 33, 130, 70),
    (13, 64, 1025, 5),
    (98, 37, 200, 2),
    (2, 7, 2100, 1),
]


def make(
    rows: int, channels: int, vocabulary: int, form: str, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | PackedWeight, Tensor]:
    """Makes `x`, `weight` and `bias`."""
    dtype = getattr(torch, form.split()[-1].removeprefix("torch."))
    x = torch.randn(rows, channels)
    weight = torch.randn(vocabulary, channels).mul(3 / math.sqrt(channels))
    bias = torch.randn(vocabulary).to(device)
    if form in PACKED:
        return x, pack_linear(weight, dtype), bias
    return x.to(dtype).to(device), weight.to(dtype).to(device), bias


def form_or_skip(form: str, device: torch.device) -> None:
    if form in PACKED and device.type != "cpu":
        pytest.skip("packed weights are for CPUs")


def logits_of(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    """The logits of rounded rows with the weight as it was rounded, in float64."""
    if isinstance(weight, PackedWeight):
        x, weight = reference.round_rows(x, weight.data.dtype), weight.unpack()
    z = x.double() @ weight.double().T
    return z if bias is None else z + bias.double()


def assert_agrees(got: tuple[Tensor, ...], z: Tensor, k: int) -> None:
    """Asserts that tokens, log-probabilities and log-sum-exp are those of logits in float64."""
    tokens, log_probs, lse = got
    limits = tolerance(z.device, torch.float32)
    torch.testing.assert_close(lse, z.logsumexp(-1).float(), **limits)
    best = z.topk(k).values
    torch.testing.assert_close(log_probs, (best - z.logsumexp(-1, keepdim=True)).float(), **limits)
    # Two logits can be closer to each other than to what float32 makes of them.
    torch.testing.assert_close(z.gather(1, tokens).float(), best.float(), **limits)
    assert all(len(set(row)) == k for row in tokens.tolist())


def assert_identical(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "channels", "vocabulary", "k"), SHAPES)
def test_matches_reference(
    rows: int, channels: int, vocabulary: int, k: int, form: str, device: torch.device
) -> None:
    form_or_skip(form, device)
    x, weight, bias = make(rows, channels, vocabulary, form, device)
    for b in (bias, None):
        z = logits_of(x, weight, b)
        assert_agrees(linear_argmax(x, weight, b, k=k, return_lse=True), z, k)
    if not isinstance(weight, PackedWeight):
        want = reference.linear_argmax(x.double(), weight.double(), bias.double(), k)
        assert_agrees((want[0], want[1].float(), want[2].float()), logits_of(x, weight, bias), k)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("form", FORMATS)
def test_every_simd_level_matches_reference(form: str) -> None:
    for rows, channels, vocabulary, k in SHAPES:
        x, weight, bias = make(rows, channels, vocabulary, form)
        got = linear_argmax(x, weight, bias, k=k, return_lse=True)
        assert_agrees(got, logits_of(x, weight, bias), k)


def test_float64_is_the_reference(device: torch.device) -> None:
    x, weight, bias = (t.double() for t in make(7, 33, 130, "torch.float32", device))
    got = linear_argmax(x, weight, bias, k=5, return_lse=True)
    assert got[1].dtype == got[2].dtype == torch.float64
    assert_identical(got, reference.linear_argmax(x, weight, bias, 5))


def test_without_k_there_is_no_dimension_for_it(device: torch.device) -> None:
    x, weight, bias = make(7, 33, 130, "torch.float32", device)
    tokens, log_probs = linear_argmax(x, weight, bias)
    assert tokens.shape == log_probs.shape == (7,)
    tokens_k, log_probs_k = linear_argmax(x, weight, bias, k=1)
    assert_identical((tokens, log_probs), (tokens_k[:, 0], log_probs_k[:, 0]))


# One channel, so that the logits of x = 1 are the weights plus the bias; log 1, log 2, ... make
# ratios of small numbers of the probabilities.
L2, L3, L4 = math.log(2), math.log(3), math.log(4)
INF, NAN = math.inf, math.nan
CASES: dict[str, dict[str, Any]] = {
    "the greatest": {
        "weight": [0, L2, L4, 0],
        "want": ([2], [math.log(4 / 8)], math.log(8)),
    },
    "in descending order": {
        "weight": [0, L2, L4, 0, L3],
        "k": 3,
        "want": ([2, 4, 1], [math.log(n / 11) for n in (4, 3, 2)], math.log(11)),
    },
    "the lower of equals": {
        "weight": [0, L2, 0, L2, L2],
        "k": 4,
        "want": ([1, 3, 4, 0], [math.log(n / 8) for n in (2, 2, 2, 1)], math.log(8)),
    },
    "the bias counts": {
        "weight": [0, 0, 0],
        "bias": [0, 0, L2],
        "want": ([2], [math.log(2 / 4)], math.log(4)),
    },
    "a symbol with bias -inf is never chosen": {
        "weight": [L4, 0, L2],
        "bias": [-INF, 0, 0],
        "want": ([2], [math.log(2 / 3)], math.log(3)),
    },
    "where fewer than k are left, the rest is <unk>": {
        "weight": [L4, 0, L2],
        "bias": [-INF, 0, 0],
        "k": 3,
        "want": ([2, 1, UNK], [math.log(2 / 3), math.log(1 / 3), -INF], math.log(3)),
    },
    "nothing left": {
        "weight": [1, 2],
        "bias": [-INF, -INF],
        "k": 2,
        "want": ([UNK, UNK], [NAN, NAN], NAN),
    },
    "a NaN": {"weight": [0, NAN, 0], "k": 2, "want": ([UNK, UNK], [NAN, NAN], NAN)},
    "a NaN among -inf": {"weight": [-INF, NAN], "want": ([UNK], [NAN], NAN)},
    "+inf": {"weight": [0, INF, 0], "k": 2, "want": ([UNK, UNK], [NAN, NAN], NAN)},
    "-inf and a number": {"weight": [-INF, -5], "want": ([1], [0.0], -5.0)},
    "one symbol": {"weight": [-3], "want": ([0], [0.0], -3.0)},
    "zero and minus zero are equal": {
        "weight": [-0.0, 0.0, -1.0],
        "want": ([0], [-math.log(2 + math.exp(-1))], math.log(2 + math.exp(-1))),
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", [linear_argmax, "reference"])
def test_cases_worked_by_hand(name: str, packed: bool, function: Any, device: torch.device) -> None:
    case = CASES[name]
    x = torch.ones(1, 1, device=device)
    weight: Any = torch.tensor(case["weight"], device=device, dtype=torch.float32)[:, None]
    bias = case.get("bias")
    bias = None if bias is None else torch.tensor(bias, device=device, dtype=torch.float32)
    k = case.get("k", 1)
    if function == "reference":
        if packed:
            pytest.skip("the reference takes a weight as it is")
        got = reference.linear_argmax(x, weight, bias, k)
    else:
        if packed:
            form_or_skip(PACKED[0], device)
            weight = pack_linear(weight)
        got = function(x, weight, bias, k=k, return_lse=True)
    tokens, log_probs, lse = case["want"]
    assert got[0].tolist() == [tokens]
    want = torch.tensor([log_probs], device=device), torch.tensor([lse], device=device)
    torch.testing.assert_close(got[1:], want, **tolerance(device, torch.float32), equal_nan=True)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_matches_brute_force(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 7))
    channels = data.draw(st.integers(1, 5))
    vocabulary = data.draw(st.sampled_from([1, 2, 7, 64, 66, 130]))
    k = data.draw(st.integers(1, min(vocabulary, 9)))
    # Whole numbers in a narrow range are exact in every format and make equal logits common; the
    # 127 makes the scales of int8 equal to 1.
    number = st.integers(-2, 2)
    few = data.draw(st.lists(number, min_size=11, max_size=11))
    x = [[127, *(data.draw(number) for _ in range(channels - 1))] for _ in range(rows)]
    weight = [[few[(v * 7 + c * c) % 11] for c in range(channels)] for v in range(vocabulary)]
    banned = data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=vocabulary - 1))
    shift = [-INF if v in banned else few[v % 5] for v in range(vocabulary)]
    bias = torch.tensor(shift, dtype=torch.float32)
    z = [
        [
            sum(map(math.prod, zip(h, w, strict=True))) + b
            for w, b in zip(weight, shift, strict=True)
        ]
        for h in x
    ]
    order = [sorted(range(vocabulary), key=lambda v: (-row[v], v))[:k] for row in z]
    want = [[v if row[v] > -INF else UNK for v in best] for row, best in zip(z, order, strict=True)]
    lse = [max(row) + math.log(sum(math.exp(a - max(row)) for a in row)) for row in z]
    scores = [[row[v] - s for v in best] for row, best, s in zip(z, order, lse, strict=True)]
    limits = tolerance("cpu", torch.float32)
    floats = torch.tensor(x).float(), torch.tensor(weight).float()
    forms: list[tuple[Tensor, Any]] = [tuple(t.to(dtype) for t in floats) for dtype in DTYPES]
    forms += [
        (floats[0], pack_linear(floats[1], dtype)) for dtype in (torch.float32, torch.bfloat16)
    ]
    for h, w in forms:
        got = linear_argmax(h, w, bias, k=k, return_lse=True)
        assert got[0].tolist() == want
        torch.testing.assert_close(got[1], torch.tensor(scores).float(), **limits)
        torch.testing.assert_close(got[2], torch.tensor(lse).float(), **limits)


@pytest.mark.parametrize("form", FORMATS)
def test_equal_logits_come_in_the_order_of_symbols(form: str, device: torch.device) -> None:
    form_or_skip(form, device)
    x, weight, _ = make(3, 4, 2500, form, device)
    bias = torch.zeros(2500, device=device)
    tokens, log_probs = linear_argmax(torch.zeros_like(x), weight, bias, k=70)
    assert_identical(tokens, torch.arange(70, device=device).expand(3, 70))
    want = torch.full_like(log_probs, -math.log(2500))
    torch.testing.assert_close(log_probs, want, **tolerance(device, torch.float32))
    # Equals at the ends of panels and segments, and a greater one behind them.
    places = [63, 64, 1023, 1024, 2047, 2048, 2499]
    bias[places] = 1.0
    bias[1500] = 2.0
    tokens, _ = linear_argmax(torch.zeros_like(x), weight, bias, k=9)
    assert tokens[1].tolist() == [1500, *places, 0]


def test_as_many_as_there_are(device: torch.device) -> None:
    x, weight, bias = make(3, 5, 2100, "torch.float32", device)
    tokens, log_probs = linear_argmax(x, weight, bias, k=2100)
    want = reference.linear_argmax(x, weight, bias, 2100)
    torch.testing.assert_close(log_probs, want[1], **tolerance(device, torch.float32))
    assert_identical(tokens.sort().values, torch.arange(2100, device=device).expand(3, 2100))


def test_banned_symbols_in_whole_panels_and_segments(device: torch.device) -> None:
    x, weight, bias = make(3, 5, 4000, "torch.float32", device)
    left = torch.tensor([70, 1500, 1501, 3999], device=device)
    banned = torch.full_like(bias, -INF)
    banned[left] = bias[left]
    tokens, log_probs, lse = linear_argmax(x, weight, banned, k=6, return_lse=True)
    want = reference.linear_argmax(x, weight[left], bias[left], 4)
    limits = tolerance(device, torch.float32)
    assert_identical(tokens[:, :4], left[want[0]])
    assert_identical(tokens[:, 4:], torch.full_like(tokens[:, 4:], UNK))
    torch.testing.assert_close(log_probs[:, :4], want[1], **limits)
    assert (log_probs[:, 4:] == -INF).all()
    torch.testing.assert_close(lse, want[2], **limits)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("place", [0, 63, 64, 1100, 2099])
def test_a_row_that_is_no_distribution(form: str, place: int, device: torch.device) -> None:
    form_or_skip(form, device)
    x, weight, bias = make(9, 20, 2100, form, device)
    want = linear_argmax(x, weight, bias, k=2, return_lse=True)
    for value in (NAN, INF):
        broken = x.clone()
        broken[3, 7] = value
        got = linear_argmax(broken, weight, bias, k=2, return_lse=True)
        assert got[0][3].tolist() == [UNK, UNK]
        assert got[1][3].isnan().all() and got[2][3].isnan()
        others = torch.arange(9, device=device) != 3
        assert_identical([t[others] for t in got], [t[others] for t in want])
        shift = bias.clone()
        shift[place] = value
        got = linear_argmax(x, weight, shift, k=2, return_lse=True)
        assert (got[0] == UNK).all() and got[1].isnan().all() and got[2].isnan().all()
        shift[:] = -INF
        shift[place] = value
        got = linear_argmax(x, weight, shift, k=2, return_lse=True)
        assert (got[0] == UNK).all() and got[1].isnan().all() and got[2].isnan().all()


@pytest.mark.parametrize("shift", [-1e9, -3e3, -1e2, 1e2, 3e3, 1e9])
def test_log_probabilities_do_not_depend_on_the_size_of_logits(
    shift: float, device: torch.device
) -> None:
    x, weight, _ = make(3, 5, 1500, "torch.float32", device)
    bias = torch.full((1500,), shift, device=device)
    z = (x @ weight.T + bias).double()
    tokens, log_probs = linear_argmax(x, weight, bias)
    lse = z.logsumexp(-1)
    # z itself carries the rounding of its size.
    close = 1e-5 + abs(shift) * 2**-22
    torch.testing.assert_close(log_probs.double(), z.amax(-1) - lse, rtol=1e-5, atol=close)
    torch.testing.assert_close(z[range(3), tokens], z.amax(-1), rtol=0, atol=close)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("k", [None, 3])
def test_empty(form: str, k: int | None, device: torch.device) -> None:
    form_or_skip(form, device)
    x, weight, bias = make(0, 7, 65, form, device)
    shapes = [t.shape for t in linear_argmax(x, weight, bias, k=k, return_lse=True)]
    assert shapes == [(0,) if k is None else (0, k)] * 2 + [(0,)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_channels_the_bias_remains(dtype: torch.dtype, device: torch.device) -> None:
    bias = torch.randn(100, device=device)
    x, weight = (torch.ones(n, 0, dtype=dtype, device=device) for n in (3, 100))
    tokens, _, lse = linear_argmax(x, weight, bias, return_lse=True)
    assert_identical(tokens, bias.argmax().expand(3))
    torch.testing.assert_close(lse, bias.logsumexp(0).expand(3), **tolerance(device, torch.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_views_equal_copies(form: str, device: torch.device) -> None:
    form_or_skip(form, device)
    x, weight, bias = make(14, 40, 130, form, device)
    bias = bias.repeat_interleave(2)[::2]
    views = [x[::2], x[::2, :20], x[1::2, ::2], x.T[:14, :].T[:, ::2], x[:1].expand(7, 40)]
    for view in views:
        if isinstance(weight, PackedWeight):
            if view.shape[1] != 40:
                continue
            weights: list[Any] = [weight]
        else:
            wide = weight.repeat(1, 3)
            weights = [wide[:, 5 : 5 + view.shape[1]], wide[:, : 2 * view.shape[1] : 2]]
        for w in weights:
            copy = w if isinstance(w, PackedWeight) else w.contiguous().clone()
            got = linear_argmax(view, w, bias, k=3, return_lse=True)
            want = linear_argmax(
                view.contiguous().clone(), copy, bias.contiguous(), k=3, return_lse=True
            )
            if _backend.extension() is None:  # PyTorch's products round views otherwise
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert_identical(got, want)


def test_arguments_are_left_alone(device: torch.device) -> None:
    arguments = make(3, 7, 65, "torch.bfloat16", device)
    copies = tuple(argument.clone() for argument in arguments)  # type: ignore[union-attr]
    linear_argmax(*arguments, k=3)
    assert_identical(arguments, copies)


def assert_rows_are_independent(arguments: Any, counts: list[int], step: int = 1) -> None:
    x, weight, bias = arguments
    together = linear_argmax(x, weight, bias, k=3, return_lse=True)
    for row in range(0, x.shape[0], step):
        alone = linear_argmax(x[row : row + 1].clone(), weight, bias, k=3, return_lse=True)
        assert all(torch.equal(a, t[row : row + 1]) for a, t in zip(alone, together, strict=True))
    for count in counts:
        some = linear_argmax(x[-count:], weight, bias, k=3, return_lse=True)
        assert all(torch.equal(a, t[-count:]) for a, t in zip(some, together, strict=True))


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("form", FORMATS)
def test_rows_do_not_depend_on_batch_mates(form: str) -> None:
    counts = [*range(2, 14), 95, 96, 97, 100, 199]
    assert_rows_are_independent(make(200, 37, 130, form), counts)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("form", FORMATS)
def test_rows_do_not_depend_on_batch_mates_in_many_segments(
    form: str, device: torch.device
) -> None:
    form_or_skip(form, device)
    assert_rows_are_independent(make(40, 64, 2100, form, device), [2, 5, 31, 32, 33], step=13)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "channels", "vocabulary"), [(1, 256, 4100), (200, 64, 65)])
def test_threads_make_no_difference(rows: int, channels: int, vocabulary: int, form: str) -> None:
    arguments = make(rows, channels, vocabulary, form)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear_argmax(*arguments, k=3, return_lse=True))
    finally:
        torch.set_num_threads(threads)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def raw_arguments(form: str, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    x, weight, bias = make(3, 19, 70, form, device)
    if isinstance(weight, PackedWeight):
        return (x, weight.data, weight.scales, weight.column_sums, bias, 70, 2)
    return (x, weight, None, None, bias, 70, 2)


@pytest.mark.parametrize("form", FORMATS)
def test_registered_rightly(form: str, device: torch.device) -> None:
    form_or_skip(form, device)
    arguments = raw_arguments(form, device)
    torch.library.opcheck(torch.ops.pynar.linear_argmax.default, arguments)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("k", [None, 3])
def test_compiles_into_one_graph(form: str, k: int | None, device: torch.device) -> None:
    form_or_skip(form, device)
    x, weight, bias = make(3, 19, 70, form, device)

    def decode(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, log_probs = linear_argmax(2 * x, weight, bias, k=k)
        return tokens + 1, log_probs

    torch.compiler.reset()  # forgets the other parameters' graphs, of which it keeps few
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(x), decode(x))


def test_exports() -> None:
    class Decode(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
            return linear_argmax(*arguments, k=2)

    arguments = make(3, 19, 70, "torch.bfloat16")
    program = torch.export.export(Decode(), arguments)
    assert_identical(program.module()(*arguments), linear_argmax(*arguments, k=2))


def test_is_not_differentiable(device: torch.device) -> None:
    x, weight, bias = make(3, 19, 70, "torch.float32", device)
    for argument in (x, weight, bias):
        argument.requires_grad_()  # type: ignore[union-attr]
    assert not any(t.requires_grad for t in linear_argmax(x, weight, bias, return_lse=True))
    assert not linear_argmax(x, torch.nn.Parameter(weight), bias)[1].requires_grad


@pytest.fixture(params=["chosen", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What rejects a call: the implementation in use, or the reference in its place."""
    if request.param == "reference":
        monkeypatch.setattr(_OPERATOR, "call", _OPERATOR.reference)
    return request.param


PACKED_WEIGHT = pack_linear(torch.ones(70, 19), torch.int8)
STRIP = PACKED_WEIGHT.data.shape[2]
REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(19)}, "`x` must have 2 dimensions [N, C], got shape [19]"),
    (
        {"x": torch.ones(3, 19).long()},
        "`x` must have dtype float32 or bfloat16 or float16 or float64, got int64",
    ),
    ({"weight": torch.ones(19)}, "`weight` must have 2 dimensions [V, C], got shape [19]"),
    ({"weight": torch.tensor(1.0)}, "`weight` must have 2 dimensions [V, C], got shape []"),
    (
        {"weight": torch.ones(70, 18)},
        "`weight` must have shape [70, 19] (symbols, channels of `x`), got [70, 18]",
    ),
    ({"weight": torch.ones(70, 19).half()}, "`weight` must have dtype float32, got float16"),
    ({"bias": torch.ones(69)}, "`bias` must have shape [70] (symbols of `weight`), got [69]"),
    ({"bias": torch.ones(70).half()}, "`bias` must have dtype float32, got float16"),
    ({"k": 0}, "`k` must be in [1, 70], got 0"),
    ({"k": -1}, "`k` must be in [1, 70], got -1"),
    ({"k": 71}, "`k` must be in [1, 70], got 71"),
    (
        {"weight": PACKED_WEIGHT, "x": torch.ones(3, 19).half()},
        "`x` must have dtype float32, got float16",
    ),
    (
        {"weight": PACKED_WEIGHT, "x": torch.ones(3, 18)},
        "`x` must have 19 columns (depth of `weight`), got 18",
    ),
    (
        {"weight": PACKED_WEIGHT.data},
        f"`weight` must have shape [{64 // STRIP}, 5, {STRIP}, 4] (strips for all columns, steps "
        f"for the depth of `x`), got [{128 // STRIP}, 5, {STRIP}, 4]",
    ),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("change", "message"), REJECTED, ids=lambda x: "".join(x) if x else "")
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(3, 19), "weight": torch.ones(70, 19), "bias": torch.ones(70)}
    with pytest.raises(ValueError) as error:
        linear_argmax(**(arguments | change))
    assert str(error.value) == f"linear_argmax: {message}"


@pytest.mark.cuda
def test_arguments_on_two_devices_are_rejected() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, weight, bias = make(3, 19, 70, "torch.float32", "cuda")
    for arguments, name in (((x, weight.cpu(), bias), "weight"), ((x, weight, bias.cpu()), "bias")):
        with pytest.raises(
            ValueError, match=f"`{name}` must be on cuda:0 .device of `x`., got cpu"
        ):
            linear_argmax(*arguments)
    with pytest.raises(ValueError, match="`x` must be on cpu, where packed weights are used"):
        linear_argmax(x, PACKED_WEIGHT)


def test_extension_takes_numpy_arrays(extension: Any) -> None:
    *tensors, columns, k = raw_arguments(PACKED[2])
    arrays = [tensor.numpy() for tensor in tensors]
    outputs = [
        np.empty((3, k), dtype=np.int64),
        np.empty((3, k), dtype=np.float32),
        np.empty(3, dtype=np.float32),
    ]
    extension.linear_argmax(*arrays, columns, k, *outputs, None)
    want = _OPERATOR.call(*tensors, columns, k)
    assert_identical(tuple(map(torch.from_numpy, outputs)), want)
    outputs[1].setflags(write=False)
    with pytest.raises(ValueError, match="linear_argmax: `log_probs` must be writable"):
        extension.linear_argmax(*arrays, columns, k, *outputs, None)
