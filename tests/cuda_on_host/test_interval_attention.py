from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pynar import reference
from pynar.testing import tolerance

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
RESULTS = ("out", "lse", "grad_q", "grad_k", "grad_v")


def _write(path: Path, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    path.write_bytes(tensor.view(BITS.get(tensor.dtype, tensor.dtype)).numpy().tobytes())


def _read(path: Path, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=like.dtype).reshape(like.shape)


def _intervals(batch: int, queries: int, keys: int, count: int) -> Tensor:
    """Causal in the first sentence, drawn in the others; the last quarter sees nothing."""
    intervals = torch.randint(0, keys + 1, (batch, queries, count, 2))
    t = torch.arange(queries)
    intervals[0] = 0
    intervals[0, :, 0, 1] = (t + 1).clamp(max=keys)
    intervals[:, queries - queries // 4 :] = keys // 2
    return intervals.int()


# 70 queries and 70 keys: more than a tile of either, and none of them full; 5 queries of 100 keys:
# by rows, as in decoding. The offset moves keys and values off alignment, which must not change a
# bit. Channels: below a tile's, at one, and above.
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "dim", "count"),
    [(2, 1, 70, 70, 20, 2), (1, 2, 19, 33, 64, 1), (1, 1, 17, 40, 104, 4), (2, 2, 5, 100, 33, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kernels_match_reference_under_address_sanitizer(
    compile_on_host: Callable[[str], Path],
    tmp_path: Path,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    count: int,
    dtype: torch.dtype,
) -> None:
    program = compile_on_host("interval_attention")
    q, grad_out = torch.randn(2, batch, heads, queries, dim).to(dtype)
    k, v = torch.randn(2, batch, heads, keys, dim).to(dtype)
    intervals = _intervals(batch, queries, keys, count)
    visible = reference.interval_mask(intervals, keys)
    for x in (k, v):
        x.transpose(1, 2)[~visible.any(1)] = torch.nan
    for x in (q, grad_out):
        x.transpose(1, 2)[~visible.any(2)] = torch.nan
    want_out, want_lse = reference.interval_attention(q, k, v, intervals, return_lse=True)
    # From the rounded outputs, as the kernels have them.
    want_grads = reference.interval_attention_backward(
        grad_out, q, k, v, intervals, want_out, want_lse, dim**-0.5
    )
    want = (want_out, want_lse, *want_grads)

    results = []
    for offset, seed in ((0, 1), (1, 2)):
        front = torch.full((offset,), torch.nan, dtype=dtype)
        _write(tmp_path / "q", q)
        _write(tmp_path / "k", torch.cat([front, k.flatten()]))
        _write(tmp_path / "v", torch.cat([front, v.flatten()]))
        _write(tmp_path / "intervals", intervals)
        _write(tmp_path / "grad_out", grad_out)
        numbers = map(str, (batch, heads, queries, keys, dim, count, offset, seed))
        command = [str(program), str(dtype).removeprefix("torch."), *numbers, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        results.append(
            tuple(_read(tmp_path / name, w) for name, w in zip(RESULTS, want, strict=True))
        )

    for name, got, w in zip(RESULTS, results[0], want, strict=True):
        limits = tolerance("cpu", dtype)
        if name != "lse" and dtype in BITS:
            # The weights go through the tensor cores in 16 bits, and so do their gradients.
            limits["atol"] *= 4
        torch.testing.assert_close(got, w, **limits, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_that_a_query_does_not_see_has_no_influence(
    compile_on_host: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    program = compile_on_host("interval_attention")
    q, k, v, grad_out = torch.randn(4, 1, 1, 30, 24).to(dtype)
    intervals = torch.tensor([[0, 30]] * 15 + [[0, 20]] * 15, dtype=torch.int32)[None, :, None]
    v[:, :, 25, 3] = torch.inf
    want = reference.interval_attention(q[:, :, 15:], k, v, intervals[:, 15:])
    for name, x in (("q", q), ("k", k), ("v", v), ("grad_out", grad_out), ("intervals", intervals)):
        _write(tmp_path / name, x)
    numbers = map(str, (1, 1, 30, 30, 24, 1, 0, 1))
    command = [str(program), str(dtype).removeprefix("torch."), *numbers, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got = _read(tmp_path / "out", q)
    assert got[:, :, :15, 3].isinf().all()
    torch.testing.assert_close(got[:, :, 15:], want, **tolerance("cpu", dtype))
