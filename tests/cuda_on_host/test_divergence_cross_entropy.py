from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.testing import tolerance
from tests.cuda_on_host.files import read, write

Pairs = list[tuple[int, int]]


def _run(
    program: Path,
    folder: Path,
    heads: Tensor,
    targets: Tensor,
    pairs: Pairs,
    factors: tuple[Tensor, Tensor],
    smoothing: float,
    *,
    gap: int,
    offset: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the kernels on `[C, N, V]` with rows `V + gap` apart; what lies between is NaN."""
    count, rows, vocabulary = heads.shape
    padded = torch.nn.functional.pad(heads, (0, gap), value=torch.nan).flatten()
    front = torch.full((offset,), torch.nan, dtype=heads.dtype)
    write(folder / "logits", torch.cat([front, padded]))
    write(folder / "targets", targets)
    write(folder / "grad_cross_entropy", factors[0])
    write(folder / "grad_divergence", factors[1])
    numbers = (count, rows, vocabulary, vocabulary + gap, offset, seed)
    indices = [str(h) for pair in pairs for h in pair]
    command = [
        *(str(program), str(heads.dtype).removeprefix("torch."), *map(str, numbers)),
        *(str(folder), str(smoothing), *indices),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size = offset + count * rows * (vocabulary + gap) - gap
    flat = read(folder / "grads", heads.new_empty(size))
    untouched = torch.ones(size, dtype=torch.bool)
    strides = (rows * (vocabulary + gap), vocabulary + gap, 1)
    untouched.as_strided(heads.shape, strides, offset).fill_(False)
    assert flat[untouched].isnan().all()
    return (
        read(folder / "cross_entropy", factors[0]),
        read(folder / "divergence", factors[1]) if pairs else factors[1],
        flat.as_strided(heads.shape, strides, offset),
    )


# 9 and 130 symbols leave threads without work, 2,300 give some of them several rounds.
@pytest.mark.parametrize(
    ("vocabulary", "pairs", "count"),
    [
        (9, [(1, 0)], 2),
        (130, [], 3),
        (2300, [(0, 1), (2, 1), (0, 2)], 3),
        (520, [(0, 3), (2, 1)], 4),
        (1, [(0, 1)], 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kernels_match_reference_under_address_sanitizer(
    compile_on_host: Callable[[str], Path],
    tmp_path: Path,
    vocabulary: int,
    pairs: Pairs,
    count: int,
    dtype: torch.dtype,
) -> None:
    program = compile_on_host("divergence_cross_entropy")
    heads = (torch.randn(count, 7, vocabulary) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (7,))
    if vocabulary > 1:
        heads[:, 0, 1::3] = -torch.inf
        heads[0, 1, 4] = -torch.inf
        heads[count - 1, 2, 5] = torch.nan
        heads[1, 3] = -torch.inf
        heads[1, 4, : vocabulary - 2] = -torch.inf
        heads[:, 5, : vocabulary - 2] = -torch.inf
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    factors = (
        torch.randn(count, 7, dtype=accumulation),
        torch.randn(len(pairs), 7, dtype=accumulation),
    )
    factors[0][0, ::2] = 0
    factors[1][:, ::3] = 0
    want = reference.divergence_cross_entropy(heads, targets, pairs, label_smoothing=0.1)
    grads = reference.divergence_cross_entropy_backward(
        *factors,
        heads,
        targets,
        want[2],
        pairs,
        0.1,
    )
    aligned = -vocabulary % 8
    results = [
        _run(
            *(program, tmp_path, heads, targets, pairs, factors, 0.1),
            gap=gap,
            offset=offset,
            seed=seed,
        )
        for gap, offset, seed in ((aligned, 0, 1), (aligned + 1, 0, 2), (aligned, 1, 3))
    ]
    for got, w in zip(results[0], (*want[:2], torch.stack(grads)), strict=True):
        torch.testing.assert_close(got, w, **tolerance("cuda", w.dtype), equal_nan=True)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


def test_a_target_outside_gives_nan_and_reads_nothing(
    compile_on_host: Callable[[str], Path], tmp_path: Path
) -> None:
    program = compile_on_host("divergence_cross_entropy")
    heads = torch.randn(2, 3, 40)
    factors = (torch.zeros(2, 3), torch.ones(1, 3))
    targets = torch.tensor([-100, 5, 1 << 40])
    got = _run(
        *(program, tmp_path, heads, targets, [(0, 1)], factors, 0.1), gap=0, offset=0, seed=1
    )
    assert got[0].isnan().tolist() == [[True, False, True]] * 2
    want = reference.divergence_cross_entropy(heads, targets * 0, [(0, 1)])
    torch.testing.assert_close(got[1], want[1])
