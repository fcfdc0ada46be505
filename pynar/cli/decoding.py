"""The arguments that choose engine and decoding strategy, shared by several commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import pynar
from pynar.decoding import LineTranslator, Strategy, Translator
from pynar.decoding.ctranslate2 import CTranslate2Translator, is_exported, why_not
from pynar.decoding.translator import STRATEGIES

__all__ = [
    "add_decoding_arguments",
    "add_engine_arguments",
    "add_freeze_argument",
    "chosen_strategy",
    "frozen",
    "load_engine",
    "parse_model",
]


def add_freeze_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--freeze",
        default="fp32",
        choices=("none", "fp32", "bf16", "int8", "fp16"),
        help="of pynar's engine, weights packed for inference: fp32 translates the same, the "
        "others nearly so (int8 on CPU, fp16 on GPU)",
    )


def frozen(options: argparse.Namespace) -> str | None:
    """The `freeze` of `pynar.load` that the arguments ask for."""
    return None if options.freeze == "none" else options.freeze


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


def chosen_strategy(options: argparse.Namespace, translator: LineTranslator) -> Strategy:
    """The strategy that the arguments ask for, or an error that lists what the model has."""
    prefix = "decoding."
    chosen = {k[len(prefix) :]: v for k, v in vars(options).items() if k.startswith(prefix)}
    return translator.strategy(options.strategy, chosen)


def add_engine_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Adds `--device`, `--engine`, `--freeze` and `--compute-type`."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--engine",
        choices=("auto", "pynar", "ctranslate2"),
        help="what runs the model; auto takes CTranslate2 where it is installed and can; "
        f"{default} if not given, for a checkpoint",
    )
    parser.set_defaults(usual_engine=default)
    add_freeze_argument(parser)
    parser.add_argument(
        "--compute-type",
        metavar="TYPE",
        help="of CTranslate2, e.g. int8; float32 if not given, or as an exported model is stored",
    )


def load_engine(options: argparse.Namespace, directory: str) -> tuple[LineTranslator, Strategy]:
    """The checkpoint or exported model in the engine asked for, and the strategy for it.

    Says on standard error which engine it took, and why, where that was left to it.
    """
    if is_exported(directory):
        if options.engine == "pynar" or options.device != "cpu":
            raise ValueError(
                f"{directory} is an exported model, which --engine ctranslate2 runs on --device "
                f"cpu, got {options.engine or 'ctranslate2'} and {options.device}"
            )
        exported = CTranslate2Translator(directory, compute_type=options.compute_type or "default")
        return exported, chosen_strategy(options, exported)
    wanted = options.engine or options.usual_engine
    translator = pynar.load(directory, device=options.device)
    strategy = chosen_strategy(options, translator)
    if wanted == "pynar":
        return _ours(options, translator), strategy
    reason = why_not(translator, strategy)
    if reason is not None and wanted == "ctranslate2":
        raise ValueError(f"--engine ctranslate2: {reason}")
    if reason is not None:
        print(f"engine: pynar ({reason})", file=sys.stderr)
        return _ours(options, translator), strategy
    engine = CTranslate2Translator.of(translator, compute_type=options.compute_type or "float32")
    print("engine: {name} {version}, {compute_type}".format(**engine.engine), file=sys.stderr)
    return engine, strategy


def _ours(options: argparse.Namespace, translator: Translator) -> Translator:
    if options.compute_type is not None:
        raise ValueError(
            f"--compute-type {options.compute_type} is of --engine ctranslate2, not of pynar"
        )
    return translator if options.freeze == "none" else translator.freeze(options.freeze)


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Takes `NAME[:OPTION=VALUE,...]` apart; values that look like JSON are read as such."""
    name, _, changes = text.partition(":")
    options = {}
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{text}: expected OPTION=VALUE after the colon, got {change!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options
