"""Autoregressive models run by CTranslate2, a C++ engine for Transformers on CPU.

`export` writes a model once in the engine's format; `CTranslate2Translator` translates with it.
Needs the optional package: `pip install 'pynar[ctranslate2]'`.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pynar import __version__
from pynar.data.atomic import replace_directory, temporary_sibling
from pynar.data.tokenizer import Tokenizer
from pynar.decoding.autoregressive import BeamSearch, Greedy, length_limits
from pynar.decoding.translator import (
    LineTranslator,
    Strategy,
    Translation,
    Translator,
    weights_digest,
)
from pynar.models import AutoregressiveTransformer, TranslationModel
from pynar.nn.embedding import Embedding
from pynar.symbols import EOS

__all__ = ["CTranslate2Translator", "export", "is_exported", "why_not"]

FACTS, FORMAT = "pynar.json", 1

# The engine adds positions from a table of fixed size; ours grows, so sinusoids get some to spare.
SINUSOIDS = 2048

# The logit of a symbol that is never produced. Its probability is zero in fp32, and the number is
# still finite in fp16.
NEVER = -3e4


def _engine() -> Any:
    """The module `ctranslate2`, imported when it is first needed."""
    try:
        return importlib.import_module("ctranslate2")
    except ImportError as error:
        raise ImportError(
            f"CTranslate2 cannot be imported ({error}); pip install 'pynar[ctranslate2]'"
        ) from error


def export(
    model: TranslationModel,
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    quantization: str | None = None,
) -> None:
    """Writes an `AutoregressiveTransformer` as a CTranslate2 model, with its tokenizer beside it.

    Sources are pieces without EOS, which the engine appends; <pad>, <s> and <mask> are never
    produced. Positions end at the model's learned ones, or at 2,048 sinusoids at least.

    Args:
        model: any configuration of `AutoregressiveTransformer`.
        tokenizer: the model's.
        directory: appears whole or not at all.
        quantization: how weights are stored, e.g. "int8", "float16"; fp32 as trained if None.

    Raises:
        ValueError: another kind of model, a tokenizer of another size, an unknown quantization.
        FileExistsError: `directory` exists.
        ImportError: CTranslate2 is not installed.
    """
    if not isinstance(model, AutoregressiveTransformer):
        raise ValueError(
            "export: `model` must be an autoregressive Transformer, the only kind that "
            f"CTranslate2 runs, got {getattr(model, 'name', type(model).__name__)!r}"
        )
    config, directory = model.config, Path(directory)
    sizes = (tokenizer.source_size, tokenizer.target_size)
    if sizes != (config.source_vocabulary, config.target_vocabulary):
        raise ValueError(
            f"export: `tokenizer` must have the model's {config.source_vocabulary} source and "
            f"{config.target_vocabulary} target pieces, got {sizes[0]} and {sizes[1]}"
        )
    known = _engine().specs.model_spec.ACCEPTED_MODEL_TYPES
    if quantization is not None and quantization not in known:
        raise ValueError(
            f"export: `quantization` must be one of {', '.join(known)}, got {quantization!r}"
        )
    if directory.exists():
        raise FileExistsError(f"{directory} exists; remove it, or choose another output")
    spec = _spec(model)
    spec.register_source_vocabulary(_pieces(tokenizer.source))
    spec.register_target_vocabulary(_pieces(tokenizer.target))
    spec.validate()
    spec.optimize(quantization=quantization)
    facts = {
        "format": FORMAT,
        "pynar": __version__,
        "weights": weights_digest(model),
        "longest": len(_positions(model.source_embedding)),
    }
    with temporary_sibling(directory) as temporary:
        spec.save(os.fspath(temporary))
        tokenizer.save(temporary)
        (temporary / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        replace_directory(temporary, directory)


def _pieces(processor: Any) -> list[str]:
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def _spec(model: AutoregressiveTransformer) -> Any:
    specs, config = _engine().specs, model.config
    # `F.gelu` is the exact one, without tanh.
    activations = {"relu": specs.Activation.RELU, "gelu": specs.Activation.GELU}
    spec = specs.TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.heads,
        pre_norm=config.norm == "pre",
        activation=activations[config.activation],
        layernorm_embedding=config.embedding_norm,
    )
    spec.config.add_source_eos = True
    _set_embedding(spec.encoder.embeddings[0], spec.encoder, model.source_embedding)
    _set_embedding(spec.decoder.embeddings, spec.decoder, model.target_embedding)
    spec.decoder.projection.weight = spec.decoder.embeddings.weight
    spec.decoder.projection.bias = torch.zeros(config.target_vocabulary)
    spec.decoder.projection.bias[list(model.banned)] = NEVER
    for stack, ours in ((spec.encoder, model.encoder), (spec.decoder, model.decoder)):
        stack.scale_embeddings = config.embedding_scale
        if config.norm == "pre":
            _set_norm(stack.layer_norm, ours.norm)
        for target, layer in zip(stack.layer, ours.layers, strict=True):
            _set_layer(target, layer)
    return spec


def _set_layer(spec: Any, layer: Any) -> None:
    """An encoder layer, or a decoder layer, which attends to the source as well."""
    norms = [residual.norm for residual in layer.residual]
    attention = layer.self_attention
    _set_attention(spec.self_attention, norms[0], [attention.qkv, attention.output])
    if len(norms) == 3:
        attention = layer.cross_attention
        linear = [attention.query, attention.key_value, attention.output]
        _set_attention(spec.attention, norms[1], linear)
    _set_norm(spec.ffn.layer_norm, norms[-1])
    _set_linear(spec.ffn.linear_0, layer.feed_forward.inner)
    _set_linear(spec.ffn.linear_1, layer.feed_forward.outer)


def _set_attention(spec: Any, norm: nn.LayerNorm, layers: list[nn.Linear]) -> None:
    _set_norm(spec.layer_norm, norm)
    for target, layer in zip(spec.linear, layers, strict=True):
        _set_linear(target, layer)


def _set_linear(spec: Any, layer: nn.Linear) -> None:
    spec.weight, spec.bias = _copy(layer.weight), _copy(layer.bias)


def _set_norm(spec: Any, norm: Any) -> None:
    spec.gamma, spec.beta = _copy(norm.weight), _copy(norm.bias)


def _set_embedding(spec: Any, stack: Any, embedding: Embedding) -> None:
    spec.weight = _copy(embedding.tokens.weight)
    stack.position_encodings.encodings = _copy(_positions(embedding))
    if isinstance(embedding.norm, nn.LayerNorm):
        _set_norm(stack.layernorm_embedding, embedding.norm)


def _positions(embedding: Embedding) -> Tensor:
    rows = embedding.max_length
    return embedding.positions(0, rows if embedding.learned is not None else max(rows, SINUSOIDS))


def _copy(tensor: Tensor) -> Tensor:
    # Not a view: the engine's converter quantizes in place.
    return tensor.detach().float().cpu().clone()


@dataclass(frozen=True)
class _Model:
    """What a `LineTranslator` asks a model for."""

    longest: int
    name: ClassVar[str] = "CTranslate2"
    strategies: ClassVar[tuple[str, ...]] = ("beam", "greedy")
    decoding_defaults: ClassVar[dict[str, Any]] = {}


@dataclass(frozen=True)
class _Search:
    """A strategy in the engine's words."""

    beam: int
    length_penalty: float
    n_best: int
    limits: list[int]


