"""`pynar quickstart`: the whole journey on a corpus that PyNAR generates, in minutes on a CPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sacrebleu.metrics import BLEU

import pynar
from pynar.cli.plots import plot_quality_latency
from pynar.data import prepare
from pynar.data.atomic import written
from pynar.data.normalisation import Example, corpus, exact_match
from pynar.decoding import (
    BeamSearch,
    DraftAndVerify,
    Greedy,
    ImportanceWeighted,
    LatentArgmax,
    LineTranslator,
    MaskPredict,
    NoisyParallel,
    RescoringTranslator,
    Strategy,
)
from pynar.evaluation import machine, measure_speed
from pynar.evaluation.metrics import repetition
from pynar.recipes import load_recipe

SIZES = {"train": 25000, "valid": 500, "test": 500}
STUDENTS = (
    ("janus", "raw"),
    ("cmlm", "distilled"),
    ("cmlm", "raw"),
    ("nat", "raw"),
    ("flowseq", "distilled"),
    ("nat", "distilled"),
)
SEED = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. `speedup` is latency against the teacher's greedy search."""

    system: str
    data: str
    passes: float
    exact_match: float
    bleu: float
    repetition: float
    ms_per_sentence: float
    sentences_per_second: float
    speedup: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/quickstart", help="directory for everything")
    parser.add_argument(
        "--updates", type=float, default=1.0, help="scale all training, e.g. 0.1 for a quick look"
    )
    parser.add_argument("--seed", type=int, default=SEED)


def run(options: argparse.Namespace) -> None:
    if options.updates <= 0:
        raise ValueError(f"--updates must be positive, got {options.updates}")
    start = time.perf_counter()
    output = Path(options.output)
    _claim(output, {"updates": options.updates, "seed": options.seed, **SIZES})
    console = Console()
    train, valid, test = corpus(*SIZES.values(), seed=options.seed)

    _title(console, start, "1. Text: English sentences with figures, to be read aloud")
    for example in train[:3]:
        print(f"  {example.source}\n    {' | '.join(sorted(example.readings))}")
    _prepare(output, train, valid)

    _title(console, start, "2. Training: a teacher, its distilled text, and six students")
    _train_all(options, output)

    _title(console, start, "3. Quality and speed, side by side on the test sentences")
    rows = _measure(output, test)
    _print_table(console, rows)
    _print_passes(output, test)
    results = [dataclasses.asdict(row) for row in rows]
    with written(output / "results.json") as stream:
        stream.write(json.dumps(results, indent=1) + "\n")
    plot_quality_latency(output / "quality_latency.png", rows, machine())
    print(f"\n{machine()}; finished after {time.perf_counter() - start:.0f} s")
    print(f"{output}/results.json, {output}/quality_latency.png, and a model in every folder: try")
    print(f"  echo 'Tea is at 4:15 on 7 May.' | pynar translate {output}/cmlm-distilled/best")


def _claim(output: Path, settings: dict[str, float]) -> None:
    """Takes the directory for these settings; a run that was interrupted goes on there."""
    path = output / "quickstart.json"
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise ValueError(
                f"{output} holds a quickstart with other settings; remove it, or choose another "
                "--output"
            )
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; remove it, or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    with written(path) as stream:
        json.dump(settings, stream)


def _title(console: Console, start: float, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]  ({time.perf_counter() - start:.0f} s)", highlight=False)


def _prepare(output: Path, train: Sequence[Example], valid: Sequence[Example]) -> None:
    if (output / "data-raw").exists():
        return
    text = output / "text"
    text.mkdir(exist_ok=True)
    for split, examples in (("train", train), ("valid", valid)):
        for side in ("source", "target"):
            lines = "".join(getattr(example, side) + "\n" for example in examples)
            (text / f"{split}.{side}").write_text(lines, encoding="utf-8")
    paths = {split: (text / f"{split}.source", text / f"{split}.target") for split in SIZES}
    prepare(
        output / "data-raw",
        train=paths["train"],
        valid=paths["valid"],
        vocab_size=1200,
        model_type="bpe",
        split_digits=True,
    )


