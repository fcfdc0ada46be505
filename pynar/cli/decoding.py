"""The arguments that choose and shape a decoding strategy, shared by several commands."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from pynar.decoding import Strategy, Translator
from pynar.decoding.translator import STRATEGIES

__all__ = ["add_decoding_arguments", "chosen_strategy"]


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--strategy` and an argument for every option that a strategy has."""
    parser.add_argument("--strategy", choices=sorted(STRATEGIES), help="default: the model's own")
    seen: dict[str, list[str]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for name, strategy in STRATEGIES.items():
        for field in dataclasses.fields(strategy):  # type: ignore[arg-type]
            seen.setdefault(field.name, []).append(name)
            fields[field.name] = field
    for name, field in fields.items():
        kind = type(field.default)
        form: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            form = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            dest=f"decoding.{name}",
            help=f"of {', '.join(seen[name])}",
            **form,
        )


def chosen_strategy(options: argparse.Namespace, translator: Translator) -> Strategy:
    """The strategy that the arguments ask for, or an error that lists what the model has."""
    prefix = "decoding."
    chosen = {k[len(prefix) :]: v for k, v in vars(options).items() if k.startswith(prefix)}
    return translator.strategy(options.strategy, chosen)
