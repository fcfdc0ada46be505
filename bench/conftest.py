"""The benchmark harness: a case is data, and is timed only after its result was checked.

One group for each (operator, shape, dtype, device, direction); in it our kernel, the PyTorch
reference, torch.compile of the reference and the best peer. `python -m bench.report FILE.json`
turns the output of `--benchmark-json FILE.json` into ratios and bandwidths.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import _backend
from pynar.testing import tolerance

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """What is timed: functions of the same arguments that must agree with `reference`."""

    operator: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    arguments: tuple[Tensor, ...]
    reference: Function
    bytes_moved: int  # that the operator cannot do without
    direction: str = "forward"
    # Whether a user would replay the call from a captured graph.
    graph: bool = field(default=True, kw_only=True)

    @property
    def group(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator} {self.shape} {dtype} {self.device.type} {self.direction}"


class CudaClock:
    """A clock for pytest-benchmark that reads the GPU's own time, in seconds."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._now = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            # Summed up from differences, since an event's own time is a float of milliseconds.
            self._now += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._now


def measure_ceiling(device: torch.device, bytes_moved: int) -> float:
    """Measures the rate, in bytes a second, at which this many bytes can be read here.

    On the CPU with the same number of threads, data of the same size and as warm as a repeated
    benchmark leaves it; on a GPU half the traffic of a device-to-device copy, cold.
    """
    count = max(1, bytes_moved // 4)
    data = torch.ones(count, device=device)
    times = []
    if device.type == "cuda":
        clock = CudaClock()
        other = torch.empty_like(data)
        for _ in range(20):
            begin = clock()
            other.copy_(data)
            times.append((clock() - begin) / 2)
    else:
        extension = _backend.extension()
        read: Function = data.sum if extension is None else lambda: extension.read_all(data)
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end or len(times) < 5:
            begin = time.perf_counter()
            read()
            times.append(time.perf_counter() - begin)
    return 4 * count / statistics.median(times)


def _assert_agrees(got: Any, want: Any) -> None:
    got = got if isinstance(got, tuple) else (got,)
    want = want if isinstance(want, tuple) else (want,)
    for g, w in zip(got, want, strict=True):
        limits = tolerance(w.device, w.dtype) if w.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(g, w, **limits, equal_nan=True)


def _capture(function: Function, arguments: tuple[Tensor, ...]) -> Function:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*arguments)
    return graph.replay


@pytest.fixture
def run_case(benchmark: Any) -> Iterator[Callable[[Case, str, Function], None]]:
    """Checks an implementation of a case against its reference, then times it."""

    def run(case: Case, implementation: str, function: Function) -> None:
        with torch.no_grad():
            want = case.reference(*case.arguments)
            _assert_agrees(function(*case.arguments), want)
            benchmark.group = case.group
            benchmark.extra_info.update(
                implementation=implementation,
                operator=case.operator,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                device=case.device.type,
                direction=case.direction,
                bytes_moved=case.bytes_moved,
                threads=torch.get_num_threads(),
            )
            if case.device.type == "cuda":
                _time_cuda(benchmark, case, function)
            else:
                before = measure_ceiling(case.device, case.bytes_moved)
                benchmark(function, *case.arguments)
                after = measure_ceiling(case.device, case.bytes_moved)
                # Other work on the machine slows both; what it can do is the better of the two.
                benchmark.extra_info["ceiling"] = max(before, after)

    yield run


def _time_cuda(benchmark: Any, case: Case, function: Function) -> None:
    benchmark.extra_info["ceiling"] = measure_ceiling(case.device, case.bytes_moved)
    timed: Function = lambda: function(*case.arguments)  # noqa: E731
    if case.graph:
        timed = _capture(function, case.arguments)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=case.device)
    benchmark._timer = CudaClock()

    def cool() -> None:
        flush.zero_()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=cool, rounds=100, warmup_rounds=5)


def compiled(function: Function) -> Function:
    """torch.compile of a reference, for one set of shapes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def device_or_skip(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


def _commit() -> str:
    """Names the commit; "-dirty" if what is timed, or times, differs from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "pynar/ops", "pynar/reference", "bench")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Replaces pytest-benchmark's long description by what a reader of a result needs."""
    cpu: Mapping[str, Any] = machine_info.get("cpu", {})
    machine_info.clear()
    extension = _backend.extension()
    machine_info.update(
        processor=cpu.get("brand_raw", platform.machine()),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
        simd=extension.simd_level() if extension is not None else None,
        python=platform.python_version(),
        torch=torch.__version__,
        commit=_commit(),
        command=" ".join(["pytest", *map(str, config.invocation_params.args)]),
    )
