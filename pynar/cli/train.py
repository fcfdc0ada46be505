"""`pynar train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pynar.data import Tokenizer
from pynar.decoding import Translator
from pynar.models import TranslationModel, build
from pynar.recipes import load_recipe, recipe_names
from pynar.strict import from_dict
from pynar.training import TrainingConfig, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help=f"{', '.join(recipe_names())}, or a file")
    parser.add_argument("--data", required=True, help="directory written by `pynar prepare`")
    parser.add_argument("--output", required=True, help="directory of the run")
    parser.add_argument(
        "--init-from", help="checkpoint to begin with, where weights agree; also one of BART"
    )
    parser.add_argument("--resume", choices=("auto", "never", "always"), default="auto")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change the recipe; any number of values, any number of times",
    )


def run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.set)
    config = from_dict(TrainingConfig, recipe.training, where="training")
    tokenizer = Tokenizer.load(options.data)
    torch.manual_seed(config.seed)
    model = build(
        {
            "source_vocabulary": tokenizer.source_size,
            "target_vocabulary": tokenizer.target_size,
            "share_embeddings": tokenizer.joint,
            **recipe.model,
        }
    )
    translate = _Translate(recipe.validation)
    translate.check(model, tokenizer)
    result = train(
        model,
        options.data,
        options.output,
        config,
        init_from=options.init_from,
        resume=options.resume,
        translate=translate,
    )
    print(f"done after {result.update} updates: {result.averaged or result.best or result.last}")


class _Translate:
    """Translates validation sentences as the recipe's `validation` says."""

    def __init__(self, validation: dict[str, Any]) -> None:
        self._options = dict(validation)
        self._strategy = self._options.pop("strategy", None)

    def check(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Before the first update, not at the first validation: can the model decode so?"""
        try:
            self._translator(model, tokenizer).strategy(self._strategy, self._options)
        except ValueError as error:
            raise ValueError(f"`validation` of the recipe: {error}") from error

    def __call__(self, model: nn.Module, tokenizer: Tokenizer, lines: Sequence[str]) -> list[str]:
        translator = self._translator(model, tokenizer)
        return translator.translate(lines, self._strategy, **self._options)

    @staticmethod
    def _translator(model: nn.Module, tokenizer: Tokenizer) -> Translator:
        assert isinstance(model, TranslationModel)
        return Translator(model, tokenizer)
