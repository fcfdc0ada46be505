"""What is compared: a model, a strategy with its options, and the engine that runs them."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pynar.checkpoint import read_config
from pynar.decoding import (
    BeamSearch,
    DraftAndVerify,
    Greedy,
    ImportanceWeighted,
    LatentArgmax,
    MaskPredict,
    NoisyParallel,
    Sampling,
    Strategy,
    strategy,
)
from pynar.models import MODELS, AutoregressiveTransformer, TranslationModel
from pynar.recipes import load_recipe
from pynar.strict import from_dict

__all__ = ["System", "describe", "expand", "layer_evaluations"]

ENGINES = ("pynar", "ctranslate2")
FREEZES = ("fp32", "bf16", "int8", "fp16")
# Strategies that random sentences of a given length say nothing about, and why.
_UNFORCED: dict[type, str] = {
    DraftAndVerify: "its passes depend on how many drafted tokens are right, which random "
    "sentences do not tell",
    Sampling: "what it draws decides where a sentence ends",
}


@dataclass(frozen=True, kw_only=True)
class System:
    """One system of the benchmark, as a worker process needs to know it."""

    model: str  # a checkpoint, or a recipe for random weights
    random: bool = False
    changes: list[str] = field(default_factory=list)  # to the recipe, e.g. "model.dim=64"
    vocabulary: int = 32_000  # of a random model, on both sides
    seed: int = 0  # of random weights
    strategy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rescorer: str | None = None  # a checkpoint that chooses among the candidates
    engine: str = "pynar"
    compute_type: str = "float32"  # CTranslate2's
    workers: bool = False  # CTranslate2's: one a thread, which share a batch; not one with all
    freeze: str | None = None  # PyNAR's
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.freeze is not None and self.freeze not in FREEZES:
            raise ValueError(
                f"`freeze` must be one of {', '.join(FREEZES)}, or none, got {self.freeze!r}"
            )
        if self.random and self.rescorer is not None:
            raise ValueError(
                f"`rescorer` must be none with random weights, which write no text for it, got "
                f"{self.rescorer!r}"
            )

    @property
    def configuration(self) -> dict[str, Any]:
        """What `pynar.models.build` takes."""
        if not self.random:
            return read_config(self.model)
        sizes = {"source_vocabulary": self.vocabulary, "target_vocabulary": self.vocabulary}
        return {**sizes, **load_recipe(self.model, self.changes).model}

    @property
    def family(self) -> type[TranslationModel]:
        name = self.configuration.get("model")
        if name not in MODELS:
            raise ValueError(
                f"{self.model}: `model` must be one of {', '.join(MODELS)}, got {name}"
            )
        return MODELS[name]

    @property
    def config(self) -> Any:
        """The sizes of the model, checked."""
        fields = {k: v for k, v in self.configuration.items() if k != "model"}
        return from_dict(self.family.Config, fields)

    @property
    def decoding(self) -> Strategy:
        return strategy(self.family, self.strategy, self.options)

    @property
    def scorer(self) -> System | None:
        """The rescorer as a system."""
        if self.rescorer is None:
            return None
        return System(model=self.rescorer, freeze=self.freeze, device=self.device)

    @property
    def greedy(self) -> bool:
        """Whether it can be the baseline."""
        return isinstance(self.decoding, Greedy) and self.rescorer is None

    def left_out(self, kind: str) -> str | None:
        """Why cells of this kind (see `Row`) have no place for it; None where they have one."""
        if self.rescorer is not None and kind != "text":
            return "its rescorer reads text, not ids"
        return _UNFORCED.get(type(self.decoding)) if kind == "length" else None

    @property
    def width(self) -> int:
        """How many sequences a sentence is decoded to side by side: beam, samples or lengths."""
        decoding = self.decoding
        if isinstance(decoding, BeamSearch):
            return decoding.beam
        if isinstance(decoding, Sampling):
            return decoding.samples
        if isinstance(decoding, MaskPredict):
            return min(decoding.length_candidates, self.config.length_classes)
        if isinstance(decoding, LatentArgmax):
            return decoding.samples
        if isinstance(decoding, (NoisyParallel, ImportanceWeighted)):
            return decoding.samples * decoding.length_candidates
        return 1

    @property
    def decoder_layers(self) -> int:
        """That a pass goes through: those of the decoder, and the couplings of a flow."""
        config = self.config
        couplings: int = getattr(config, "couplings", 0)
        return couplings + config.decoder_layers  # type: ignore[no-any-return]

    def layer_evaluations(self, passes: float) -> float:
        """Of a sentence; with a rescorer, as if no two of the candidates were equal."""
        scorer = self.scorer
        if scorer is not None:
            passes -= 1
        found = layer_evaluations(
            self.config.encoder_layers, self.decoder_layers, passes, self.width
        )
        if scorer is not None:
            single = isinstance(self.decoding, LatentArgmax)
            candidates = 1 if single else getattr(self.decoding, "n_best", self.width)
            layers = scorer.config.encoder_layers, scorer.decoder_layers
            found += layer_evaluations(*layers, 1, candidates)
        return found

    @property
    def engine_name(self) -> str:
        if self.engine == "ctranslate2":
            return f"CTranslate2 {self.compute_type}" + (", workers" if self.workers else "")
        return "PyNAR" if self.freeze is None else f"PyNAR frozen {self.freeze}"

    @property
    def name(self) -> str:
        """The model and how it is decoded; engines of one model share it."""
        what = ",".join([self.model, *self.changes]) + (" (random)" if self.random else "")
        if self.rescorer is not None:
            what += f" + {self.rescorer}"
        return f"{what} {describe(self.decoding)}"


def describe(chosen: Strategy) -> str:
    """The strategy's name and its options other than the defaults, as one would write them."""
    plain = type(chosen)()
    fields = dataclasses.fields(chosen)  # type: ignore[arg-type]
    changed = [
        f"{field.name}={getattr(chosen, field.name)}"
        for field in fields
        if getattr(chosen, field.name) != getattr(plain, field.name)
        or field.name in ("beam", "iterations")
    ]
    return f"{type(chosen).__name__}({', '.join(changed)})"


