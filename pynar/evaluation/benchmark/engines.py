"""What runs a system inside a worker process: text to text, and token ids to token ids."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

import pynar
from pynar.data import Tokenizer
from pynar.decoding import (
    BeamSearch,
    Greedy,
    ImportanceWeighted,
    LatentArgmax,
    LineTranslator,
    MaskPredict,
    NoisyParallel,
    RescoringTranslator,
    Strategy,
    Translator,
)
from pynar.evaluation.benchmark.systems import System
from pynar.models import build
from pynar.symbols import NAMES

__all__ = ["CTranslate2Engine", "Engine", "PyNAREngine", "export", "load_engine"]

Ids = list[list[int]]
FACTS = "benchmark.json"


class Engine(Protocol):
    """`passes` are a sentence's decoder passes, or None where the engine does not tell."""

    parameters: int
    longest: int | None  # the most sub-words on either side, EOS counted
    tokenizer: Any  # None with random weights

    def translate(self, lines: Sequence[str]) -> tuple[list[str], list[int | None]]:
        """Raw text of one batch to raw text, and passes."""

    def prepare(self, sources: Ids, length: int | None) -> Any:
        """A batch ready for `generate`; every output has `length` tokens if that is given."""

    def generate(self, batch: Any) -> tuple[Ids, list[int | None]]:
        """The ids of the outputs of a prepared batch, and passes."""


def load_engine(system: System, threads: int, exported: str | None) -> Engine:
    """Reads or makes the system's model; `exported` is where CTranslate2's copy of it lies."""
    if system.engine == "pynar":
        return PyNAREngine(system)
    if exported is None:
        raise ValueError(f"the engine {system.engine} needs an exported model")
    return CTranslate2Engine(system, threads, exported)


class PyNAREngine:
    """PyNAR's own decoding."""

    def __init__(self, system: System) -> None:
        self.translator, self.parameters = _loaded(system)
        self.writer: LineTranslator = self.translator
        if system.scorer is not None:
            scorer, parameters = _loaded(system.scorer)
            self.writer = RescoringTranslator(self.translator, scorer)
            self.parameters += parameters
        model = self.translator.model
        self.strategy = system.decoding
        self.width = system.width
        self.longest = model.longest
        self.tokenizer = self.translator.tokenizer

    def translate(self, lines: Sequence[str]) -> tuple[list[str], list[int | None]]:
        # The caller made the batch; nothing is to divide it further.
        results = self.writer.decode(lines, self.strategy, max_tokens=1 << 40)
        return [result.text for result in results], [result.passes for result in results]

    def prepare(self, sources: Ids, length: int | None) -> tuple[Tensor, Tensor, Strategy, dict]:
        source, lengths = self.translator.batch(sources)
        strategy, forced = self.strategy, {}
        if length is None:
            pass
        elif isinstance(strategy, (Greedy, BeamSearch)):
            # The step that writes EOS belongs to a sentence of that length.
            limits = {"min_length": length, "max_ratio": 0.0, "max_extra": length + 1}
            strategy = replace(strategy, **cast(Any, limits))
        elif isinstance(strategy, MaskPredict):
            wanted = torch.full((len(sources), self.width), length, device=source.device)
            forced["target_lengths"] = wanted
        elif isinstance(strategy, (LatentArgmax, NoisyParallel, ImportanceWeighted)):
            if not isinstance(strategy, LatentArgmax):
                # As many drafts, all of this length; equal ones would be scored but once.
                strategy = replace(strategy, samples=self.width, length_candidates=1)
            forced["target_lengths"] = torch.full_like(lengths, length)
        else:
            raise ValueError(f"{type(strategy).__name__} cannot be forced to a length")
        return source, lengths, strategy, forced

    def generate(self, batch: Any) -> tuple[Ids, list[int | None]]:
        source, lengths, strategy, forced = batch
        found = strategy.decode(self.translator.model, source, lengths, **forced)
        return [rows[0] for rows in found.lists()], found.passes.tolist()


def _loaded(system: System) -> tuple[Translator, int]:
    """The system's model, frozen if it is to be, and the number of its parameters."""
    translator = load_translator(system)
    # Counted before: packed weights are no parameters any more.
    parameters = sum(p.numel() for p in translator.model.parameters())
    if system.freeze is not None:
        translator = translator.freeze(system.freeze)
    return translator, parameters


def load_translator(system: System) -> Translator:
    """The system's model, not yet frozen."""
    if system.random:
        torch.manual_seed(system.seed)
        model = build(system.configuration).to(system.device).eval()
        # Never given text, it needs no tokenizer.
        return Translator(model, cast(Any, None))
    return pynar.load(system.model, device=system.device)


