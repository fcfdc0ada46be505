from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pynar import reference
from pynar.ops import divergence_cross_entropy
from pynar.ops._operator import implementation
from pynar.testing import tolerance

Pairs = list[tuple[int, int]]
Heads = tuple[Tensor, ...]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Beside vectors of 8 and 16, and beside and beyond blocks of 512.
VOCABULARIES = [1, 7, 33, 130, 515, 1100]
EVERY_SET_OF_PAIRS: list[tuple[int, Pairs]] = [
    (heads, list(pairs))
    for heads in (1, 2, 3)
    for count in range(heads * (heads - 1) // 2 + 1)
    for pairs in itertools.combinations(itertools.combinations(range(heads), 2), count)
] + [(4, [(3, 1), (0, 2)]), (4, list(itertools.combinations(range(4), 2)))]


def all_pairs(heads: int) -> Pairs:
    return [(q, p) if p == 1 else (p, q) for p, q in itertools.combinations(range(heads), 2)]


def make_logits(
    heads: int,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Heads:
    # Heads differ by constants too, which change no distribution.
    return tuple(
        (torch.randn(rows, vocabulary) * 3 + 5 * h).to(dtype).to(device) for h in range(heads)
    )


def make_targets(rows: int, vocabulary: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randint(0, vocabulary, (rows,)).to(device)


def compose(heads: Heads, targets: Tensor, pairs: Pairs, smoothing: float) -> tuple[Tensor, Tensor]:
    """The same from functions that PyTorch differentiates, in float64."""
    exact = [x.double() for x in heads]
    cross_entropy = torch.stack(
        [F.cross_entropy(x, targets, reduction="none", label_smoothing=smoothing) for x in exact]
    )
    log_probs = [x.log_softmax(-1) for x in exact]
    divergence = cross_entropy.new_empty(0, len(targets))
    if pairs:
        divergence = torch.stack(
            [
                sum(
                    F.kl_div(log_probs[a], log_probs[b], reduction="none", log_target=True).sum(-1)
                    for a, b in ((p, q), (q, p))
                )
                / 2
                for p, q in pairs
            ]
        )
    return cross_entropy, divergence


def differentiate(
    function: Any, heads: Heads, targets: Tensor, pairs: Pairs, factors: tuple[Tensor, Tensor]
) -> Heads:
    """The gradients of the sum of the results times `factors`; smoothing 0.1."""
    inputs = tuple(x.detach().requires_grad_() for x in heads)
    results = function(inputs, targets, pairs, 0.1)
    total = sum((x * f.to(x.dtype)).sum() for x, f in zip(results, factors, strict=True))
    return torch.autograd.grad(total, inputs)


def operator(
    heads: Heads, targets: Tensor, pairs: Pairs, smoothing: float
) -> tuple[Tensor, Tensor]:
    return divergence_cross_entropy(heads, targets, pairs, label_smoothing=smoothing)


def make_factors(heads: int, pairs: Pairs, rows: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    factors = torch.randn(heads + len(pairs), rows, dtype=torch.float64).to(device)
    return factors[:heads], factors[heads:]


def limits(heads: Heads, dtype: torch.dtype | None = None) -> Any:
    accumulation = torch.float64 if heads[0].dtype == torch.float64 else torch.float32
    return tolerance(heads[0].device, dtype or accumulation)


def assert_right(heads: Heads, targets: Tensor, pairs: Pairs, smoothing: float = 0.1) -> None:
    got = operator(heads, targets, pairs, smoothing)
    want = compose(heads, targets, pairs, smoothing)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, **limits(heads))
    factors = make_factors(len(heads), pairs, len(targets), heads[0].device)
    grads = differentiate(operator, heads, targets, pairs, factors)
    exact = differentiate(compose, tuple(x.double() for x in heads), targets, pairs, factors)
    for g, e in zip(grads, exact, strict=True):
        assert g.dtype == heads[0].dtype
        torch.testing.assert_close(g.double(), e, **limits(heads, g.dtype))


def awkward(dtype: torch.dtype, vocabulary: int, device: torch.device | str = "cpu") -> Heads:
    """Three heads with what is not finite in some rows, beside rows that are ordinary."""
    heads = make_logits(3, 9, vocabulary, dtype, device)
    for head in heads:
        head[0, 1::3] = -torch.inf  # in all
        head[1, :600] = -torch.inf  # whole blocks
        head[1, -2:] = 1
    heads[0][2, 5] = -torch.inf  # in one alone
    heads[1][3, 6] = torch.nan
    heads[2][4, 0] = torch.inf
    heads[2][5] = -torch.inf
    heads[0][6, 4] = -torch.inf  # in two of three
    heads[1][6, 4] = -torch.inf
    heads[0][7, 3] = -torch.inf
    heads[1][7] = -3e4  # so improbable that its probability is zero
    heads[1][7, 2] = 3e4
    return heads


def assert_as_defined(heads: Heads, targets: Tensor, pairs: Pairs, smoothing: float = 0.1) -> None:
    want = reference.divergence_cross_entropy(heads, targets, pairs, label_smoothing=smoothing)
    got = operator(heads, targets, pairs, smoothing)
    for g, w in zip(got, want[:2], strict=True):
        torch.testing.assert_close(g, w, **limits(heads), equal_nan=True)
    factors = make_factors(len(heads), pairs, len(targets), heads[0].device)
    factors[0][:, -1] = 0
    factors[1][:, -1] = 0
    factors[0][0, :4] = 0
    factors[1][: len(pairs) // 2, 2:6] = 0
    factors = tuple(f.to(want[0].dtype) for f in factors)  # type: ignore[assignment]
    got = torch.ops.pynar.divergence_cross_entropy_backward(
        *factors, heads, targets, want[2], [h for pair in pairs for h in pair], smoothing
    )
    grads = reference.divergence_cross_entropy_backward(
        *factors, heads, targets, want[2], pairs, smoothing
    )
    for g, w in zip(got, grads, strict=True):
        torch.testing.assert_close(g, w, **limits(heads, g.dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_matches_float64_autograd(
    vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    heads = make_logits(3, 5, vocabulary, dtype, device)
    assert_right(heads, make_targets(5, vocabulary, device), all_pairs(3))


@pytest.mark.parametrize(("heads", "pairs"), EVERY_SET_OF_PAIRS)
def test_every_set_of_pairs(heads: int, pairs: Pairs, device: torch.device) -> None:
    logits = make_logits(heads, 4, 130, device=device)
    assert_right(logits, make_targets(4, 130, device), pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_simd_level_matches_float64_autograd(dtype: torch.dtype, simd_level: str) -> None:
    for heads in (1, 2, 3, 4):
        for vocabulary in (7, 1100):
            logits = make_logits(heads, 3, vocabulary, dtype)
            assert_right(logits, make_targets(3, vocabulary), all_pairs(heads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_simd_level_agrees_on_what_is_not_finite(dtype: torch.dtype, simd_level: str) -> None:
    assert_as_defined(awkward(dtype, 1100), make_targets(9, 1100), all_pairs(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [[], [(0, 1)], all_pairs(3)])
def test_what_is_not_finite_is_as_defined(
    pairs: Pairs, dtype: torch.dtype, device: torch.device
) -> None:
    for smoothing in (0.0, 0.1, 1.0):
        heads = awkward(dtype, 1100, device)
        assert_as_defined(heads, make_targets(9, 1100, device), pairs, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_that_of_torch_where_logits_are_infinite(
    smoothing: float, device: torch.device
) -> None:
    heads = make_logits(2, 4, 50, torch.float64, device)
    targets = torch.tensor([3, 3, 3, 0], device=device)
    heads[0][:2, 3] = -torch.inf
    heads[1][1:, 7] = -torch.inf
    got, _ = operator(heads, targets, [], smoothing)
    for g, x in zip(got, heads, strict=True):
        want = F.cross_entropy(x, targets, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(g, want, equal_nan=True)


def test_divergence_by_hand(device: torch.device) -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], device=device)
    q = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.5, 0.25, 0.25]], device=device)
    # Logits are fixed up to a constant.
    cross_entropy, divergence = divergence_cross_entropy(
        (p.log() + 1, q.log() - 2), torch.tensor([1, 0, 2], device=device), [(0, 1)]
    )
    inf = math.inf
    want = torch.tensor([[math.log(2), 0, inf], [-math.log(0.75), 0, math.log(4)]], device=device)
    torch.testing.assert_close(cross_entropy, want)
    want = torch.tensor([[math.log(3) / 8, 0, inf]], device=device)
    torch.testing.assert_close(divergence, want)


def test_an_impossible_symbol_costs_inf_however_improbable_it_is(device: torch.device) -> None:
    heads = make_logits(2, 2, 40, device=device)
    heads[0][0, 5] = -torch.inf
    heads[1][:, 5] = -1e9
    _, divergence = operator(heads, make_targets(2, 40, device), [(0, 1)], 0.0)
    assert divergence[0, 0] == math.inf
    assert divergence[0, 1].isfinite()


def test_an_impossible_symbol_of_all_heads_gets_no_gradient(device: torch.device) -> None:
    heads = make_logits(2, 2, 700, device=device)
    for head in heads:
        head[:, ::5] = -torch.inf
    inputs = [x.requires_grad_() for x in heads]
    targets = torch.tensor([1, 2], device=device)
    cross_entropy, divergence = divergence_cross_entropy(inputs, targets, [(0, 1)])
    (cross_entropy.sum() + divergence.sum()).backward()
    for head in inputs:
        assert head.grad is not None
        assert head.grad.isfinite().all()
        assert not head.grad[:, ::5].any()


def test_a_term_without_factor_has_no_part_in_the_gradient(device: torch.device) -> None:
    heads = make_logits(2, 3, 40, device=device)
    heads[0][1, 5] = -torch.inf
    heads[0][2, 5] = torch.nan
    inputs = [x.requires_grad_() for x in heads]
    targets = torch.tensor([1, 2, 3], device=device)
    cross_entropy, divergence = divergence_cross_entropy(inputs, targets, [(0, 1)])
    good = torch.tensor([True, False, False], device=device)
    (torch.where(good, divergence[0], 0).sum() + cross_entropy[1].sum()).backward()
    for head in inputs:
        assert head.grad is not None
        assert head.grad.isfinite().all()
    want = torch.autograd.grad(F.cross_entropy(inputs[1], targets, reduction="sum"), inputs[1])[0]
    torch.testing.assert_close(inputs[1].grad[1:], want[1:], **limits(heads))  # type: ignore[index]
    assert not inputs[0].grad[1:].any()  # type: ignore[index]
    inputs[0].grad = None
    divergence_cross_entropy(inputs, targets, [(0, 1)])[1].sum().backward()
    assert inputs[0].grad[0].isfinite().all()  # type: ignore[index]
    assert inputs[0].grad[1:].isnan().all()  # type: ignore[index]


def test_logits_far_from_zero(device: torch.device) -> None:
    heads = make_logits(2, 4, 130, torch.float64, device)
    # Multiples of 1/128 in [-64, 64], so that adding and taking away 4096 is exact in fp32.
    heads = tuple(((x - 5 * h) * 128).round() / 128 for h, x in enumerate(heads))
    targets = make_targets(4, 130, device)
    want = compose(heads, targets, [(0, 1)], 0.1)
    moved = (heads[0].float() + 4096, heads[1].float() - 4096)
    got = operator(moved, targets, [(0, 1)], 0.1)
    for g, w in zip(got, want, strict=True):
        # The mean logit is 4,096 less the same, in fp32.
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("heads", [2, 3])
def test_gradcheck(heads: int, device: torch.device) -> None:
    logits = [
        x.requires_grad_() for x in make_logits(heads, 3, 11, dtype=torch.float64, device=device)
    ]
    targets = make_targets(3, 11, device)
    torch.autograd.gradcheck(lambda *x: operator(x, targets, all_pairs(heads), 0.1), logits)


def test_equal_heads_do_not_diverge(device: torch.device) -> None:
    (head,) = make_logits(1, 4, 1000, device=device)
    _, divergence = operator((head, head.clone()), make_targets(4, 1000, device), [(0, 1)], 0.1)
    assert not divergence.any()


def test_one_tensor_equals_its_heads(device: torch.device) -> None:
    rows = make_logits(1, 3 * 5, 130, device=device)[0]
    targets = make_targets(5, 130, device)
    factors = tuple(f.float() for f in make_factors(3, all_pairs(3), 5, device))
    results = []
    for split in (lambda x: x.view(3, 5, 130), lambda x: x.split(5), lambda x: x.clone().split(5)):
        leaf = rows.clone().requires_grad_()
        outputs = divergence_cross_entropy(split(leaf), targets, all_pairs(3))  # type: ignore[no-untyped-call]
        results.append((*outputs, *torch.autograd.grad(outputs, leaf, factors)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)


SIZES = [([7], []), ([5, 5, 5], all_pairs(3)), ([9, 4, 4], all_pairs(3)), ([4, 9, 6], [(2, 0)])]
SIZES += [([0, 3], [(0, 1)]), ([3, 0, 0], []), ([0], [])]


@pytest.mark.parametrize(("sizes", "pairs"), SIZES, ids=str)
def test_heads_of_different_lengths(sizes: list[int], pairs: Pairs, device: torch.device) -> None:
    (logits,) = make_logits(1, sum(sizes), 130, torch.float64, device)
    logits.requires_grad_()
    targets = make_targets(max(sizes), 130, device)
    got = divergence_cross_entropy(logits, targets, pairs, label_smoothing=0.1, sizes=sizes)
    shared = min(sizes)
    heads = logits.split(sizes)
    alone = [compose((head,), targets[: len(head)], [], 0.1)[0][0] for head in heads]
    compared = compose(tuple(head[:shared] for head in heads), targets[:shared], pairs, 0.1)[1]
    want = torch.cat(alone), compared
    torch.testing.assert_close(got, want)
    factors = [torch.randn_like(x) for x in want]
    count = 2 if pairs else 1
    grads = [torch.autograd.grad(x[:count], logits, factors[:count]) for x in (got, want)]
    torch.testing.assert_close(*grads)


def test_strided_logits_equal_their_copies(device: torch.device) -> None:
    wide = make_logits(3, 6, 140, device=device)
    targets = make_targets(6, 130, device)
    factors = make_factors(3, all_pairs(3), 6, device)
    views = {
        "rows": tuple(x[:, 3:133] for x in wide),
        "columns": tuple(x[:, :130].t().contiguous().t() for x in wide),
        "one row": tuple(x[:1, :130].expand(6, 130) for x in wide),
    }
    for heads in views.values():
        copies = tuple(x.contiguous() for x in heads)
        got = operator(heads, targets, all_pairs(3), 0.1)
        torch.testing.assert_close(got, operator(copies, targets, all_pairs(3), 0.1))
        got = differentiate(operator, heads, targets, all_pairs(3), factors)
        want = differentiate(operator, copies, targets, all_pairs(3), factors)
        torch.testing.assert_close(got, want)
    spread = torch.stack([targets, targets], 1)[:, 0]
    assert not spread.is_contiguous()
    torch.testing.assert_close(
        operator(wide, spread, [], 0.1), operator(wide, targets, [], 0.1), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype, device: torch.device) -> None:
    heads = awkward(dtype, 1100, device)
    targets = make_targets(9, 1100, device)
    batched = operator(heads, targets, all_pairs(3), 0.1)
    exact: Any = {"rtol": 0, "atol": 0}
    if implementation(device.type).name == "reference":
        exact = limits(heads)
    for row in range(9):
        one = slice(row, row + 1)
        alone = operator(tuple(x[one] for x in heads), targets[one], all_pairs(3), 0.1)
        for a, b in zip(alone, batched, strict=True):
            torch.testing.assert_close(a, b[:, one], **exact, equal_nan=True)


def test_threads_make_no_difference() -> None:
    heads = make_logits(3, 11, 9000)
    targets = make_targets(11, 9000)
    factors = make_factors(3, all_pairs(3), 11)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            values = operator(heads, targets, all_pairs(3), 0.1)
            grads = differentiate(operator, heads, targets, all_pairs(3), factors)
            results.append((*values, *grads))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_detached_heads_get_no_gradient(device: torch.device) -> None:
    student, teacher = make_logits(2, 4, 130, device=device)
    student.requires_grad_()
    targets = make_targets(4, 130, device)
    divergence_cross_entropy((student, teacher), targets, [(0, 1)])[1].sum().backward()
    exact = student.detach().double().requires_grad_()
    want = compose((exact, teacher), targets, [(0, 1)], 0.0)[1].sum()
    torch.testing.assert_close(
        student.grad.double(),  # type: ignore[union-attr]
        torch.autograd.grad(want, exact)[0],
        **limits((student,)),
    )
    assert teacher.grad is None


@pytest.mark.parametrize("pairs", [[], [(0, 1)]])
def test_no_rows(pairs: Pairs, device: torch.device) -> None:
    heads = [x.requires_grad_() for x in make_logits(2, 0, 33, device=device)]
    cross_entropy, divergence = divergence_cross_entropy(heads, make_targets(0, 33, device), pairs)
    assert cross_entropy.shape == (2, 0)
    assert divergence.shape == (len(pairs), 0)
    (cross_entropy.sum() + divergence.sum()).backward()
    assert heads[0].grad is not None
    assert heads[0].grad.shape == (0, 33)


def test_registered_rightly(device: torch.device) -> None:
    heads = list(make_logits(3, 4, 33, device=device))
    targets = make_targets(4, 33, device)
    for logits, sizes in ((heads, None), ([torch.stack(heads)], None), ([heads[0]], [2, 1, 1])):
        settings = ([0, 1, 2, 1], 0.1, sizes)
        arguments = (logits, targets if sizes is None else targets[:2], *settings)
        torch.library.opcheck(torch.ops.pynar.divergence_cross_entropy.default, arguments)
        results = torch.ops.pynar.divergence_cross_entropy(*arguments)
        torch.library.opcheck(
            torch.ops.pynar.divergence_cross_entropy_backward.default,
            (results[0], results[1], *arguments[:2], results[2], *settings),
        )


def test_compiles_into_one_graph(device: torch.device) -> None:
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    heads = make_logits(3, 4, 130, device=device)
    targets = make_targets(4, 130, device)
    factors = make_factors(3, all_pairs(3), 4, device)
    torch.testing.assert_close(
        compiled(heads, targets, all_pairs(3), 0.1),
        operator(heads, targets, all_pairs(3), 0.1),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        differentiate(compiled, heads, targets, all_pairs(3), factors),
        differentiate(operator, heads, targets, all_pairs(3), factors),
        rtol=0,
        atol=0,
    )


def test_compiles_once_for_heads_of_all_lengths(device: torch.device) -> None:
    counter = CompileCounter()

    def losses(logits: Tensor, targets: Tensor, first: Tensor, second: Tensor) -> Tensor:
        sizes = [first.shape[0], second.shape[0]]
        cross_entropy, divergence = divergence_cross_entropy(logits, targets, [(0, 1)], sizes=sizes)
        return cross_entropy.sum() + divergence.sum()

    compiled = torch.compile(losses, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 7, 8, 11):
        (logits,) = make_logits(1, 2 * rows + 2, 16, device=device)
        arguments = make_targets(rows + 2, 16, device), torch.ones(rows + 2), torch.ones(rows)
        torch.testing.assert_close(compiled(logits, *arguments), losses(logits, *arguments))
    assert counter.frame_count == 1


def test_no_rows_of_strided_logits(device: torch.device) -> None:
    logits = torch.zeros(0, 16, device=device)[:, ::2]
    cross_entropy, _ = divergence_cross_entropy(logits, make_targets(0, 8, device), sizes=[0])
    assert cross_entropy.shape == (0,)


def test_arguments_are_left_alone(device: torch.device) -> None:
    heads = make_logits(3, 4, 130, device=device)
    copies = tuple(x.clone() for x in heads)
    factors = make_factors(3, all_pairs(3), 4, device)
    differentiate(operator, heads, make_targets(4, 130, device), all_pairs(3), factors)
    torch.testing.assert_close(heads, copies, rtol=0, atol=0)


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"logits": ()}, "`logits` must have 1 to 4 heads, got 0"),
    ({"logits": (torch.zeros(3, 8),) * 5}, "`logits` must have 1 to 4 heads, got 5"),
    ({"logits": torch.zeros(3, 8)[0]}, "`logits[0]` must have 2 dimensions [N, V], got shape [8]"),
    (
        {"logits": (torch.zeros(3, 8), torch.zeros(3, 9))},
        "`logits[1]` must have shape [3, 8] (that of `logits[0]`), got [3, 9]",
    ),
    (
        {"logits": (torch.zeros(3, 8), torch.zeros(3, 8).double())},
        "`logits[1]` must have dtype float32, got float64",
    ),
    (
        {"logits": (torch.zeros(3, 8, dtype=torch.int32),) * 2},
        "`logits[0]` must have dtype float32 or bfloat16 or float16 or float64, got int32",
    ),
    ({"logits": (torch.zeros(3, 0),) * 2}, "`logits[0]` must have at least one symbol, got 0"),
    (
        {"targets": torch.zeros(4, dtype=torch.int64)},
        "`targets` must have shape [3] (rows of `logits[0]`), got [4]",
    ),
    (
        {"targets": torch.zeros(3, dtype=torch.int32)},
        "`targets` must have dtype int64, got int32",
    ),
    (
        {"targets": torch.tensor([0, 8, -1])},
        "`targets` must have values in [0, 8), got 8 (row 1)",
    ),
    (
        {"targets": torch.tensor([0, 7, -100])},
        "`targets` must have values in [0, 8), got -100 (row 2)",
    ),
    ({"pairs": [(0, 2)]}, "`pairs` must be of two different heads in [0, 2), got (0, 2)"),
    ({"pairs": [(1, 1)]}, "`pairs` must be of two different heads in [0, 2), got (1, 1)"),
    ({"pairs": [(0, 1), (1, 0)]}, "`pairs` must have each pair once, got (1, 0) again"),
    ({"label_smoothing": 1.5}, "`label_smoothing` must be in [0, 1], got 1.500000"),
    (
        {"sizes": [3, 3]},
        "`logits` must be one tensor where there are `sizes`, got 2 heads",
    ),
    (
        {"logits": torch.zeros(2, 3, 8), "sizes": [3, 3]},
        "`logits` must have 2 dimensions [R, V] where there are `sizes`, got shape [2, 3, 8]",
    ),
    (
        {"logits": torch.zeros(6, 8), "sizes": []},
        "`sizes` must be those of 1 to 4 heads, got []",
    ),
    (
        {"logits": torch.zeros(6, 8), "sizes": [3, 4]},
        "`sizes` must sum up to the rows of `logits`, 6, got [3, 4]",
    ),
    (
        {"logits": torch.zeros(6, 8), "sizes": [7, -1]},
        "`sizes` must sum up to the rows of `logits`, 6, got [7, -1]",
    ),
    (
        {"logits": torch.zeros(6, 8), "sizes": [2, 4]},
        "`targets` must have shape [4] (the greatest of `sizes`), got [3]",
    ),
    (
        {"logits": torch.zeros(6, 8), "sizes": [3, 3], "pairs": [(0, 2)]},
        "`pairs` must be of two different heads in [0, 2), got (0, 2)",
    ),
    (
        {"logits": torch.zeros(6, 8), "sizes": [4, 2], "targets": torch.tensor([0, 1, 2, 8])},
        "`targets` must have values in [0, 8), got 8 (row 3)",
    ),
    ({"logits": torch.zeros(6, 8), "sizes": 6}, "`sizes` must be a sequence of numbers, got 6"),
    (
        {"logits": torch.zeros(6, 8), "sizes": [3, 3], "pairs": [(0,)]},
        "`pairs` must be in twos, got 1",
    ),
    ({"pairs": [(0,)]}, "`pairs` must be in twos, got 1"),
]


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[m for _, m in REJECTED])
def test_a_wrong_call_says_what_is_wanted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": (torch.zeros(3, 8), torch.zeros(3, 8)),
        "targets": torch.zeros(3, dtype=torch.int64),
        "pairs": [(0, 1)],
        "label_smoothing": 0.1,
    }
    with pytest.raises(ValueError) as error:
        divergence_cross_entropy(**(arguments | change))
    assert str(error.value) == f"divergence_cross_entropy: {message}"
