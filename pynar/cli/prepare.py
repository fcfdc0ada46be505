"""`pynar prepare`."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import Progress, TaskID

from pynar.data import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for split, needed in (("train", True), ("valid", False), ("test", False)):
        parser.add_argument(
            f"--{split}",
            nargs="+",
            required=needed,
            metavar="FILE",
            help="a source and a target file, or one TSV file; plain or gzipped",
        )
    parser.add_argument("--output", required=True, help="directory to write")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vocab-size", type=int, help="pieces of a new SentencePiece model")
    tokenizer.add_argument("--tokenizer", help="a SentencePiece model, or a directory with one")
    parser.add_argument(
        "--separate", action="store_true", help="one vocabulary for each side, not a joint one"
    )
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--character-coverage", type=float, default=1.0)
    parser.add_argument("--byte-fallback", action="store_true", help="no unknown symbols")
    parser.add_argument("--split-digits", action="store_true", help="one piece a digit")
    parser.add_argument("--normalization", default="identity", help="SentencePiece's rule")
    parser.add_argument("--max-length", type=int, default=256, help="longer sides are left out")
    parser.add_argument("--max-ratio", type=float, help="more uneven training pairs are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier corpus")


def run(options: argparse.Namespace) -> None:
    for split in ("train", "valid", "test"):
        if (paths := getattr(options, split)) is not None and len(paths) > 2:
            raise ValueError(f"--{split}: expected two files or one TSV file, got {len(paths)}")
    with Progress(console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        manifest = prepare(
            options.output,
            train=_paths(options.train),
            valid=_paths(options.valid) if options.valid else None,
            test=_paths(options.test) if options.test else None,
            vocab_size=options.vocab_size,
            tokenizer=options.tokenizer,
            joint=not options.separate,
            model_type=options.model_type,
            character_coverage=options.character_coverage,
            byte_fallback=options.byte_fallback,
            split_digits=options.split_digits,
            normalization=options.normalization,
            max_length=options.max_length,
            max_ratio=options.max_ratio,
            seed=options.seed,
            threads=options.threads,
            overwrite=options.overwrite,
            progress=show,
        )
    for name, info in manifest.splits.items():
        skipped = ", ".join(f"{count} {reason}" for reason, count in info.skipped.items() if count)
        print(
            f"{name}: {info.pairs} pairs, {info.source_tokens} source and "
            f"{info.target_tokens} target tokens; skipped: {skipped or 'none'}"
        )


def _paths(paths: list[str]) -> tuple[str, str] | str:
    return paths[0] if len(paths) == 1 else (paths[0], paths[1])
