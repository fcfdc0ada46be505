"""Starting a model from the weights of another."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pynar import checkpoint
from pynar.models import TranslationModel, bart

__all__ = ["Initialised", "initialise"]


_ABSENT, _FOREIGN = "not there", "of another vocabulary"


@dataclass(frozen=True)
class Initialised:
    """Which weights were taken, by name; why others were not; and which were left over."""

    taken: list[str]
    kept: dict[str, str]
    unused: list[str]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.kept)
        text = f"{len(self.taken)} of {total} weights taken"
        if self.kept:
            text += f"; left as they were: {_listed(self.kept)}"
        if self.unused:
            text += f"; without use here: {_listed(dict.fromkeys(self.unused, ''))}"
        return text


def _listed(weights: Mapping[str, str]) -> str:
    """Weights and reasons, if there are many by the first part of their names."""
    if len(weights) <= 12:
        return ", ".join(f"{name} ({why})" if why else name for name, why in weights.items())
    reasons = (why if why in ("", _ABSENT, _FOREIGN) else "shape" for why in weights.values())
    parts = Counter((name.split(".")[0], why) for name, why in zip(weights, reasons, strict=True))
    return ", ".join(
        f"{count} of {part} ({why})".removesuffix(" ()") for (part, why), count in parts.items()
    )


def initialise(model: nn.Module, directory: str | os.PathLike[str]) -> Initialised:
    """Copies the weights of a checkpoint into those of `model` with the same name and shape.

    So a non-autoregressive student takes encoder, decoder and embeddings of its teacher. Of a
    BART checkpoint, written by transformers, all but the token embeddings can be taken: they are
    those of another vocabulary.

    Raises:
        ValueError: not a single weight fits, or the model would make something else of BART's.
        CheckpointError: the checkpoint is damaged.
    """
    theirs: Mapping[str, Tensor]
    foreign = bart.is_transformers_directory(directory)
    if foreign:
        theirs = bart.body_weights(directory, cast(TranslationModel, model).config)
    else:
        theirs = checkpoint.load_weights(directory)
    taken: list[str] = []
    kept: dict[str, str] = {}
    with torch.no_grad():
        for name, weight in checkpoint.unique_tensors(model).items():
            if name not in theirs:
                other = foreign and name.endswith("_embedding.tokens.weight")
                kept[name] = _FOREIGN if other else _ABSENT
            elif theirs[name].shape != weight.shape:
                kept[name] = f"shape {list(theirs[name].shape)}, not {list(weight.shape)}"
            else:
                weight.copy_(theirs[name])
                taken.append(name)
    if not taken:
        raise ValueError(f"`init_from`: no weight of {directory} has the name and shape of ours")
    ours = model.state_dict().keys()
    return Initialised(taken, kept, [name for name in theirs if name not in ours])