def _train_all(options: argparse.Namespace, output: Path) -> None:
    """Trains the teacher on all cores, then runs the other steps in processes side by side.

    Small models gain little from a second thread, so two processes are faster than one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    raw, distilled, teacher = output / "data-raw", output / "data-distilled", output / "teacher"
    _run_process("teacher", _training(options, "ar", raw, teacher), threads=cores)

    workers = min(3, cores)
    done: dict[str, Future[None]] = {}

    def student(family: str, kind: str, data: Path) -> None:
        # Steps begin in the order of submission, so the distillation has begun.
        if kind == "distilled":
            done["distillation"].result()
        begin = teacher
        if family == "flowseq":
            # Its decoder has to fill in whole sentences, which a CMLM's has learned.
            done["cmlm-distilled"].result()
            begin = output / "cmlm-distilled"
        name = f"{family}-{kind}"
        command = _training(options, family, data, output / name)
        command += ["--init-from", f"{begin}/best"]
        _run_process(name, command, threads=cores // workers)

    def distillation() -> None:
        if not distilled.exists():
            command = ["distill", "--teacher", f"{teacher}/best", "--data", str(raw), "--beam", "5"]
            command += ["--output", str(distilled)]
            _run_process("distillation", command, threads=cores // workers)

    with ThreadPoolExecutor(workers) as pool:
        done["distillation"] = pool.submit(distillation)
        # The longest first, that no core is idle in the end, and what others begin with.
        for family, kind in STUDENTS:
            data = {"raw": raw, "distilled": distilled}[kind]
            done[f"{family}-{kind}"] = pool.submit(student, family, kind, data)
    for step in done.values():
        step.result()


def _training(options: argparse.Namespace, family: str, data: Path, output: Path) -> list[str]:
    recipe = f"quickstart_{family}"
    changes = {"seed": options.seed}
    if options.updates != 1:
        training = load_recipe(recipe).training
        for key in ("max_updates", "warmup_updates", "validate_every", "checkpoint_every"):
            changes[key] = max(1, round(options.updates * training[key]))
    command = ["train", "--recipe", recipe, "--data", str(data), "--output", str(output)]
    for key, value in changes.items():
        command += ["--set", f"training.{key}={value}"]
    return command


def _run_process(name: str, command: list[str], *, threads: int) -> None:
    """Runs a `pynar` command and passes on its progress."""
    command = [sys.executable, "-m", "pynar.cli", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        last = line.rstrip() or last
        if line.startswith(("update", "done")):
            print(f"  {name}: {last}", flush=True)
    if process.wait():
        raise ValueError(f"{name} failed: {last}; to see it: {shlex.join(command)}")


def _systems(output: Path) -> list[tuple[str, str, LineTranslator, Strategy]]:
    """(system, data, model, strategy) of every row of the table."""
    teacher = pynar.load(output / "teacher" / "best", freeze="fp32")
    systems: list[tuple[str, str, LineTranslator, Strategy]] = [
        ("AR greedy", "raw", teacher, Greedy()),
        ("AR beam 5", "raw", teacher, BeamSearch(beam=5)),
    ]
    for kind in ("raw", "distilled"):
        nat, cmlm = (
            pynar.load(output / f"{name}-{kind}" / "best", freeze="fp32")
            for name in ("nat", "cmlm")
        )
        systems.append(("vanilla NAT", kind, nat, _parallel(1)))
        systems += [(f"CMLM {n}", kind, cmlm, _parallel(n)) for n in (1, 4, 10)]
    janus = pynar.load(output / "janus-raw" / "best", freeze="fp32")
    systems += [
        ("JANUS greedy", "raw", janus, Greedy()),
        ("JANUS draft and verify", "raw", janus, DraftAndVerify()),
        ("JANUS 4", "raw", janus, _parallel(4)),
    ]
    flowseq = pynar.load(output / "flowseq-distilled" / "best", freeze="fp32")
    # The paper's numbers of drafts, some lengths with samples of each.
    iwd = ImportanceWeighted(length_candidates=3, samples=5, temperature=1.0)
    npd = NoisyParallel(length_candidates=3, samples=10, temperature=1.0)
    systems += [
        ("FlowSeq", "distilled", flowseq, LatentArgmax()),
        ("FlowSeq IWD 15", "distilled", flowseq, iwd),
        ("FlowSeq NPD 30", "distilled", RescoringTranslator(flowseq, teacher), npd),
    ]
    return systems


def _parallel(iterations: int, *, trace: bool = False) -> MaskPredict:
    # The length is hard to guess here, where two readings seldom have as many words. The prior
    # was chosen on the validation sentences.
    return MaskPredict(iterations, length_candidates=3, length_prior=0.25, trace=trace)


def _measure(output: Path, test: Sequence[Example]) -> list[Row]:
    systems = _systems(output)
    sources = [example.source for example in test]
    bleu = BLEU(references=_references(test))
    # One turn of throughput each; `pynar evaluate` takes more.
    measured = measure_speed(
        [system[2:] for system in systems], sources, latency_sentences=50, repetitions=1
    )
    baseline = measured[0][0].p50_ms
    rows = []
    for (name, kind, _, _), (speed, results) in zip(systems, measured, strict=True):
        lines = [result.text for result in results]
        rows.append(
            Row(
                system=name,
                data=kind,
                passes=round(speed.passes, 1),
                exact_match=round(exact_match(lines, list(test)), 2),
                bleu=round(bleu.corpus_score(lines, None).score, 2),
                repetition=round(repetition(lines), 2),
                ms_per_sentence=round(speed.p50_ms, 2),
                sentences_per_second=round(speed.sentences_per_second, 1),
                speedup=round(baseline / speed.p50_ms, 2),
            )
        )
    return rows


def _references(test: Sequence[Example]) -> list[list[str]]:
    """Every valid reading is a reference; sentences with fewer repeat their last one."""
    readings = [sorted(example.readings) for example in test]
    most = max(map(len, readings))
    return [[own[min(i, len(own) - 1)] for own in readings] for i in range(most)]


def _print_table(console: Console, rows: Sequence[Row]) -> None:
    table = Table(
        "system",
        "trained on",
        "passes",
        "exact match %",
        "BLEU",
        "repeated %",
        "ms a sentence (batch 1)",
        "sentences/s (batches)",
        "speed-up (batch 1)",
    )
    for row in rows:
        table.add_row(
            row.system,
            row.data,
            f"{row.passes:.1f}",
            f"{row.exact_match:.1f}",
            f"{row.bleu:.1f}",
            f"{row.repetition:.2f}",
            f"{row.ms_per_sentence:.1f}",
            f"{row.sentences_per_second:.0f}",
            f"{row.speedup:.2f}x",
        )
    (console if console.is_terminal else Console(width=130)).print(table)
    print("speed-up: against the teacher's greedy search; exact match: any valid reading counts")


def _print_passes(output: Path, test: Sequence[Example]) -> None:
    """Shows what each pass of mask-predict fixed, where it fixed something."""
    student = pynar.load(output / "cmlm-distilled" / "best", freeze="fp32")
    strategy = _parallel(4, trace=True)
    results = student.decode([example.source for example in test[:100]], strategy)
    changing = [
        (example, result)
        for example, result in zip(test, results, strict=False)
        if len(set(result.trace)) > 1
    ]
    for example, result in changing[:3]:
        print(f"\n  {example.source}")
        before: list[str] = []
        for number, line in enumerate(result.trace, 1):
            pieces = line.split(" ")
            changed = [
                f"[{new}]" if before and old != new else new
                for old, new in zip(before or pieces, pieces, strict=True)
            ]
            print(f"    pass {number}: {' '.join(changed).replace('▁', '_')}")
            before = pieces
