from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.symbols import UNK
from pynar.testing import tolerance

from .files import read, write


def _run(
    program: Path,
    folder: Path,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    gap: int = 0,
    offset: int = 0,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and log-sum-exp from the kernels; what lies between rows is NaN."""
    rows, depth = x.shape
    for name, matrix in (("x", x), ("weight", weight)):
        apart = torch.cat([matrix, matrix.new_full((matrix.shape[0], gap), math.nan)], 1).flatten()
        before = matrix.new_full((offset,), math.nan)
        write(folder / name, torch.cat([before, apart[: apart.numel() - gap]]))
    write(folder / "bias", torch.empty(0) if bias is None else bias)
    numbers = (rows, depth, weight.shape[0], k, int(bias is not None), gap, offset, seed)
    dtype = str(x.dtype).removeprefix("torch.")
    command = [str(program), dtype, *map(str, numbers), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k), torch.empty(rows)
    names = ("tokens", "log_probs", "lse")
    return tuple(  # type: ignore[return-value]
        read(folder / name, like) for name, like in zip(names, wanted, strict=True)
    )


# Rows: one, and two tiles. Depth: none, less than a unit, units and stages that it does not fill,
# more stages than there are. Symbols: one, a tile that they do not fill, two segments.
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "k"),
    [(1, 0, 5, 3), (1, 3, 1, 1), (3, 17, 130, 16), (66, 40, 128, 1), (2, 136, 200, 5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_match_reference_under_address_sanitizer(
    compile_on_host: Callable[[str], Path],
    tmp_path: Path,
    rows: int,
    depth: int,
    columns: int,
    k: int,
    dtype: torch.dtype,
) -> None:
    program = compile_on_host("linear_argmax")
    # Few distinct values, so that equal logits are common and all of them exact.
    x = torch.randint(-2, 3, (rows, depth)).to(dtype)
    weight = torch.randint(-2, 3, (columns, depth)).div(4).to(dtype)
    bias = torch.randint(-2, 3, (columns,)).div(4)
    bias[torch.rand(columns) < 0.2] = -math.inf
    bias[0] = 0
    if rows > 2 and depth > 0:
        x[1, -1] = math.nan
        x[2, 0] = math.inf
    want = reference.linear_argmax(x, weight, bias, k)
    # Aligned rows if the gap makes them so, and rows at any address.
    gap = -depth % 8
    results = [
        _run(program, tmp_path, x, weight, bias, k, gap=gap, seed=1),
        _run(program, tmp_path, x, weight, bias, k, gap=gap + 1, offset=1, seed=2),
    ]
    for tokens, *numbers in results:
        torch.testing.assert_close(tokens, want[0], rtol=0, atol=0)
        limits = tolerance("cpu", torch.float32)
        torch.testing.assert_close(tuple(numbers), want[1:], **limits, equal_nan=True)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)


def test_segments_of_several_tiles(compile_on_host: Callable[[str], Path], tmp_path: Path) -> None:
    program = compile_on_host("linear_argmax")
    columns = 256 * 128 + 130  # segments of two tiles, the last one of two symbols in the second
    x, weight = torch.ones(1, 8), torch.zeros(columns, 8)
    best = [127, 128, 255, 256, columns - 131, columns - 1]
    weight[best] = 0.5
    weight[1000] = 1
    tokens, log_probs, lse = _run(program, tmp_path, x, weight, None, 9)
    want = reference.linear_argmax(x, weight, None, 9)
    assert tokens.tolist() == [[1000, *best, 0, 1]]
    torch.testing.assert_close(log_probs, want[1], **tolerance("cpu", torch.float32))
    torch.testing.assert_close(lse, want[2], **tolerance("cpu", torch.float32))


def test_rows_do_not_depend_on_batch_mates(
    compile_on_host: Callable[[str], Path], tmp_path: Path
) -> None:
    program = compile_on_host("linear_argmax")
    x, weight = torch.randn(67, 24).bfloat16(), torch.randn(150, 24).bfloat16()
    together = _run(program, tmp_path, x, weight, None, 2)
    for row in (0, 15, 63, 64, 66):
        alone = _run(program, tmp_path, x[row : row + 1], weight, None, 2)
        for a, t in zip(alone, together, strict=True):
            assert torch.equal(a, t[row : row + 1])


def test_a_row_without_a_distribution(
    compile_on_host: Callable[[str], Path], tmp_path: Path
) -> None:
    program = compile_on_host("linear_argmax")
    x, weight = torch.ones(1, 1), torch.zeros(300, 1)
    for place, value in ((5, math.nan), (299, math.nan), (5, math.inf), (0, -math.inf)):
        for rest in (0.0, -math.inf):
            bias = torch.full((300,), rest)
            bias[place] = value
            tokens, log_probs, lse = _run(program, tmp_path, x, weight, bias, 1)
            if value == -math.inf and rest == 0:
                assert tokens.item() == 1 and abs(lse.item() - math.log(299)) < 1e-5
            else:
                assert tokens.item() == UNK and log_probs.isnan().all() and lse.isnan().all()
