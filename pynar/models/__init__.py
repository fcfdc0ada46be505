"""The published models, one file a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pynar.models.autoregressive import AutoregressiveConfig, AutoregressiveTransformer
from pynar.models.base import TranslationModel
from pynar.models.cmlm import CMLM, CMLMConfig
from pynar.models.flowseq import FlowSeq, FlowSeqConfig
from pynar.models.janus import JANUS, JANUSConfig
from pynar.models.nat import VanillaNAT, VanillaNATConfig
from pynar.strict import from_dict

__all__ = [
    "CMLM",
    "JANUS",
    "MODELS",
    "AutoregressiveConfig",
    "AutoregressiveTransformer",
    "CMLMConfig",
    "FlowSeq",
    "FlowSeqConfig",
    "JANUSConfig",
    "TranslationModel",
    "VanillaNAT",
    "VanillaNATConfig",
    "build",
]

MODELS: dict[str, type[TranslationModel]] = {
    model.name: model for model in (AutoregressiveTransformer, CMLM, FlowSeq, JANUS, VanillaNAT)
}


def build(config: Mapping[str, Any]) -> TranslationModel:
    """Makes a model with fresh weights from `{"model": name, **fields}`.

    Raises:
        ValueError: an unknown model or field (the known ones are listed), or a bad value.
    """
    fields = dict(config)
    name = fields.pop("model", None)
    if name not in MODELS:
        raise ValueError(f"`model` must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    return model(from_dict(model.Config, fields))
