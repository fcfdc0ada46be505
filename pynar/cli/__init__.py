"""The command line: `pynar COMMAND ...`; one module a command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

__all__ = ["main"]

_COMMANDS = {
    "prepare": "encode parallel text for training",
    "train": "train a model on a prepared corpus",
    "distill": "replace a corpus' targets by a teacher's translations",
    "translate": "translate text",
    "evaluate": "score translations, and measure models",
    "bench": "benchmarks: how fast systems are, and how good",
    "export": "write an autoregressive model for CTranslate2",
    "average": "average the weights of checkpoints",
    "quickstart": "train, distil and compare models on a small generated corpus",
    "info": "show versions, devices and which implementation runs where",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    What a user can mend (a wrong argument, a missing file or package, bad data) is one line on
    standard error and status 2, without a traceback; `PYNAR_TRACEBACK=1` shows one.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="pynar", description="Non-autoregressive sequence generation."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the module of the command that runs is imported: `pynar --help` answers at once.
    wanted = next((name for name in arguments if name in _COMMANDS), None)
    for name, summary in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == wanted:
            module = importlib.import_module(f"pynar.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:
        # The reader of our output has gone; Python must not try to flush it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("pynar: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("PYNAR_TRACEBACK"):
            raise
        print(f"pynar {options.command}: {error}", file=sys.stderr)
        return 2
