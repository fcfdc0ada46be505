"""`pynar evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import pynar
from pynar.cli.decoding import add_freeze_argument, frozen, parse_model
from pynar.cli.plots import plot_quality_passes
from pynar.data import read_lines
from pynar.data.atomic import written
from pynar.decoding import LineTranslator, RescoringTranslator, Strategy, Translation, strategy
from pynar.evaluation import compare, diversity, evaluate, machine, measure_speed
from pynar.evaluation.benchmark.systems import describe
from pynar.evaluation.metrics import Quality


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", required=True, nargs="+", help="one file a reference")
    parser.add_argument(
        "--hypothesis", nargs="+", default=[], help="translations; the first is the baseline"
    )
    parser.add_argument("--source", help="file to translate with the models")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="DIR[:OPTION=VALUE,...]",
        help="checkpoints to translate with and to time, e.g. runs/cmlm/best:iterations=4; an "
        "autoregressive one is measured with greedy search and with beam search; "
        "strategy=NAME and rescorer=DIR are options, too",
    )
    parser.add_argument(
        "--diversity",
        action="store_true",
        help="also how much the systems' translations differ from each other, as samples of one",
    )
    parser.add_argument("--latency-sentences", type=int, default=100)
    parser.add_argument(
        "--no-timing",
        action="store_true",
        help="quality and passes alone: every system translates once; --json keeps what is done",
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="samples; 0 leaves it out")
    parser.add_argument("--device", default="cpu")
    add_freeze_argument(parser)
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--plot", help="file for a drawing of BLEU over passes, e.g. passes.png")


def run(options: argparse.Namespace) -> None:
    if not options.hypothesis and not options.model:
        raise ValueError("give --hypothesis files, or --source and --model checkpoints")
    if options.plot and not options.model:
        raise ValueError("--plot draws BLEU over passes, which need --model checkpoints")
    if options.model and options.source is None:
        raise ValueError("--model needs --source, the text to translate")
    references = [read_lines(path) for path in options.reference]
    systems = [(path, read_lines(path)) for path in options.hypothesis]
    rows = [{"system": name, **_scores(evaluate(lines, references))} for name, lines in systems]
    if options.model:
        source = read_lines(options.source)
        models = [
            model
            for text in options.model
            for model in _models(text, options.device, frozen(options))
        ]
        for name, speed, results in _measured(models, source, options):
            lines = [result.text for result in results]
            systems.append((name, lines))
            rows.append({"system": name, **_scores(evaluate(lines, references)), **speed})
            if options.no_timing and options.json:
                _save(options, {"rows": rows})
    _print(rows)
    if len(systems) > 1 and options.bootstrap:
        _print_comparison(systems, references, options.bootstrap)
    content: dict[str, object] = {"rows": rows}
    if options.diversity:
        found = diversity([lines for _, lines in systems], references)
        content["diversity"] = dataclasses.asdict(found)
        print(
            f"diversity of {len(systems)}: pairwise BLEU {found.pairwise_bleu:.2f}, "
            f"BLEU {found.reference_bleu:.2f}  ({found.signature})"
        )
    if options.json:
        _save(options, content)
    if options.plot:
        plot_quality_passes(Path(options.plot), rows, machine(options.device))


def _measured(
    models: list[tuple[str, LineTranslator, Strategy]],
    source: list[str],
    options: argparse.Namespace,
) -> Iterator[tuple[str, dict[str, float], list[Translation]]]:
    """Of every system its name, its speed or at least its passes, and what it wrote."""
    where = f"{len(models)} systems: {machine(options.device)}"
    if options.no_timing:
        print(f"translating with {where}")
        for name, translator, chosen in models:
            results = translator.decode(source, chosen)
            passes = sum(result.passes for result in results) / max(len(results), 1)
            yield name, {"passes": passes, **_acceptance(results)}, results
        return
    if all("beam" not in translator.model.strategies for _, translator, _ in models):
        print("note: no autoregressive model among them; a speed-up needs one beside it")
    print(f"timing {where}")
    measured = measure_speed(
        [(translator, chosen) for _, translator, chosen in models],
        source,
        latency_sentences=options.latency_sentences,
    )
    for (name, _, _), (speed, results) in zip(models, measured, strict=True):
        yield name, {**dataclasses.asdict(speed), **_acceptance(results)}, results


def _acceptance(results: list[Translation]) -> dict[str, float]:
    """Drafted tokens that a verifying pass settles, over all lines; nothing if none verified."""
    verified = sum(result.verified for result in results)
    accepted = sum(result.accepted for result in results)
    return {"accepted": accepted / verified} if verified else {}


def _save(options: argparse.Namespace, content: dict[str, object]) -> None:
    text = json.dumps({"machine": machine(options.device), **content}, indent=1)
    with written(Path(options.json)) as stream:
        stream.write(text + "\n")


def _models(
    text: str, device: str, freeze: str | None
) -> list[tuple[str, LineTranslator, Strategy]]:
    """The systems of one `--model`: the strategy asked for, or what the family is compared by."""
    directory, options = parse_model(text)
    translator: LineTranslator = pynar.load(directory, device=device, freeze=freeze)
    name = options.pop("strategy", None)
    rescorer = options.pop("rescorer", None)
    label = directory
    if rescorer is not None:
        scorer = pynar.load(rescorer, device=device, freeze=freeze)
        translator, label = RescoringTranslator(translator, scorer), f"{directory} + {rescorer}"
    if name is None and not options and "beam" in translator.model.strategies:
        names: Sequence[str | None] = ("greedy", "beam")
    else:
        names = (name,)
    return [
        (f"{label} {describe(chosen)}", translator, chosen)
        for chosen in (strategy(translator.model, name, options) for name in names)
    ]


def _scores(quality: Quality) -> dict[str, object]:
    return dataclasses.asdict(quality)


def _print(rows: list[dict]) -> None:
    columns = {
        "bleu": "BLEU",
        "chrf": "chrF++",
        "ter": "TER",
        "repetition": "rep. %",
        "length_ratio": "length",
        "passes": "passes",
        "accepted": "accepted",
        "p50_ms": "ms p50",
        "p95_ms": "p95",
        "p99_ms": "p99",
        "sentences_per_second": "sent./s",
    }
    shown = [key for key in columns if any(key in row for row in rows)]
    table = Table("system", *(columns[key] for key in shown))
    for row in rows:
        digits = {"length_ratio": 3}
        cells = (f"{row[key]:.{digits.get(key, 2)}f}" if key in row else "-" for key in shown)
        table.add_row(row["system"], *cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    for name, signature in rows[0]["signatures"].items():
        print(f"{name}: {signature}")


def _print_comparison(
    systems: list[tuple[str, list[str]]], references: list[list[str]], samples: int
) -> None:
    print("paired bootstrap against the first system:")
    for row in compare(systems, references, samples=samples):
        p = "baseline" if row.p_value is None else f"p = {row.p_value:.4f}"
        print(f"  {row.metric:8} {row.score:6.2f} ± {row.interval:.2f}  {p}  {row.system}")
