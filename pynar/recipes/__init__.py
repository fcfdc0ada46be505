"""Named configurations: `pynar train --recipe NAME`; one YAML file each.

A recipe has `description`, `model` (as `pynar.models.build` takes it, without the vocabulary),
`training` (`TrainingConfig`) and, where it matters, `validation`: the decoding strategy and its
options for BLEU during training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pynar.strict import from_dict

__all__ = ["Recipe", "load_recipe", "recipe_names"]


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file holds, unchecked below this level until it is used."""

    model: dict[str, Any]
    training: dict[str, Any]
    description: str = ""
    validation: dict[str, Any] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """The recipes that come with PyNAR."""
    folder = files("pynar.recipes").iterdir()
    return sorted(path.name[: -len(".yaml")] for path in folder if path.name.endswith(".yaml"))


def load_recipe(name: str | os.PathLike[str], changes: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name, or from a file that ends in `.yaml`, and applies `changes`.

    A change is written `training.lr=1e-3`, its value as in YAML.

    Raises:
        ValueError: an unknown name (the known ones are listed), key or malformed change.
        FileNotFoundError: there is no such file.
    """
    if str(name).endswith((".yaml", ".yml")):
        text = Path(name).read_text(encoding="utf-8")
    elif name in recipe_names():
        text = files("pynar.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"`recipe` must be a YAML file or one of {', '.join(recipe_names())}, got {name!r}"
        )
    try:
        content = yaml.safe_load(text)
        for change in changes:
            content = _change(content, change)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name}: is not YAML: {error}") from None
    return from_dict(Recipe, content, where=f"recipe {name}")


def _change(content: Mapping[str, Any], change: str) -> dict[str, Any]:
    place, equals, value = change.partition("=")
    section, dot, key = place.partition(".")
    if not (equals and dot and key):
        raise ValueError(f"a change must look like `training.lr=1e-3`, got {change!r}")
    return {**content, section: {**content.get(section, {}), key: yaml.safe_load(value)}}
