"""`pynar bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pynar.cli.decoding import parse_model
from pynar.cli.plots import plot_decode_quality, plot_latency_length
from pynar.data import read_lines
from pynar.data.atomic import written
from pynar.data.tokenizer import cpu_count
from pynar.evaluation.benchmark import Plan, System, benchmark, expand
from pynar.evaluation.benchmark.systems import FREEZES
from pynar.evaluation.benchmark.tables import markdown, tables
from pynar.evaluation.benchmark.worker import sample
from pynar.evaluation.environment import busy, environment

# What is measured unless the arguments say otherwise, and what --quick takes instead: enough to
# see that it works, not for publication.
_FULL: dict[str, Any] = {
    "batch": [1, 8, 32, 128, "max"],
    "threads": [1, "all"],
    "lengths": [10, 30, 60, 120],
    "sentences": 0,
    "repetitions": 5,
    "latency_sentences": 100,
}
_QUICK: dict[str, Any] = {
    "batch": [1, 32],
    "threads": ["all"],
    "lengths": [10, 60],
    "sentences": 200,
    "repetitions": 3,
    "latency_sentences": 50,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    summary = "quality and speed of decoding, systems taking turns in processes of their own"
    decode = benchmarks.add_parser(
        "decode",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_systems(decode)
    _add_plan(decode)
    decode.add_argument("--output", default="runs/bench-decode", help="directory for all results")
    decode.add_argument(
        "--redraw",
        metavar="FILE",
        help="measure nothing; make table and plots of this results.json again",
    )


def _add_systems(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="DIR[:OPTION=VALUE,...]",
        help="checkpoints, e.g. runs/cmlm/best:iterations=4; an autoregressive one stands there "
        "with greedy search and with a beam of 5, in every engine; strategy=NAME and rescorer=DIR "
        "are options, too",
    )
    parser.add_argument(
        "--random",
        nargs="+",
        default=[],
        metavar="RECIPE[:OPTION=VALUE,...]",
        help="recipes, timed with random weights on random sentences; options with a dot change "
        "the recipe, e.g. ar_base:model.decoder_layers=1",
    )
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of random models")
    parser.add_argument("--source", help="text to translate, plain or gzipped")
    parser.add_argument("--reference", nargs="+", default=[], help="one file a reference")
    parser.add_argument(
        "--freeze",
        nargs="+",
        default=["fp32"],
        choices=("none", *FREEZES),
        help="how PyNAR's models, and their rescorers, are frozen for inference; none leaves them "
        "as they were trained, to compare",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=None,
        metavar="ENGINE[:TYPE[:workers]]",
        help="beside PyNAR, for autoregressive models; workers has a worker for each thread that "
        "take parts of a batch, instead of one with all threads; ctranslate2:float32 and "
        "ctranslate2:int8, both ways, if not given and if it is installed; none for PyNAR alone",
    )
    parser.add_argument("--device", default="cpu")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    def add(name: str, help: str, **form: Any) -> None:
        key = name.replace("-", "_")
        default = _words(_FULL[key])
        help = f"{help} (default: {default}; with --quick: {_words(_QUICK[key])})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="N", help=help, **form)

    add(
        "batch",
        "sentences a batch; max doubles the largest until memory, --time-limit or the text ends",
        nargs="+",
        type=_number_or("max"),
    )
    add("threads", "processors that a system may use", nargs="+", type=_number_or("all"))
    add("lengths", "sub-words of random sentences, in and out", nargs="*", type=int)
    add("sentences", "how many of the text, evenly spread; 0 takes all", type=int)
    add("repetitions", "of every measurement", type=int)
    add("latency-sentences", "sentences at batch 1, evenly spread", type=int)
    parser.add_argument(
        "--length-batch",
        nargs="+",
        type=_number_or("max"),
        metavar="N",
        help="sentences a batch for --lengths; 1 if not given with --source, else as --batch",
    )
    parser.add_argument(
        "--time-limit", type=float, default=60.0, help="seconds; a longer repetition is refused"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and sentences")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smaller defaults, to see that it works; not for publication",
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number_or(word: str) -> Any:
    def convert(text: str) -> int | str:
        if text == word:
            return text
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a positive number or {word}, got {text!r}")
        return int(text)

    return convert


def run(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if options.redraw is not None:
        result = json.loads(Path(options.redraw).read_text(encoding="utf-8"))
    else:
        result = _measure(options)
    output.mkdir(parents=True, exist_ok=True)
    if options.redraw is None:
        text = json.dumps(result, indent=1) + "\n"
        with written(output / "results.json") as stream:
            stream.write(text)
    (output / "table.md").write_text(markdown(result), encoding="utf-8")
    drawn = [
        draw(output / name, result)
        for draw, name in (
            (plot_decode_quality, "quality_latency.png"),
            (plot_latency_length, "latency_length.png"),
        )
    ]
    _print(result)
    print(f"written: {output}/results.json, table.md" + "".join(f", {d.name}" for d in drawn if d))
    if not result["complete"]:
        raise KeyboardInterrupt


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    for name, value in (_QUICK if options.quick else _FULL).items():
        setattr(options, name, getattr(options, name, value))
    if not options.model and not options.random:
        raise ValueError("give --model checkpoints or --random recipes")
    if options.reference and options.source is None:
        raise ValueError("--reference needs --source, the text to translate")
    lines, references = _text(options)
    length_batches = options.length_batch or ([1] if lines else options.batch)
    plan = Plan(
        threads=tuple(dict.fromkeys(cpu_count() if t == "all" else t for t in options.threads)),
        batches=tuple(options.batch),
        lengths=tuple(options.lengths),
        length_batches=tuple(length_batches),
        repetitions=options.repetitions,
        latency_sentences=options.latency_sentences,
        time_limit=options.time_limit,
        seed=options.seed,
    )
    systems = expand(
        [_system(text, options, False) for text in options.model]
        + [_system(text, options, True) for text in options.random],
        freezes=[None if freeze == "none" else freeze for freeze in options.freeze],
        engines=_engines(options),
    )
    begin = time.perf_counter()

    def tell(message: str) -> None:
        print(f"[{time.perf_counter() - begin:6.0f} s] {message}", flush=True)

    if warning := busy(environment()):
        tell(f"warning: {warning}")

    # Whoever is ended from outside keeps what was measured, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return benchmark(systems, plan, lines=lines, references=references, tell=tell)


def _text(options: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    if options.source is None:
        return [], []
    streams = [read_lines(path) for path in (options.source, *options.reference)]
    for path, stream in zip(options.reference, streams[1:], strict=True):
        if len(stream) != len(streams[0]):
            raise ValueError(
                f"--reference {path}: expected as many lines as the source ({len(streams[0])}), "
                f"got {len(stream)}"
            )
    if not streams[0]:
        raise ValueError(f"--source {options.source}: expected lines, got none")
    if options.sentences:
        places = sample(len(streams[0]), options.sentences)
        streams = [[stream[i] for i in places] for stream in streams]
    return streams[0], streams[1:]


def _system(text: str, options: argparse.Namespace, random: bool) -> System:
    model, given = parse_model(text)
    changes = [f"{key}={json.dumps(value)}" for key, value in given.items() if "." in key]
    if changes and not random:
        raise ValueError(f"--model {text}: only a --random recipe can be changed ({changes[0]})")
    system = System(
        model=model,
        random=random,
        changes=changes,
        vocabulary=options.vocabulary,
        seed=options.seed,
        device=options.device,
    )
    chosen = {key: value for key, value in given.items() if "." not in key}
    own = {name: chosen.pop(name, None) for name in ("strategy", "rescorer")}
    return replace(system, **own, options=chosen)


def _engines(options: argparse.Namespace) -> list[str]:
    if options.engines is None:
        found = importlib.util.find_spec("ctranslate2") is not None
        kinds = ("float32", "int8")
        return [f"ctranslate2:{k}{w}" for k in kinds for w in ("", ":workers")] if found else []
    return [engine for engine in options.engines if engine != "none"]


def _print(result: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    for table in tables(result):
        shown = Table(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            # Brackets of an interval are no markup.
            shown.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(shown)
        for number, note in enumerate(table.notes, 1):
            console.print(f"({number}) {note}", markup=False)
    for warning in result.get("warnings", []):
        console.print(f"warning: {warning}", markup=False)
