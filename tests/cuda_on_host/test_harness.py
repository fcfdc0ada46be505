from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path


def _run(program: Path, argument: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, argument], capture_output=True, text=True, timeout=60)


def test_built_ins_behave_as_on_a_gpu(compile_on_host: Callable[[str], Path]) -> None:
    done = _run(compile_on_host("self_test"), "good")
    assert done.returncode == 0, done.stderr


def test_a_barrier_that_some_threads_miss_is_reported(
    compile_on_host: Callable[[str], Path],
) -> None:
    done = _run(compile_on_host("self_test"), "divergent")
    assert done.returncode == 3
    assert "threads wait for others that never come" in done.stderr


def test_a_write_past_the_end_is_reported(compile_on_host: Callable[[str], Path]) -> None:
    done = _run(compile_on_host("self_test"), "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
