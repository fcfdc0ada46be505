"""`pynar distill`."""

from __future__ import annotations

import argparse
import os

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from pynar.cli.decoding import add_decoding_arguments, add_engine_arguments, load_engine
from pynar.distill import distill


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="checkpoint or exported model")
    parser.add_argument("--data", required=True, help="directory written by `pynar prepare`")
    parser.add_argument("--output", required=True, help="directory of the distilled corpus")
    parser.add_argument("--shard-size", type=int, default=2000, help="pairs between two savings")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=2048,
        help="source tokens a batch, once for each draft of npd, iwd",
    )
    add_engine_arguments(parser, default="auto")
    add_decoding_arguments(parser)


def run(options: argparse.Namespace) -> None:
    teacher, strategy = load_engine(options, options.teacher)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as bars:
        task = bars.add_task("shards", total=None)
        manifest = distill(
            teacher,
            options.data,
            options.output,
            strategy,
            shard_size=options.shard_size,
            max_tokens=options.max_tokens,
            # Set by torchrun, where several processes share the work.
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    if manifest is None:
        print("this process is done; another one still translates")
    else:
        train = manifest.splits["train"]
        print(f"{options.output}: {train.pairs} pairs, {train.target_tokens} target tokens")