class CTranslate2Engine:
    """CTranslate2 as its own users call it: one hypothesis, its early exit, its defaults.

    `pynar.decoding.ctranslate2` makes it search exactly as PyNAR does, which costs it time that a
    baseline must not be charged for. Outputs can differ a little; their quality stands beside.
    """

    def __init__(self, system: System, threads: int, exported: str) -> None:
        module: Any = importlib.import_module("ctranslate2")
        facts = json.loads((Path(exported) / FACTS).read_text(encoding="utf-8"))
        self.parameters, self.longest = facts["parameters"], facts["longest"]
        self.tokenizer = None if system.random else Tokenizer.load(exported)
        config = system.config
        numbers = NumberTokenizer(config.source_vocabulary, config.target_vocabulary)
        known: Any = self.tokenizer or numbers
        self.source, self.target = known.source, known.target
        decoding = system.decoding
        self.limits = (decoding.max_ratio, decoding.max_extra)  # type: ignore[attr-defined]
        self.options: dict[str, Any] = {"max_input_length": self.longest}
        if isinstance(decoding, BeamSearch):
            self.options |= {"beam_size": decoding.beam, "length_penalty": decoding.length_penalty}
        else:
            self.options |= {"beam_size": 1}
        self.workers = threads if system.workers else 1
        self.engine = module.Translator(
            exported,
            device=system.device,
            compute_type=system.compute_type,
            intra_threads=threads // self.workers,
            inter_threads=self.workers,
        )

    def translate(self, lines: Sequence[str]) -> tuple[list[str], list[int | None]]:
        # As in PyNAR, a line of spaces has an empty translation.
        full = [place for place, line in enumerate(lines) if line.strip()]
        pieces = self.source.encode([lines[place] for place in full], out_type=str)
        limits = self._limit(pieces)
        results = self._run(pieces, limits)
        texts, passes = [""] * len(lines), [cast("int | None", 0)] * len(lines)
        decoded = self.target.decode([result.hypotheses[0] for result in results])
        for place, text, count in zip(full, decoded, self._passes(results, limits), strict=True):
            texts[place], passes[place] = text, count
        return texts, passes

    def prepare(self, sources: Ids, length: int | None) -> tuple[list[list[str]], dict[str, int]]:
        pieces = [[self.source.id_to_piece(i) for i in ids] for ids in sources]
        if length is None:
            return pieces, self._limit(pieces)
        # As many steps as a sentence of that length and its EOS take.
        return pieces, {"min_decoding_length": length + 1, "max_decoding_length": length + 1}

    def generate(self, batch: Any) -> tuple[Ids, list[int | None]]:
        pieces, limits = batch
        results = self._run(pieces, limits)
        ids = [self.target.piece_to_id(result.hypotheses[0]) for result in results]
        return ids, self._passes(results, limits)

    def _run(self, pieces: list[list[str]], limits: dict[str, int]) -> list[Any]:
        # Every worker gets a part of the batch.
        share = -(-len(pieces) // self.workers) if self.workers > 1 else 0
        return self.engine.translate_batch(pieces, max_batch_size=share, **self.options, **limits)

    def _limit(self, pieces: list[list[str]]) -> dict[str, int]:
        ratio, extra = self.limits
        longest = max(map(len, pieces), default=0) + 1
        # The engine does not count EOS, PyNAR does.
        limit = min(int(longest * ratio) + extra, self.longest) - 1
        return {"max_decoding_length": max(1, limit)}

    def _passes(self, results: list[Any], limits: dict[str, int]) -> list[int | None]:
        # The steps of a beam go on to its latest hypothesis, which is not told.
        if self.options["beam_size"] > 1:
            return [None] * len(results)
        # A step for EOS, but where the limit is met without one.
        most = limits["max_decoding_length"]
        return [min(len(result.hypotheses[0]) + 1, most) for result in results]


class NumberPieces:
    """A vocabulary of numbers, for a model with random weights."""

    def __init__(self, size: int) -> None:
        self.names = [*NAMES, *(f"t{i}" for i in range(len(NAMES), size))]
        self.ids = {name: i for i, name in enumerate(self.names)}

    def get_piece_size(self) -> int:
        return len(self.names)

    def id_to_piece(self, index: int) -> str:
        return self.names[index]

    def piece_to_id(self, pieces: list[str]) -> list[int]:
        return [self.ids[piece] for piece in pieces]


class NumberTokenizer:
    """As much of a tokenizer as the export of a random model asks for."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = NumberPieces(source), NumberPieces(target)
        self.source_size, self.target_size = source, target

    def save(self, directory: Any) -> None:
        """There is nothing to write."""


def export(system: System, directory: str) -> None:
    """Writes the system's model in CTranslate2's format, in fp32."""
    from pynar.decoding import ctranslate2

    translator = load_translator(replace(system, device="cpu"))
    config = system.config
    tokenizer = translator.tokenizer or NumberTokenizer(
        config.source_vocabulary, config.target_vocabulary
    )
    ctranslate2.export(translator.model, cast(Any, tokenizer), directory)
    written = json.loads((Path(directory) / ctranslate2.FACTS).read_text(encoding="utf-8"))
    facts = {
        "parameters": sum(p.numel() for p in translator.model.parameters()),
        "longest": written["longest"],
    }
    (Path(directory) / FACTS).write_text(json.dumps(facts), encoding="utf-8")