@dataclass(frozen=True)
class _Found:
    """A hypothesis, and whether the engine ended it with EOS."""

    tokens: list[int]
    score: float
    ended: bool


class CTranslate2Translator(LineTranslator):
    """Translates lines of text on the CPU with a model that `export` wrote.

    The face of `Translator`, for `Greedy` and `BeamSearch`: in fp32 the same hypotheses with the
    same scores, but for ties of rounding. `passes` are the engine's steps. What differs:

    - `BeamSearch(early_stop=False)` and `Sampling` are refused: the engine has no such search,
      and its random numbers depend on the batch.
    - Positions end where the exported table does, so longer lines are cut.
    - Where a search meets the length limit, the unfinished hypotheses of the last step are ended
      there at the price of EOS, as ours are; but those which took the places of finished ones
      in that very step are missing.

    Args:
        directory: written by `export`.
        compute_type: "default" is as the weights are stored; others, as far as the processor
            supports them, are converted when loading: "float32", "int8", "int8_float32", ...
        threads: of a batch (intra_threads); as many as PyTorch uses if None.
        workers: batches at a time (inter_threads), each with its `threads`.

    Raises:
        OSError: `directory` holds no exported model, or a damaged one.
        ValueError: a compute type that does not exist here, or no threads.
        ImportError: CTranslate2 is not installed.
    """

    model: _Model

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        compute_type: str = "default",
        threads: int | None = None,
        workers: int = 1,
    ) -> None:
        engine, directory = _engine(), Path(directory)
        threads = torch.get_num_threads() if threads is None else threads
        for name, value in (("threads", threads), ("workers", workers)):
            if value < 1:
                raise ValueError(f"CTranslate2Translator: `{name}` must be positive, got {value}")
        known = ["default", "auto", *sorted(engine.get_supported_compute_types("cpu"))]
        if compute_type not in known:
            raise ValueError(
                "CTranslate2Translator: `compute_type` must be, on this processor, one of "
                f"{', '.join(known)}, got {compute_type!r}"
            )
        facts = _read_facts(directory)
        self.tokenizer = Tokenizer.load(directory)
        self.model, self._digest = _Model(facts["longest"]), facts["weights"]
        self.workers = workers
        try:
            self._translator = engine.Translator(
                os.fspath(directory),
                device="cpu",
                compute_type=compute_type,
                intra_threads=threads,
                inter_threads=workers,
            )
        except RuntimeError as error:
            raise OSError(f"{directory}: CTranslate2 cannot load the model: {error}") from error
        self._source = _pieces(self.tokenizer.source)
        self._target = _pieces(self.tokenizer.target)
        self._ids = {piece: index for index, piece in enumerate(self._target)}

    @classmethod
    def of(cls, translator: Translator, **options: Any) -> CTranslate2Translator:
        """Another engine for a loaded model: exports it for the moment and reads it back."""
        with tempfile.TemporaryDirectory(prefix="pynar-") as place:
            export(translator.model, translator.tokenizer, Path(place) / "model")
            return cls(Path(place) / "model", **options)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def engine(self) -> dict[str, str]:
        kind = self._translator.compute_type
        return {"name": "ctranslate2", "version": _engine().__version__, "compute_type": kind}

    @property
    def digest(self) -> str:
        return self._digest

    def strategy(
        self, chosen: Strategy | str | None = None, options: dict[str, Any] | None = None
    ) -> Strategy:
        made = super().strategy(chosen, options)
        _search(made, [], self.model.longest)
        return made

    def _decode_batch(
        self, sources: list[Sequence[int]], names: list[int], decoding: Strategy
    ) -> list[Translation]:
        lengths = [len(ids) + 1 for ids in sources]  # and EOS
        if max(lengths) > self.model.longest:
            raise ValueError(
                f"CTranslate2Translator: a sequence of {max(lengths)} tokens is longer than the "
                f"{self.model.longest} positions of the exported model; split it"
            )
        search = _search(decoding, lengths, self.model.longest)
        pieces = [[self._source[i] for i in ids] for ids in sources]
        found = self._run(pieces, search, max(search.limits))
        # The engine knows one limit a call, so those who come to their own are ended anew,
        # together with others of the same limit: nobody's result depends on the batch.
        limited: dict[int, list[int]] = {}
        for row, limit in enumerate(search.limits):
            if _steps(found[row]) >= limit:
                limited.setdefault(limit, []).append(row)
        for limit, rows in limited.items():
            if search.beam == 1:
                cut = [[_Found(found[row][0].tokens[: limit - 1], 0.0, False)] for row in rows]
            else:
                cut = self._run_to([pieces[row] for row in rows], search, limit)
            for row, hypotheses in zip(rows, cut, strict=True):
                found[row] = hypotheses
        self._end(pieces, found, search.length_penalty)
        return [self._translation(hypotheses, search.n_best) for hypotheses in found]

    def _run_to(self, pieces: list[list[str]], search: _Search, limit: int) -> list[list[_Found]]:
        """Hypotheses of beams that come to `limit`; unfinished ones leave EOS its place there."""
        if limit == 1:
            return [[_Found([], 0.0, False)] for _ in pieces]
        # Before the limit not even `beam` of them have ended, so the patience changes nothing but
        # how many the engine returns: these, and all that were alive.
        return self._run(pieces, search, limit - 1, patience=2)

    def _run(
        self, pieces: list[list[str]], search: _Search, max_length: int, patience: int = 1
    ) -> list[list[_Found]]:
        results = self._translator.translate_batch(
            pieces,
            max_batch_size=-(-len(pieces) // self.workers),
            beam_size=search.beam,
            # All of them, as the latest tells how long the search went on.
            num_hypotheses=patience * search.beam,
            patience=patience,
            # At exactly 0 the engine stops by another rule; a power this small is 1 in fp32.
            length_penalty=search.length_penalty or 1e-12,
            min_decoding_length=0,
            max_decoding_length=max_length,
            max_input_length=0,
            return_scores=True,
            return_end_token=True,
        )
        found = []
        for result in results:
            rows = [[self._ids[piece] for piece in row] for row in result.hypotheses]
            found.append([_hypothesis(*pair) for pair in zip(rows, result.scores, strict=True)])
        return found

    def _end(
        self, pieces: list[list[str]], found: list[list[_Found]], length_penalty: float
    ) -> None:
        """Ends what the limit cut, in place, and puts the hypotheses into their order again."""
        places = [
            (row, place)
            for row, hypotheses in enumerate(found)
            for place, hypothesis in enumerate(hypotheses)
            if not hypothesis.ended
        ]
        if not places:
            return
        results = self._translator.score_batch(
            [pieces[row] for row, _ in places],
            [[self._target[i] for i in found[row][place].tokens] for row, place in places],
            # Of every token there are logits over the whole vocabulary, which need room.
            max_batch_size=1024,
            batch_type="tokens",
            max_input_length=0,
        )
        for (row, place), result in zip(places, results, strict=True):
            score = sum(result.log_probs) / len(result.log_probs) ** length_penalty
            found[row][place] = _Found(found[row][place].tokens, score, True)
        for row in {row for row, _ in places}:
            found[row].sort(key=lambda hypothesis: -hypothesis.score)

    def _translation(self, hypotheses: list[_Found], n_best: int) -> Translation:
        # In a tiny vocabulary even symbols that are never produced come among the best.
        never = AutoregressiveTransformer.banned
        best = [found for found in hypotheses if not any(i in never for i in found.tokens)]
        best = (best or hypotheses)[:n_best]
        texts = self.tokenizer.decode_target([found.tokens for found in best])
        alternatives = [(text, found.score) for text, found in zip(texts, best, strict=True)]
        return Translation(*alternatives[0], _steps(hypotheses), alternatives)


def _search(decoding: Strategy, lengths: list[int], longest: int) -> _Search:
    """The options for sources of `lengths` (EOS counted), or an error that says what is missing."""
    if not isinstance(decoding, Greedy | BeamSearch):
        raise ValueError(
            "CTranslate2Translator: `strategy` must be Greedy or BeamSearch, got "
            f"{type(decoding).__name__}; the engine 'pynar' has it"
        )
    limits = length_limits(
        torch.tensor(lengths), decoding.max_ratio, decoding.max_extra, longest
    ).tolist()
    if isinstance(decoding, Greedy):
        return _Search(1, 1.0, 1, limits)
    if not decoding.early_stop:
        raise ValueError(
            "CTranslate2Translator: `early_stop` of BeamSearch must be true, got False; the "
            "engine 'pynar' has such a search"
        )
    return _Search(decoding.beam, decoding.length_penalty, decoding.n_best, limits)


def _hypothesis(tokens: list[int], score: float) -> _Found:
    ended = bool(tokens) and tokens[-1] == EOS
    return _Found(tokens[:-1] if ended else tokens, score, ended)


def _steps(hypotheses: list[_Found]) -> int:
    """Steps of the decoder that a search took: it ends with its latest hypothesis."""
    return max(len(found.tokens) + found.ended for found in hypotheses)


def why_not(translator: Translator, decoding: Strategy) -> str | None:
    """What keeps CTranslate2 from taking this translator's place, or None where nothing does."""
    if not isinstance(translator.model, AutoregressiveTransformer):
        return f"CTranslate2 runs autoregressive models, not a {translator.model.name} model"
    if translator.device.type != "cpu":
        return f"CTranslate2 is used on the CPU, not on {translator.device}"
    try:
        _search(decoding, [1], SINUSOIDS)
        _engine()
    except (ValueError, ImportError) as error:
        return str(error)
    return None


def is_exported(directory: str | os.PathLike[str]) -> bool:
    """Whether `export` wrote this directory."""
    return (Path(directory) / FACTS).is_file()


def _read_facts(directory: Path) -> dict[str, Any]:
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(
            f"{directory}: is no model written by `pynar export`, it has no {FACTS}"
        ) from None
    except ValueError as error:
        raise OSError(f"{directory / FACTS}: is damaged ({error})") from None
    if facts.get("format") != FORMAT:
        raise OSError(
            f"{directory / FACTS}: has format {facts.get('format')}, this version of PyNAR "
            f"reads {FORMAT}"
        )
    return facts
