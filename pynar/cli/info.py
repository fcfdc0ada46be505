"""`pynar info`."""

from __future__ import annotations

import argparse

from pynar import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> None:
    info.main()