def expand(
    models: Sequence[System], *, freezes: Sequence[str | None], engines: Sequence[str]
) -> list[System]:
    """Every system to measure for the models asked for.

    An autoregressive model without a strategy or options stands there with greedy search and a
    beam of 5; what CTranslate2 can run stands there for each of `engines`, too
    (`NAME[:COMPUTE_TYPE[:workers]]`, see `System.workers`); every model once for each of `freezes`.
    """
    parsed = [_engine(text) for text in engines]
    if any(engine["engine"] == "ctranslate2" for engine in parsed):
        if not importlib.util.find_spec("ctranslate2"):
            raise ValueError("the engine ctranslate2 is not installed: `pip install ctranslate2`")
    systems = []
    for model in models:
        model.config  # noqa: B018 - what is wrong with it is to be said before anything starts
        _check_rescorer(model)
        variants = [model]
        autoregressive = model.family is AutoregressiveTransformer
        if autoregressive and not model.strategy and not model.options:
            greedy = replace(model, strategy="greedy")
            variants = [greedy, replace(model, strategy="beam", options={"beam": 5})]
        for variant in variants:
            decoding = variant.decoding
            systems += [replace(variant, freeze=freeze) for freeze in freezes]
            searches = isinstance(decoding, (Greedy, BeamSearch)) and variant.rescorer is None
            if autoregressive and searches:
                systems += [replace(variant, freeze=None, **engine) for engine in parsed]
    # A model named twice is measured once.
    return list({repr(system): system for system in systems}.values())


def _check_rescorer(model: System) -> None:
    scorer = model.scorer
    if scorer is None:
        return
    scorer.config  # noqa: B018 - as the model's own
    if not hasattr(scorer.family, "score"):
        raise ValueError(
            f"{model.model}: `rescorer` must be a model that goes from left to right, got "
            f"{model.rescorer} ({scorer.family.name})"
        )


def _engine(text: str) -> dict[str, Any]:
    """The fields of a system for `NAME[:COMPUTE_TYPE[:workers]]`."""
    name, _, rest = text.partition(":")
    kind, _, workers = rest.partition(":")
    if workers not in ("", "workers"):
        raise ValueError(
            f"an engine must be NAME, NAME:COMPUTE_TYPE or NAME:COMPUTE_TYPE:workers, got {text!r}"
        )
    return {"engine": name, "compute_type": kind or "float32", "workers": bool(workers)}


def layer_evaluations(encoder: int, decoder: int, passes: float, sequences: int) -> float:
    """Layers run for a sentence: the encoder once, the decoder in every pass for each sequence."""
    return encoder + passes * decoder * sequences
