"""The benchmark harness: a case is data, and is timed only after its result was checked.

One group for each (operator, shape, dtype, device, direction); in it our kernel, the PyTorch
reference, torch.compile of the reference and the best peer. `python -m bench.report FILE.json`
turns the output of `--benchmark-json FILE.json` into ratios and bandwidths.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pynar import _backend
from pynar.evaluation.environment import CudaClock, commit, read_bandwidth
from pynar.testing import Tolerance, tolerance

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
    flops: int = 0  # of matrix products, two for each product of numbers
    # For results that implementations round in different places, and whether whole numbers, such as
    # the argmax, may differ by that.
    limits: Tolerance | None = field(default=None, kw_only=True)
    exact_integers: bool = field(default=True, kw_only=True)
    # Whether a user would replay the call from a captured graph.
    graph: bool = field(default=True, kw_only=True)

    @property
    def group(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator} {self.shape} {dtype} {self.device.type} {self.direction}"


FORMATS = (torch.float32, torch.bfloat16, torch.int8)  # as csrc/linear/panel.h numbers them


def measure_flop_ceiling(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measures the rate, in operations a second, of matrix products in `dtype`.

    On the CPU what the multiply-adds of the instruction set reach on operands in the innermost
    cache, on as many threads; on a GPU torch's product of two large matrices. None where neither
    can be had.
    """
    if device.type == "cuda":
        size = 8192
        matrix = torch.randn(size, size, device=device).to(dtype)
        clock = CudaClock()
        times = []
        for _ in range(20):
            begin = clock()
            torch.mm(matrix, matrix)
            times.append(clock() - begin)
        return 2 * size**3 / statistics.median(times)
    extension = _backend.extension()
    if extension is None or dtype not in FORMATS:
        return None
    rates = []
    end = time.perf_counter() + 0.25
    while time.perf_counter() < end:
        begin = time.perf_counter()
        # For half a millisecond, beside which it is nothing to wake the threads.
        operations = extension.multiply_in_cache(FORMATS.index(dtype), 4000)
        rates.append(operations / (time.perf_counter() - begin))
    # Other work on the machine can only lower it.
    return max(rates)


def _assert_agrees(got: Any, want: Any, case: Case) -> None:
    got = got if isinstance(got, tuple) else (got,)
    want = want if isinstance(want, tuple) else (want,)
    for g, w in zip(got, want, strict=True):
        if w.is_floating_point():
            close = case.limits or tolerance(w.device, w.dtype)
            torch.testing.assert_close(g, w, **close, equal_nan=True)
        elif case.exact_integers:
            torch.testing.assert_close(g, w, rtol=0, atol=0)


def _capture(function: Function, arguments: tuple[Tensor, ...]) -> Function:
    # Libraries choose and load their kernels in the first call.
    function(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*arguments)
    return graph.replay


def _ready(function: Function, case: Case) -> Function:
    """The call that is timed, without arguments."""
    if case.device.type == "cuda" and case.graph:
        return _capture(function, case.arguments)
    return lambda: function(*case.arguments)


def _in_turns(function: Function, other: Function, device: torch.device) -> dict[str, Any]:
    """How many times as fast `function` is, calls taking turns: median and quartiles of pairs.

    The speed of a shared machine drifts between one group of calls and the next by more than many
    a difference that is asked for.
    """
    clock = CudaClock() if device.type == "cuda" else time.perf_counter

    def time_of(function: Function, calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            function()
        return (clock() - begin) / calls

    calls = max(1, int(2e-3 / time_of(function, 3)))
    ratios: list[float] = []
    begin = time.perf_counter()
    # Of calls that take seconds there are fewer.
    while (spent := time.perf_counter() - begin) < 2 or len(ratios) < (20 if spent < 60 else 5):
        # The better of two on each side: what interrupts one of them is no part of it.
        mine, others = time_of(function, calls), time_of(other, calls)
        mine, others = min(mine, time_of(function, calls)), min(others, time_of(other, calls))
        ratios.append(others / mine)
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": median, "low": low, "high": high, "pairs": len(ratios)}


@pytest.fixture
def run_case(benchmark: Any) -> Iterator[Callable[..., None]]:
    """Checks an implementation of a case against its reference, then times it.

    With `turns`, a name and a function, it is compared with that call by call, too.
    """

    def run(
        case: Case,
        implementation: str,
        function: Function,
        turns: tuple[str, Function] | None = None,
    ) -> None:
        with torch.no_grad():
            want = case.reference(*case.arguments)
            _assert_agrees(function(*case.arguments), want, case)
            benchmark.group = case.group
            benchmark.extra_info.update(
                implementation=implementation,
                operator=case.operator,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                device=case.device.type,
                direction=case.direction,
                bytes_moved=case.bytes_moved,
                flops=case.flops,
                threads=torch.get_num_threads(),
            )
            if case.device.type == "cuda":
                _time_cuda(benchmark, case, function)
            else:
                before = read_bandwidth(case.device, case.bytes_moved)
                benchmark(function, *case.arguments)
                after = read_bandwidth(case.device, case.bytes_moved)
                # Other work on the machine slows both; what it can do is the better of the two.
                benchmark.extra_info["ceiling"] = max(before, after)
            if turns is not None:
                name, other = turns
                found = _in_turns(_ready(function, case), _ready(other, case), case.device)
                benchmark.extra_info["in_turns"] = {"with": name, **found}
            if case.flops:
                benchmark.extra_info["flop_ceiling"] = measure_flop_ceiling(case.device, case.dtype)

    yield run


def _time_cuda(benchmark: Any, case: Case, function: Function) -> None:
    benchmark.extra_info["ceiling"] = read_bandwidth(case.device, case.bytes_moved)
    timed = _ready(function, case)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=case.device)
    clock = benchmark._timer = CudaClock()

    def cool() -> None:
        flush.zero_()
        torch.cuda.synchronize()

    begin = clock()
    timed()
    # Two seconds of whole updates are enough.
    rounds = min(100, max(10, int(2 / (clock() - begin))))
    benchmark.pedantic(timed, setup=cool, rounds=rounds, warmup_rounds=5)


def peak_bytes(device: torch.device, function: Callable[[], Any]) -> int:
    """Returns the most that was allocated at a time while the function ran."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


def compiled(function: Function) -> Function:
    """torch.compile of a reference, for one set of shapes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def device_or_skip(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


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
        commit=commit("csrc", "pynar/ops", "pynar/reference", "bench"),
        command=" ".join(["pytest", *map(str, config.invocation_params.args)]),
    )
