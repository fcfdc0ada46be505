"""`pynar average`."""

from __future__ import annotations

import argparse

from pynar.checkpoint import average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--output", required=True, help="directory of the averaged checkpoint")


def run(options: argparse.Namespace) -> None:
    average(options.checkpoints, options.output)
    print(f"{options.output}: the mean of {len(options.checkpoints)} checkpoints")
