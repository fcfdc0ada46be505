"""The process that runs one system: `main()`, with the number of threads as its argument.

It reads requests from standard input and answers on standard output, one JSON object a line;
`{"error": ...}` where a request failed, after which the next one is welcome. What libraries print
goes to standard error. The end of the input ends it, so it never outlives its parent by more than
the request it is busy with.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pynar.evaluation.benchmark.engines import Engine, Ids, export, load_engine
from pynar.evaluation.benchmark.systems import System
from pynar.evaluation.environment import matmul_rate, read_bandwidth
from pynar.strict import from_dict
from pynar.symbols import NUM_SPECIAL

__all__ = ["Session", "main"]

# A repetition of a cell of a given length runs at least so many sentences.
FORCED_SENTENCES = 5
# `Translator.decode` cuts its lines here, too.
MAX_SOURCE = 200


class Session:
    """A loaded system and the text it is measured on."""

    def __init__(self, request: dict[str, Any], threads: int) -> None:
        started = time.perf_counter()
        self.base_bytes = peak_bytes("cpu")
        self.system = from_dict(System, request["system"])
        limit = request.get("memory_limit")
        if limit is not None and self.system.device == "cpu":
            # So that a batch too large is an error in this process, not the end of another.
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        self.engine: Engine = load_engine(self.system, threads, request.get("exported"))
        self.lines: list[str] = request.get("lines", [])
        self.config = self.system.config
        self.load_seconds = time.perf_counter() - started
        self._prepared: tuple[dict, list[tuple[list[int], Any]]] = ({}, [])

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": self.engine.parameters,
            "base_bytes": self.base_bytes,
            "load_seconds": self.load_seconds,
        }

    def run(
        self,
        cell: dict[str, Any],
        *,
        sentences: int | None = None,
        seconds: float | None = None,
        outputs: bool = False,
    ) -> dict[str, Any]:
        """Runs a cell's batches once: all, or until so many sentences or seconds have passed.

        A cell has a `kind` (text, model or length), a `batch` size, and the number of `lines` it
        takes of the text, or the `length` of its random sentences.
        """
        reset_peak(self.system.device)
        text = cell["kind"] == "text"
        decode = self.engine.translate if text else self.engine.generate
        begin = time.perf_counter()
        batches = self._text(cell) if text else self._ids(cell)
        # Sorting is part of the way from text to text; a ready batch is where the other begins.
        lost = time.perf_counter() - begin if text else 0.0
        times: list[float] = []
        passes: list[int | None] = []
        written: dict[int, Any] = {}
        for places, batch in batches:
            begin = time.perf_counter()
            results, own = decode(batch)
            times.append(time.perf_counter() - begin + lost)
            lost = 0.0
            passes += own
            written.update(zip(places, results, strict=True))
            if sentences is not None and len(written) >= sentences:
                break
            if seconds is not None and sum(times) > seconds:
                break
        known = [count for count in passes if count is not None]
        in_order = [written[place] for place in sorted(written)]
        return {
            "seconds": times,
            "batches": len(batches),
            "sentences": len(written),
            "tokens": self._tokens(in_order),
            "passes": sum(known) / len(known) if len(known) == len(passes) else None,
            "peak_bytes": self._peak(),
            "texts": in_order if outputs and text else None,
        }

    def _text(self, cell: dict[str, Any]) -> list[tuple[list[int], list[str]]]:
        lines = [self.lines[place] for place in sample(len(self.lines), cell["lines"])]
        order = longest_first(list(map(len, lines))) if cell["batch"] > 1 else range(len(lines))
        return [(own, [lines[i] for i in own]) for own in chunks(order, cell["batch"])]

    def _ids(self, cell: dict[str, Any]) -> list[tuple[list[int], Any]]:
        if self._prepared[0] != cell:
            self._prepared = (cell, [])  # the old ones' memory first
            length = cell["length"] if cell["kind"] == "length" else None
            sources = self._sentences(cell) if length is None else self._random(cell)
            order = longest_first(list(map(len, sources)))
            self._prepared[1].extend(
                (own, self.engine.prepare([sources[i] for i in own], length))
                for own in chunks(order, cell["batch"])
            )
        return self._prepared[1]

    def _sentences(self, cell: dict[str, Any]) -> Ids:
        lines = [self.lines[place] for place in sample(len(self.lines), cell["lines"])]
        most = min(MAX_SOURCE, (self.engine.longest or MAX_SOURCE + 1) - 1)
        return [ids[:most] for ids in self.engine.tokenizer.encode_source(lines)]

    def _random(self, cell: dict[str, Any]) -> Ids:
        length, longest = cell["length"], self.engine.longest
        if longest is not None and length + 1 > longest:
            raise ValueError(f"the model has positions for {longest} tokens, not {length} and EOS")
        rows = -(-FORCED_SENTENCES // cell["batch"]) * cell["batch"]
        draw = np.random.default_rng((cell["seed"], length))
        return draw.integers(NUM_SPECIAL, self.config.source_vocabulary, (rows, length)).tolist()

    def _tokens(self, written: list[Any]) -> int:
        # Text is counted as the tokenizer cuts it, for every engine alike.
        if written and isinstance(written[0], str):
            written = self.engine.tokenizer.encode_target(written)
        return sum(map(len, written))

    def _peak(self) -> int | None:
        # Other engines do not allocate through torch.
        on_gpu = self.system.device != "cpu" and self.system.engine != "pynar"
        return None if on_gpu else peak_bytes(self.system.device)


def sample(total: int, count: int) -> list[int]:
    """The places of `count` lines out of `total`, evenly spread; all, if there are not more."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def longest_first(sizes: Sequence[int]) -> list[int]:
    """The order in which batches are filled: what needs most memory comes first."""
    return sorted(range(len(sizes)), key=lambda place: -sizes[place])


def chunks(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def reset_peak(device: str) -> None:
    """Lets the peak of memory begin anew, where the system can."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # no such file on this system: the peak is the process' own from here on


def peak_bytes(device: str) -> int:
    """The most memory in use since `reset_peak`: resident on the CPU, allocated on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ceilings(device: str) -> dict[str, float]:
    """What the machine can do with this process' threads, in bytes and operations a second."""
    where = torch.device(device)
    return {
        "read_bytes_per_second": read_bandwidth(where, 1 << 28),
        "fp32_matmul_flops": matmul_rate(where, torch.float32),
        "bf16_matmul_flops": matmul_rate(where, torch.bfloat16),
    }


class Server:
    """Answers requests, by their `do`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.session: Session | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        action = request.pop("do")
        if action == "load":
            self.session = Session(request, self.threads)
            return self.session.facts()
        if action == "export":
            export(from_dict(System, request["system"]), request["directory"])
            return {}
        if action == "ceilings":
            return dict(ceilings(request["device"]))
        if action != "run" or self.session is None:
            raise ValueError(f"cannot {action!r} here")
        return self.session.run(**request)


def main() -> None:
    threads = int(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        # One core is one core, also for a library that counts processors.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    # Nothing that a library prints may end up among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = Server(threads)
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:  # whatever it is, it is this cell's failure and is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
