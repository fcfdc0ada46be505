from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pynar import reference
from pynar.symbols import MASK
from pynar.testing import tolerance

from .files import read, write


# 33 and 131 symbols: one short segment, rows that begin at no multiple of 16 bytes; 2100: two of
# the small block's segments; 9000: two of the large block's. 140 steps: more than a finishing block
# has threads. The offset moves the logits off alignment, which must not change a bit.
@pytest.mark.parametrize(
    ("batch", "steps", "vocabulary"),
    [(3, 7, 33), (1, 140, 5), (2, 3, 131), (2, 3, 2100), (1, 2, 9000)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kernels_match_reference_under_address_sanitizer(
    compile_on_host: Callable[[str], Path],
    tmp_path: Path,
    batch: int,
    steps: int,
    vocabulary: int,
    dtype: torch.dtype,
) -> None:
    program = compile_on_host("mask_predict_step")
    scores_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Few distinct values, so that equal logits and equal scores are common.
    logits = torch.randint(-8, 9, (batch, steps, vocabulary)).div(2).to(dtype)
    tokens = torch.randint(0, vocabulary, (batch, steps))
    tokens[torch.rand(batch, steps) < 0.5] = MASK
    scores = -torch.randint(0, 4, (batch, steps)).to(scores_dtype)
    lengths = torch.randint(steps // 2, steps + 1, (batch,))
    lengths[0] = steps
    num_masked = torch.randint(0, steps, (batch,))
    live = torch.arange(steps) < lengths[:, None]
    logits[~(live & (tokens == MASK))] = torch.nan
    tokens[0, 0] = MASK
    logits[0, 0] = -torch.inf
    arguments = (logits, tokens, scores, lengths, num_masked)
    want_tokens, want_scores = reference.mask_predict_step(*arguments)

    results = []
    for offset, seed in ((0, 1), (1, 2)):
        shifted = torch.cat([torch.full((offset,), torch.nan, dtype=dtype), logits.flatten()])
        names = ("logits", "tokens", "scores", "lengths", "num_masked")
        for name, tensor in zip(names, (shifted, *arguments[1:]), strict=True):
            write(tmp_path / name, tensor)
        numbers = map(str, (batch, steps, vocabulary, offset, seed))
        command = [str(program), str(dtype).removeprefix("torch."), *numbers, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        results.append(
            (read(tmp_path / "new_tokens", tokens), read(tmp_path / "new_scores", scores))
        )

    for new_tokens, new_scores in results:
        torch.testing.assert_close(new_tokens, want_tokens, rtol=0, atol=0)
        torch.testing.assert_close(
            new_scores, want_scores, **tolerance("cpu", scores_dtype), equal_nan=True
        )
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
