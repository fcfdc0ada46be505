from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pynar import reference
from pynar.ops import mask_predict_step
from pynar.symbols import BOS, EOS, MASK, PAD, UNK
from pynar.testing import tolerance

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_arguments(
    batch: int,
    steps: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Makes a batch in mid-decoding; whatever must not be read is NaN."""
    scores_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(batch, steps, vocabulary).mul(3).to(dtype)
    tokens = torch.randint(0, vocabulary, (batch, steps))
    tokens[torch.rand(batch, steps) < 0.6] = MASK
    scores = -torch.rand(batch, steps, dtype=scores_dtype) * 8
    lengths = torch.randint(0, steps + 1, (batch,))
    if batch > 0:
        lengths[-1] = steps
    num_masked = torch.randint(0, steps + 2, (batch,))
    padding = torch.arange(steps) >= lengths[:, None]
    logits[padding | (tokens != MASK)] = torch.nan
    scores[padding] = torch.nan
    arguments = (logits, tokens, scores, lengths, num_masked)
    return tuple(argument.to(device) for argument in arguments)  # type: ignore[return-value]


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Asserts equal tokens, and scores within the tolerance of their device and dtype."""
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    tolerances = tolerance(got[1].device, got[1].dtype)
    torch.testing.assert_close(got[1], want[1], **tolerances, equal_nan=True)


def assert_identical(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("batch", "steps", "vocabulary"),
    [(1, 1, 5), (7, 9, 33), (3, 33, 130), (2, 7, 1000), (2, 3, 9001)],
)
def test_matches_reference(
    batch: int, steps: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = make_arguments(batch, steps, vocabulary, dtype=dtype, device=device)
    assert_same(mask_predict_step(*arguments), reference.mask_predict_step(*arguments))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.usefixtures("simd_level")
def test_every_simd_level_matches_reference(dtype: torch.dtype) -> None:
    for vocabulary in (7, 63, 64, 65, 128, 129, 1300):
        arguments = make_arguments(3, 7, vocabulary, dtype=dtype)
        assert_same(mask_predict_step(*arguments), reference.mask_predict_step(*arguments))


# Symbols from 5 on are words. With logits log 1, log 2, ... a probability is a ratio of small
# numbers; "x" marks a logit that must make no difference.
L2, L3, L4 = math.log(2), math.log(3), math.log(4)
X = 50.0
CASES = {
    "one masked slot": {
        "logits": [[X, 0, 0, 0, X, L2, L3]],
        "tokens": [MASK],
        "scores": [-9.0],
        "num_masked": 0,
        "want": ([6], [math.log(3 / 8)]),
    },
    "kept slots keep their scores": {
        "logits": [[X] * 7, [X, 0, 0, 0, X, L4, L2], [X] * 7],
        "tokens": [5, MASK, 6],
        "scores": [-0.5, 0.0, -0.25],
        "num_masked": 0,
        "want": ([5, 5, 6], [-0.5, math.log(4 / 9), -0.25]),
    },
    "the lowest score is masked again and kept": {
        "logits": [[X] * 7, [X, 0, 0, 0, X, L4, L2], [X] * 7],
        "tokens": [5, MASK, 6],
        "scores": [-0.5, 0.0, -3.0],
        "num_masked": 1,
        "want": ([5, 5, MASK], [-0.5, math.log(4 / 9), -3.0]),
    },
    "equal logits: the lower symbol": {
        "logits": [[X, 0, 0, 0, X, L2, L2]],
        "tokens": [MASK],
        "scores": [0.0],
        "num_masked": 0,
        "want": ([5], [math.log(2 / 7)]),
    },
    "equal scores: the lower position": {
        "logits": [[X] * 7] * 4,
        "tokens": [5, 6, 5, 6],
        "scores": [-1.0, -2.0, -2.0, -2.0],
        "num_masked": 2,
        "want": ([5, MASK, MASK, 6], [-1.0, -2.0, -2.0, -2.0]),
    },
    "frame symbols stay, and all others go if more are asked for": {
        "logits": [[X] * 7] * 5,
        "tokens": [BOS, 5, PAD, UNK, EOS],
        "scores": [-9.0, -1.0, -9.0, -2.0, -9.0],
        "num_masked": 7,
        "want": ([BOS, MASK, PAD, MASK, EOS], [-9.0, -1.0, -9.0, -2.0, -9.0]),
    },
    "a predicted frame symbol can be masked again": {
        "logits": [[X] * 7, [X, 0, L4, 0, X, 0, 0]],
        "tokens": [5, MASK],
        "scores": [-0.5, 0.0],
        "num_masked": 1,
        "want": ([5, MASK], [-0.5, math.log(4 / 8)]),
    },
    "a row of -inf yields <unk> and goes first": {
        "logits": [[X, *[-math.inf] * 3, X, *[-math.inf] * 2], [X] * 7],
        "tokens": [MASK, 5],
        "scores": [0.0, -99.0],
        "num_masked": 0,
        "want": ([UNK, 5], [math.nan, -99.0]),
    },
    "a row with a NaN is masked first": {
        "logits": [[X] * 7, [X, 0, 0, 0, X, math.nan, 1]],
        "tokens": [5, MASK],
        "scores": [-99.0, 0.0],
        "num_masked": 1,
        "want": ([5, MASK], [-99.0, math.nan]),
    },
    "a row with +inf has no distribution": {
        "logits": [[X, 0, 0, 0, X, math.inf, 1]],
        "tokens": [MASK],
        "scores": [0.0],
        "num_masked": 0,
        "want": ([UNK], [math.nan]),
    },
    "impossible symbols have no share": {
        "logits": [[X, -math.inf, -math.inf, -math.inf, X, 0, -math.inf]],
        "tokens": [MASK],
        "scores": [-5.0],
        "num_masked": 0,
        "want": ([5], [0.0]),
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", [mask_predict_step, reference.mask_predict_step])
def test_cases_worked_by_hand(name: str, function: Any, device: torch.device) -> None:
    case = CASES[name]
    got = function(
        torch.tensor([case["logits"]], device=device),
        torch.tensor([case["tokens"]], device=device),
        torch.tensor([case["scores"]], device=device),
        torch.tensor([len(case["tokens"])], device=device),
        torch.tensor([case["num_masked"]], device=device),
    )
    tokens, scores = case["want"]
    want = torch.tensor([tokens], device=device), torch.tensor([scores], device=device)
    assert_same(got, want)


@pytest.mark.parametrize("shift", [-1e9, -5000, -100, 100, 4090, 5000, 1e9])
def test_scores_do_not_depend_on_the_size_of_logits(shift: float, device: torch.device) -> None:
    logits, *rest = make_arguments(2, 7, 1003, device=device)
    shifted = logits + shift
    want_tokens, want_scores = reference.mask_predict_step(
        shifted.double(), rest[0], rest[1].double(), *rest[2:]
    )
    got = mask_predict_step(shifted, *rest)
    assert_same(got, (want_tokens, want_scores.to(torch.float32)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_equal_logits_are_uniform_at_any_size(dtype: torch.dtype, device: torch.device) -> None:
    limits = torch.finfo(dtype)
    for value in (limits.min, -1.0, 0.0, limits.tiny, limits.max):
        logits, tokens, scores, lengths, num_masked = make_arguments(1, 2, 37, dtype=dtype)
        arguments = (
            torch.full_like(logits, value).to(device),
            torch.full_like(tokens, MASK).to(device),
            scores.to(device),
            lengths.to(device),
            torch.zeros_like(num_masked).to(device),
        )
        want = torch.full_like(scores, -math.log(35), device=device)
        assert_same(mask_predict_step(*arguments), (torch.full_like(arguments[1], BOS), want))


def brute_force(
    logits: list[list[float]],
    tokens: list[int],
    scores: list[float],
    length: int,
    num_masked: int,
) -> tuple[list[int], list[float]]:
    """The definition for one sentence, in Python's own numbers."""
    out_tokens, out_scores = list(tokens), list(scores)
    for t in range(length):
        if tokens[t] != MASK:
            continue
        row = {v: x for v, x in enumerate(logits[t]) if v not in (PAD, MASK)}
        best = max(row, key=lambda v: (row[v], -v))
        out_tokens[t] = best
        out_scores[t] = row[best] - math.log(sum(math.exp(x) for x in row.values()))
    candidates = [t for t in range(length) if tokens[t] not in (PAD, BOS, EOS)]
    for t in sorted(candidates, key=lambda t: (np.float32(out_scores[t]), t))[:num_masked]:
        out_tokens[t] = MASK
    for t in range(length, len(tokens)):
        out_tokens[t], out_scores[t] = PAD, 0.0
    return out_tokens, out_scores


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_matches_brute_force(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 6))
    vocabulary = data.draw(st.integers(5, 12))
    # Multiples of 1/2 in a narrow range make equal logits and scores common. Equal rows have equal
    # scores in both computations; others differ by more than rounding.
    number = st.integers(-4, 4).map(lambda i: i / 2)
    logits = [[data.draw(number) for _ in range(vocabulary)] for _ in range(steps)]
    tokens = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=steps, max_size=steps))
    scores = [data.draw(number) for _ in range(steps)]
    length = data.draw(st.integers(0, steps))
    num_masked = data.draw(st.integers(0, steps + 1))
    want_tokens, want_scores = brute_force(logits, tokens, scores, length, num_masked)
    got = mask_predict_step(
        torch.tensor([logits]),
        torch.tensor([tokens]),
        torch.tensor([scores]),
        torch.tensor([length]),
        torch.tensor([num_masked]),
    )
    rounded = sorted(round(s, 4) for t, s in enumerate(want_scores) if t < length)
    if len(set(rounded)) < len(rounded):
        # Scores that are equal in exact arithmetic may differ in the last bit, in either order.
        torch.testing.assert_close(got[1], torch.tensor([want_scores]), rtol=0, atol=1e-5)
        assert (got[0] == MASK).sum() == want_tokens.count(MASK)
    else:
        assert_same(got, (torch.tensor([want_tokens]), torch.tensor([want_scores])))


@pytest.mark.parametrize(("batch", "steps"), [(0, 0), (0, 5), (3, 0)])
def test_empty(batch: int, steps: int, device: torch.device) -> None:
    arguments = make_arguments(batch, steps, 7, device=device)
    tokens, scores = mask_predict_step(*arguments)
    assert tokens.shape == scores.shape == (batch, steps)


def test_sentences_of_no_length_are_padding(device: torch.device) -> None:
    logits, tokens, scores, lengths, num_masked = make_arguments(3, 5, 7, device=device)
    got = mask_predict_step(logits, tokens, scores, torch.zeros_like(lengths), num_masked)
    assert_identical(got, (torch.full_like(tokens, PAD), torch.zeros_like(scores)))


def test_views_equal_copies(device: torch.device) -> None:
    logits, tokens, scores, lengths, num_masked = make_arguments(6, 14, 130, device=device)
    lengths = lengths.clamp(max=7)
    views = (logits[::2, ::2], tokens[::2, ::2], scores[::2, ::2], lengths[::2], num_masked[::2])
    copies = tuple(view.contiguous() for view in views)
    assert_identical(mask_predict_step(*views), mask_predict_step(*copies))


def test_strided_vocabulary_equals_its_copy(device: torch.device) -> None:
    logits, *rest = make_arguments(3, 7, 33, device=device)
    strided = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert strided.stride(2) != 1
    assert_identical(mask_predict_step(strided, *rest), mask_predict_step(logits, *rest))


def test_arguments_are_left_alone(device: torch.device) -> None:
    arguments = make_arguments(3, 7, 33, device=device)
    copies = tuple(argument.clone() for argument in arguments)
    mask_predict_step(*arguments)
    torch.testing.assert_close(arguments, copies, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sentences_do_not_depend_on_batch_mates(dtype: torch.dtype, device: torch.device) -> None:
    arguments = make_arguments(5, 9, 1003, dtype=dtype, device=device)
    tokens, scores = mask_predict_step(*arguments)
    for b in range(5):
        alone = mask_predict_step(*(argument[b : b + 1].clone() for argument in arguments))
        assert_identical(alone, (tokens[b : b + 1], scores[b : b + 1]))


def test_padding_width_makes_no_difference(device: torch.device) -> None:
    logits, tokens, scores, lengths, num_masked = make_arguments(4, 9, 33, device=device)
    lengths = lengths.clamp(max=6)
    wide = mask_predict_step(logits, tokens, scores, lengths, num_masked)
    narrow = mask_predict_step(logits[:, :6], tokens[:, :6], scores[:, :6], lengths, num_masked)
    assert_identical(narrow, (wide[0][:, :6].contiguous(), wide[1][:, :6].contiguous()))


def test_threads_make_no_difference() -> None:
    arguments = make_arguments(8, 9, 9001)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mask_predict_step(*arguments)
        torch.set_num_threads(3)
        three = mask_predict_step(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert_identical(one, three)


def test_registered_rightly(device: torch.device) -> None:
    arguments = make_arguments(3, 7, 33, device=device)
    arguments = (arguments[0].nan_to_num(), arguments[1], arguments[2].nan_to_num(), *arguments[3:])
    torch.library.opcheck(torch.ops.pynar.mask_predict_step.default, arguments)


def test_compiles_into_one_graph(device: torch.device) -> None:
    compiled = torch.compile(mask_predict_step, fullgraph=True, backend="aot_eager")
    arguments = make_arguments(3, 7, 33, device=device)
    assert_identical(compiled(*arguments), mask_predict_step(*arguments))


def test_exports() -> None:
    class Step(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            return mask_predict_step(*arguments)

    arguments = make_arguments(3, 7, 33)
    program = torch.export.export(Step(), arguments)
    assert_identical(program.module()(*arguments), mask_predict_step(*arguments))


def test_is_not_differentiable(device: torch.device) -> None:
    logits, tokens, scores, lengths, num_masked = make_arguments(2, 3, 7, device=device)
    logits.requires_grad_()
    scores.requires_grad_()
    _, new_scores = mask_predict_step(logits, tokens, scores, lengths, num_masked)
    assert not new_scores.requires_grad


REJECTED = [
    (
        "logits",
        lambda a: a[0][0],
        "mask_predict_step: `logits` must have 3 dimensions [B, T, V], got shape [7, 33]",
    ),
    (
        "logits",
        lambda a: a[0].long(),
        "mask_predict_step: `logits` must have dtype float32 or bfloat16 or float16 or float64, "
        "got int64",
    ),
    (
        "logits",
        lambda a: a[0][..., :4],
        "mask_predict_step: `logits` must have at least 5 symbols (the special ones), got 4",
    ),
    (
        "tokens",
        lambda a: a[1][:, :-1],
        "mask_predict_step: `tokens` must have shape [3, 7] (batch and steps of `logits`), "
        "got [3, 6]",
    ),
    (
        "tokens",
        lambda a: a[1].int(),
        "mask_predict_step: `tokens` must have dtype int64, got int32",
    ),
    (
        "scores",
        lambda a: a[2].double(),
        "mask_predict_step: `scores` must have dtype float32, got float64",
    ),
    (
        "lengths",
        lambda a: a[3][:-1],
        "mask_predict_step: `lengths` must have shape [3] (batch of `logits`), got [2]",
    ),
    (
        "lengths",
        lambda a: torch.tensor([7, 8, 7]),
        "mask_predict_step: `lengths` must have values in [0, 7], got 8 (sentence 1)",
    ),
    (
        "num_masked",
        lambda a: torch.tensor([0, 0, -1]),
        "mask_predict_step: `num_masked` must have values of at least 0, got -1 (sentence 2)",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), REJECTED, ids=[r[0] for r in REJECTED])
def test_a_wrong_call_says_what_is_wanted(name: str, change: Any, message: str) -> None:
    names = ("logits", "tokens", "scores", "lengths", "num_masked")
    arguments = list(make_arguments(3, 7, 33))
    arguments[names.index(name)] = change(arguments)
    with pytest.raises(ValueError) as error:
        mask_predict_step(*arguments)
    assert str(error.value) == message


@pytest.mark.cuda
def test_arguments_on_two_devices_are_rejected() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = list(make_arguments(3, 7, 33, device="cuda"))
    arguments[3] = arguments[3].cpu()
    with pytest.raises(
        ValueError, match="`lengths` must be on cuda:0 .device of `logits`., got cpu"
    ):
        mask_predict_step(*arguments)


def test_extension_takes_numpy_arrays(extension: Any) -> None:
    arguments = make_arguments(3, 7, 33)
    arrays = [argument.numpy() for argument in arguments]
    tokens = np.empty((3, 7), dtype=np.int64)
    scores = np.empty((3, 7), dtype=np.float32)
    extension.mask_predict_step(*arrays, tokens, scores, None)
    assert_identical(
        (torch.from_numpy(tokens), torch.from_numpy(scores)), mask_predict_step(*arguments)
    )

    tokens.setflags(write=False)
    with pytest.raises(ValueError, match="`new_tokens` must be writable"):
        extension.mask_predict_step(*arrays, tokens, scores, None)


def test_extension_refuses_what_is_no_tensor(extension: Any) -> None:
    arguments = make_arguments(3, 7, 33)
    with pytest.raises(TypeError):
        extension.mask_predict_step(arguments[0].tolist(), *arguments[1:], *arguments[1:3], None)
