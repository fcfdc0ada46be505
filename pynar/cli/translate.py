"""`pynar translate`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TextIO

import pynar
from pynar.cli.decoding import (
    add_decoding_arguments,
    add_engine_arguments,
    frozen,
    load_engine,
)
from pynar.data import read_lines
from pynar.data.atomic import written
from pynar.decoding import RescoringTranslator, Translation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint or exported model")
    parser.add_argument("--input", help="file, plain or gzipped; standard input if not given")
    parser.add_argument("--output", help="file; standard output if not given")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="source tokens a batch, once for each draft of npd, iwd",
    )
    parser.add_argument("--max-source-tokens", type=int, default=200, help="see --on-long")
    parser.add_argument(
        "--on-long", choices=("split", "error"), default="split", help="for longer lines"
    )
    parser.add_argument(
        "--scores", action="store_true", help="n best a line: number, score and text by tabs"
    )
    parser.add_argument(
        "--rescorer",
        metavar="MODEL",
        help="autoregressive checkpoint that chooses among the candidates (--strategy npd, or "
        "--n-best)",
    )
    add_engine_arguments(parser, default="pynar")
    add_decoding_arguments(parser)


def run(options: argparse.Namespace) -> None:
    translator, strategy = load_engine(options, options.model)
    if options.rescorer is not None:
        scorer = pynar.load(options.rescorer, device=options.device, freeze=frozen(options))
        translator = RescoringTranslator(translator, scorer)
    lines = read_lines(sys.stdin.buffer if options.input is None else options.input)
    start = time.perf_counter()
    results = translator.decode(
        lines,
        strategy,
        max_tokens=options.max_tokens,
        max_source_tokens=options.max_source_tokens,
        on_long=options.on_long,
    )
    seconds = time.perf_counter() - start
    _write(options.output, results, options.scores)
    passes = sum(result.passes for result in results)
    if lines:
        print(
            f"{len(lines)} lines in {seconds:.2f} s ({len(lines) / seconds:.1f} a second), "
            f"{passes / len(lines):.1f} decoder passes a line",
            file=sys.stderr,
        )


def _write(output: str | None, results: list[Translation], scores: bool) -> None:
    if output is None:
        _print(sys.stdout, results, scores)
        return
    with written(Path(output)) as stream:
        _print(stream, results, scores)


def _print(stream: TextIO, results: list[Translation], scores: bool) -> None:
    for number, result in enumerate(results):
        if not scores:
            stream.write(result.text + "\n")
            continue
        for text, score in result.alternatives or [("", 0.0)]:
            stream.write(f"{number}\t{score:.4f}\t{text}\n")
