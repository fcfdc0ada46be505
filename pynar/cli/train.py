"""`pynar train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pynar.data import Tokenizer
from pynar.decoding import Translator
from pynar.models import build
from pynar.recipes import load_recipe, recipe_names
from pynar.strict import from_dict
from pynar.training import TrainingConfig, TrainingResult, train

__all__ = ["add_arguments", "run", "train_recipe"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help=f"{', '.join(recipe_names())}, or a file")
    parser.add_argument("--data", required=True, help="directory written by `pynar prepare`")
    parser.add_argument("--output", required=True, help="directory of the run")
    parser.add_argument("--init-from", help="checkpoint to begin with, where weights agree")
    parser.add_argument("--resume", choices=("auto", "never", "always"), default="auto")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe"
    )


def run(options: argparse.Namespace) -> None:
    result = train_recipe(
        options.recipe,
        options.data,
        options.output,
        changes=options.set,
        init_from=options.init_from,
        resume=options.resume,
    )
    print(f"done after {result.update} updates: {result.averaged or result.best or result.last}")


def train_recipe(
    name: str,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    changes: Sequence[str] = (),
    init_from: str | None = None,
    resume: str = "auto",
    scale: float = 1.0,
) -> TrainingResult:
    """Trains the model of a recipe on prepared data; `scale` multiplies the recipe's updates."""
    recipe = load_recipe(name, changes)
    updates = dict(recipe.training)
    for key in ("max_updates", "warmup_updates", "validate_every", "checkpoint_every"):
        if scale != 1.0 and key in updates:
            updates[key] = max(1, round(scale * updates[key]))
    config = from_dict(TrainingConfig, updates, where="training")
    tokenizer = Tokenizer.load(data)
    torch.manual_seed(config.seed)
    model = build(
        {
            "source_vocabulary": tokenizer.source_size,
            "target_vocabulary": tokenizer.target_size,
            "share_embeddings": tokenizer.joint,
            **recipe.model,
        }
    )
    return train(
        model,
        data,
        output,
        config,
        init_from=init_from,
        resume=resume,
        translate=_Translate(recipe.validation),
    )


class _Translate:
    """Translates validation sentences as the recipe's `validation` says."""

    def __init__(self, validation: dict[str, Any]) -> None:
        self._options = dict(validation)
        self._strategy = self._options.pop("strategy", None)

    def __call__(self, model: nn.Module, tokenizer: Tokenizer, lines: Sequence[str]) -> list[str]:
        return Translator(model, tokenizer).translate(lines, self._strategy, **self._options)
