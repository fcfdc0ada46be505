"""Measures systems in turns: A B C A B C ..., one at a time, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pynar.evaluation.benchmark.client import Worker, WorkerError, available_memory
from pynar.evaluation.benchmark.rows import Row, Scores, buckets, compare_rows
from pynar.evaluation.benchmark.systems import System
from pynar.evaluation.benchmark.worker import sample
from pynar.evaluation.environment import environment

__all__ = ["Plan", "benchmark"]

Cell = dict[str, Any]
# Nobody decodes more sentences of one length at a time.
_MOST_SENTENCES = 1 << 14
_LOAD_TIMEOUT = 600.0
# For so long the threads of Intel's OpenMP, which CTranslate2 brings along, keep processors busy
# after their work is done; whoever's turn is next is not to pay for it.
_SPIN = 0.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how often."""

    threads: tuple[int, ...]
    batches: tuple[int | str, ...] = (1, 8, 32, 128, "max")
    lengths: tuple[int, ...] = (10, 30, 60, 120)
    length_batches: tuple[int | str, ...] = (1,)
    repetitions: int = 5
    latency_sentences: int = 100
    warmup_sentences: int = 50
    warmup_seconds: float = 10.0
    time_limit: float = 60.0  # seconds that a repetition may take
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("repetitions", "latency_sentences", "warmup_sentences"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be positive, got {value}")
        for name in ("warmup_seconds", "time_limit"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")
        for name in ("threads", "batches", "lengths", "length_batches"):
            for value in getattr(self, name):
                if value != "max" and not (isinstance(value, int) and value > 0):
                    raise ValueError(f"`{name}` must be positive numbers, got {value!r}")

    def cells(self, lines: int) -> Iterator[Cell]:
        """Every (kind, batch, length) of one number of threads."""
        for batch in self.batches if lines else ():
            for kind in ("text", "model"):
                taken = min(lines, self.latency_sentences) if batch == 1 else lines
                yield {"kind": kind, "batch": batch, "lines": taken}
        for batch in self.length_batches:
            for length in self.lengths:
                yield {"kind": "length", "batch": batch, "length": length, "seed": self.seed}

    def largest_given(self, kind: str) -> int:
        """The batch from which doubling begins."""
        batches = self.length_batches if kind == "length" else self.batches
        return max((batch for batch in batches if isinstance(batch, int)), default=1)


class Member:
    """A system at one number of threads, and its worker while it lives."""

    def __init__(self, system: System, threads: int, plan: Plan, lines: list[str]) -> None:
        self.system, self.threads, self.plan = system, threads, plan
        self.lines = [] if system.random else lines
        self.exported: str | None = None
        self.facts: dict[str, Any] = {}
        self.broken: str | None = None  # why it cannot even be loaded
        self._worker: Worker | None = None

    def load(self) -> None:
        """Starts the worker, anew if the last one died; what fails here fails for good."""
        if self.broken is not None:
            raise WorkerError(self.broken)
        if self._worker is not None:
            return
        memory = available_memory()
        request = {
            "do": "load",
            "system": asdict(self.system),
            "lines": self.lines,
            "exported": self.exported,
            "memory_limit": None if memory is None else memory * 8 // 10,
        }
        self._worker = Worker(self.threads)
        try:
            self.facts = self._worker.ask(request, _LOAD_TIMEOUT)
        except WorkerError as error:
            self.broken = str(error)
            self.close()
            raise

    def run(self, cell: Cell, **request: Any) -> dict[str, Any]:
        self.load()
        worker = self._worker
        if worker is None:
            raise WorkerError("the worker was ended")
        # Its estimate was within the limit: far beyond it, it hangs.
        timeout = 60 + 5 * (self.plan.time_limit + self.plan.warmup_seconds)
        try:
            answer = worker.ask({"do": "run", "cell": cell, **request}, timeout)
            if self.threads > 1 and self.system.engine != "pynar":
                time.sleep(_SPIN)
            return answer
        except WorkerError as error:
            if error.dead:
                self.close()
            raise

    def warm_up(self, cell: Cell) -> None:
        """Runs until the plan's warm-up is over; refuses a cell that would take too long."""
        plan = self.plan
        limits = {"sentences": plan.warmup_sentences, "seconds": plan.warmup_seconds}
        answer = self.run(cell, **limits)
        # Upwards rather than not: the longest sentences are in the first batches.
        expected = sum(answer["seconds"]) / len(answer["seconds"]) * answer["batches"]
        if expected > plan.time_limit:
            raise WorkerError(
                f"a repetition would take up to {expected:.0f} s, more than the time limit of "
                f"{plan.time_limit:.0f} s"
            )

    def largest(self, cell: Cell) -> tuple[int, str]:
        """The largest batch that fits, by doubling, and what forbids a larger one."""
        most = cell.get("lines", _MOST_SENTENCES)
        found = min(self.plan.largest_given(cell["kind"]), most)
        while found < most:
            trial = min(2 * found, most)
            try:
                answer = self.run({**cell, "batch": trial}, sentences=1)
            except WorkerError as error:
                if self.broken is not None:
                    raise
                return found, f"a batch of {trial}: {error}"
            seconds = answer["seconds"][0]
            if seconds > self.plan.time_limit:
                return found, f"a batch of {trial} took {seconds:.0f} s"
            found = trial
        return found, f"there are no more than {most} sentences"

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def benchmark(
    systems: Sequence[System],
    plan: Plan,
    *,
    lines: Sequence[str] = (),
    references: Sequence[Sequence[str]] = (),
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measures all `systems` on `lines`, and on random sentences of the plan's lengths.

    Random models take part in the latter only. `warnings` tell of systems that some cells have no
    place for, and of a missing baseline. A system that fails in a cell has a row there that says
    why. Ctrl-C ends the measurement early: `complete` is then false.
    """
    for stream in references:
        if len(stream) != len(lines):
            raise ValueError(
                f"a reference must have as many lines as the source ({len(lines)}), "
                f"got {len(stream)}"
            )
    if not systems:
        raise ValueError("the benchmark needs at least one system, got none")
    result: dict[str, Any] = {
        "format": 1,
        "complete": True,
        "environment": environment(),
        "plan": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(plan).items()},
        "systems": [{"name": s.name, "engine": s.engine_name, **asdict(s)} for s in systems],
        "device": systems[0].device,
        "lines": len(lines),
        "warnings": _warnings(systems, plan, len(lines)),
        "ceilings": {},
    }
    for warning in result["warnings"]:
        tell(f"warning: {warning}")
    rows: list[Row] = []
    scores = Scores(references, lines)
    device = systems[0].device
    with tempfile.TemporaryDirectory(prefix="pynar-bench-") as place:
        try:
            exported = _Exports(Path(place))
            for threads in plan.threads:
                tell(f"threads {threads}: ceilings")
                with Worker(threads) as worker:
                    request = {"do": "ceilings", "device": device}
                    result["ceilings"][str(threads)] = worker.ask(request, _LOAD_TIMEOUT)
                with ExitStack() as stack:
                    # With one thread there is nothing to share out among workers.
                    taken = [s for s in systems if threads > 1 or not s.workers]
                    members = [Member(system, threads, plan, list(lines)) for system in taken]
                    for member in members:
                        stack.callback(member.close)
                        name = f"{member.system.name}, {member.system.engine_name}"
                        tell(f"threads {threads}: loading {name}")
                        _load(member, exported)
                    for cell in plan.cells(len(lines)):
                        tell(f"threads {threads}: {_describe(cell)}")
                        rows += _measure(cell, members, scores, plan, lines)
        except KeyboardInterrupt:
            result["complete"] = False
    if references:
        scores.score()
    result["rows"] = [row.json() for row in rows]
    return result


def _warnings(systems: Sequence[System], plan: Plan, lines: int) -> list[str]:
    """What a reader of the tables would look for in vain, and why."""
    left_out: dict[tuple[str, str], list[str]] = {}
    for kind in dict.fromkeys(cell["kind"] for cell in plan.cells(lines)):
        how = "from ids to ids" if kind == "model" else "with given lengths"
        for system in systems:
            reason = system.left_out(kind)
            if reason is not None and _has_input(system, kind):
                ways = left_out.setdefault((system.name, reason), [])
                # Engines of one model share its name.
                ways += [how] if how not in ways else []
    found = [
        f"{name} is not measured {' or '.join(ways)}: {reason}"
        for (name, reason), ways in left_out.items()
    ]
    for random, group, example in (
        (False, "checkpoints", "--model runs/ar/best"),
        (True, "random models", "--random ar_base ar_12-1"),
    ):
        own = [system for system in systems if system.random == random]
        if own and not any(system.greedy for system in own):
            found.append(
                f"no strong baseline among the {group}, so no speed-up of theirs is shown; add "
                f"greedy search of an autoregressive model, e.g. {example}"
            )
    return found


def _has_input(system: System, kind: str) -> bool:
    # A random model has no tokenizer.
    return kind == "length" or not system.random


class _Exports:
    """Models in other engines' formats, written once, by a process that then goes away."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._done: dict[str, str] = {}

    def of(self, system: System) -> str:
        plain = replace(
            system, strategy=None, options={}, engine="pynar", freeze=None, workers=False
        )
        key = repr(replace(plain, compute_type="float32"))
        if key not in self._done:
            directory = str(self._place / str(len(self._done)))
            with Worker(1) as worker:
                request = {"do": "export", "system": asdict(system), "directory": directory}
                worker.ask(request, _LOAD_TIMEOUT)
            self._done[key] = directory
        return self._done[key]


def _load(member: Member, exported: _Exports) -> None:
    try:
        if member.system.engine != "pynar":
            member.exported = exported.of(member.system)
        member.load()
    except WorkerError as error:
        member.broken = str(error)


def _measure(
    cell: Cell, members: Sequence[Member], scores: Scores, plan: Plan, lines: Sequence[str]
) -> list[Row]:
    """The rows of one cell: all are warmed up, then they take turns, repetition by repetition."""
    kind = cell["kind"]
    taking_part = [
        member
        for member in members
        if _has_input(member.system, kind) and member.system.left_out(kind) is None
    ]
    entries = [_Entry(member, cell, plan) for member in taking_part]
    for entry in entries:
        entry.attempt(entry.prepare)
    for _ in range(plan.repetitions):
        for entry in entries:
            entry.attempt(entry.repeat)
    for entry in entries:
        entry.finish(scores, lines)
    rows = [entry.row for entry in entries]
    compare_rows(rows)
    return rows


class _Entry:
    """One system's way through one cell."""

    def __init__(self, member: Member, cell: Cell, plan: Plan) -> None:
        self.member, self.cell, self.plan = member, cell, plan
        self.row = Row.of(member.system, member.threads, cell, cell["batch"])
        self.answers: list[dict[str, Any]] = []
        self.texts: list[str] | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Does it, unless something has failed before."""
        if self.row.failure is None:
            try:
                action()
            except WorkerError as error:
                self.row.failure = str(error)

    def prepare(self) -> None:
        if self.cell["batch"] == "max":
            size, self.row.batch_limit = self.member.largest(self.cell)
            self._warm_up_largest(size)
        else:
            self.row.batch_sentences = self.cell["batch"]
            self.member.warm_up(self.cell)

    def _warm_up_largest(self, size: int) -> None:
        """Halves a batch that was possible once, but takes too long for a whole repetition."""
        while True:
            self.cell = {**self.cell, "batch": size}
            self.row.batch_sentences = size
            try:
                self.member.warm_up(self.cell)
            except WorkerError as error:
                if size <= self.plan.largest_given(self.cell["kind"]):
                    raise
                self.row.batch_limit = f"a batch of {size}: {error}"
                size //= 2
            else:
                return

    def repeat(self) -> None:
        # The lines of one repetition suffice: all are the same.
        answer = self.member.run(self.cell, outputs=not self.answers)
        texts = answer.pop("texts")
        self.texts = self.texts if texts is None else texts
        self.answers.append(answer)

    def finish(self, scores: Scores, lines: Sequence[str]) -> None:
        if self.row.failure is None:
            self.row.fill(self.member.system, self.member.facts, self.answers)
            if self.row.kind == "text" and self.row.batch == 1:
                taken = sample(len(lines), self.cell["lines"])
                self.row.buckets = buckets([len(lines[i].split()) for i in taken], self.answers)
        if self.row.kind != "length":
            scores.add(self.row, self.texts)


def _describe(cell: Cell) -> str:
    what = {"text": "text to text", "model": "ids to ids"}.get(cell["kind"])
    return f"{what or 'length {}'.format(cell['length'])}, batch {cell['batch']}"
