"""Text in, text out: a model, its tokenizer and a decoding strategy."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pynar import __version__
from pynar.data.tokenizer import Tokenizer
from pynar.decoding.autoregressive import BeamSearch, Greedy, Sampling
from pynar.decoding.draft_and_verify import DraftAndVerify
from pynar.decoding.hypotheses import Hypotheses
from pynar.decoding.latent import ImportanceWeighted, LatentArgmax, NoisyParallel
from pynar.decoding.mask_predict import MaskPredict
from pynar.models import TranslationModel
from pynar.strict import from_dict
from pynar.symbols import EOS, PAD

__all__ = [
    "STRATEGIES",
    "LineTranslator",
    "Strategy",
    "Translation",
    "Translator",
    "strategy",
    "weights_digest",
]

_SENTENCE_END = re.compile(r"[.!?;:,]$")


class Strategy(Protocol):
    """A decoding strategy: typed options and this one method."""

    def decode(
        self,
        model: Any,
        source: Tensor,
        source_lengths: Tensor,
        *,
        indices: Tensor | None = None,
    ) -> Hypotheses: ...


STRATEGIES: dict[str, type[Strategy]] = {
    "beam": BeamSearch,
    "greedy": Greedy,
    "sampling": Sampling,
    "mask_predict": MaskPredict,
    "draft_and_verify": DraftAndVerify,
    "latent_argmax": LatentArgmax,
    "npd": NoisyParallel,
    "iwd": ImportanceWeighted,
}


def strategy(
    model: TranslationModel | Any, name: str | None = None, options: dict[str, Any] | None = None
) -> Strategy:
    """Makes the named strategy, or the model's first one, with `options`.

    Raises:
        ValueError: a strategy that the model does not have, or an option that the strategy does
            not have; both list what there is.
    """
    chosen = model.strategies[0] if name is None else name
    if chosen not in model.strategies:
        raise ValueError(
            f"`strategy` of a {model.name} model must be one of "
            f"{', '.join(model.strategies)}, got {chosen!r}"
        )
    return from_dict(STRATEGIES[chosen], {**model.decoding_defaults, **(options or {})})


@dataclass(frozen=True)
class Translation:
    """One line's result. `alternatives` are the n best texts with their scores, best first.

    `accepted` and `verified` are those of `Hypotheses`; 0 where nothing is drafted.
    """

    text: str
    score: float
    passes: int
    alternatives: list[tuple[str, float]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    accepted: int = 0
    verified: int = 0


def weights_digest(model: TranslationModel) -> str:
    """SHA-256 over the names and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


class LineTranslator:
    """What every engine does with lines of text: cuts, sorts and batches them.

    An engine is a subclass that decodes one batch of token ids and says what it is.
    """

    model: Any  # has `name`, `strategies`, `decoding_defaults` and `longest`
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def engine(self) -> dict[str, str]:
        """What computes: `name`, `version` and `compute_type`, for manifests and reports."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """`weights_digest` of the model, whichever engine runs it."""
        raise NotImplementedError

    def _decode_batch(
        self, sources: list[Sequence[int]], names: list[int], decoding: Any
    ) -> list[Translation]:
        raise NotImplementedError

    def translate(
        self, lines: Sequence[str], strategy: Strategy | str | None = None, **options: Any
    ) -> list[str]:
        """The best translation of every line.

        `strategy` is an object, a name, or None for the model's own; `options` are the fields of
        the strategy (`iterations=4`, `beam=5`, ...), checked as strictly as if they were written
        in its constructor.

        Example: `pynar.load("runs/cmlm/best").translate(["Guten Tag."], iterations=4)`
        """
        return [result.text for result in self.decode(lines, strategy, options=options)]

    def decode(
        self,
        lines: Sequence[str],
        strategy: Strategy | str | None = None,
        *,
        options: dict[str, Any] | None = None,
        max_tokens: int = 4096,
        max_source_tokens: int = 200,
        on_long: str = "split",
    ) -> list[Translation]:
        """Translations with scores, alternatives and passes.

        Lines of more than `max_source_tokens`, or more than the model has positions for, are cut
        at punctuation or spaces and translated piecewise (`on_long="split"`; they have no other
        alternative), or refused (`"error"`, which names the line).
        """
        if isinstance(lines, str):
            raise ValueError("`lines` must be a sequence of strings, got one string")
        if on_long not in ("split", "error"):
            raise ValueError(f"`on_long` must be one of split, error, got {on_long!r}")
        if max_tokens < 1 or max_source_tokens < 1:
            raise ValueError("`max_tokens` and `max_source_tokens` must be positive")
        if self.model.longest is not None:
            max_source_tokens = min(max_source_tokens, max(self.model.longest - 1, 1))  # and EOS
        decoding = self.strategy(strategy, options)
        lines = list(lines)
        pieces: list[list[int]] = []
        owners: list[int] = []
        for number, line in enumerate(lines):
            for ids in self._pieces(line, number, max_source_tokens, on_long):
                pieces.append(ids)
                owners.append(number)
        parts: list[list[Translation]] = [[] for _ in lines]
        results = self.decode_ids(pieces, decoding, max_tokens=max_tokens)
        for owner, result in zip(owners, results, strict=True):
            parts[owner].append(result)
        return [_join(part) for part in parts]

    def decode_ids(
        self,
        sources: Sequence[Sequence[int]],
        strategy: Strategy,
        *,
        names: Sequence[int] | None = None,
        max_tokens: int = 4096,
    ) -> list[Translation]:
        """Translations of source ids without EOS; no source may be empty.

        `names` are numbers for the sentences, from which `Sampling` draws; their places if None.
        A sentence counts `strategy.drafts` times, where a strategy has them (NPD, IWD).
        """
        names = range(len(sources)) if names is None else names
        max_tokens = max(max_tokens // getattr(strategy, "drafts", 1), 1)
        results: list[Translation | None] = [None] * len(sources)
        for batch in _batches([len(ids) for ids in sources], max_tokens):
            decoded = self._decode_batch(
                [sources[i] for i in batch], [names[i] for i in batch], strategy
            )
            for i, result in zip(batch, decoded, strict=True):
                results[i] = result
        return results  # type: ignore[return-value]

    def strategy(
        self, chosen: Strategy | str | None = None, options: dict[str, Any] | None = None
    ) -> Strategy:
        """The strategy that `translate` would use for these arguments."""
        if chosen is None or isinstance(chosen, str):
            return strategy(self.model, chosen, options)
        if options:
            raise ValueError(
                f"options belong into the strategy object, got {', '.join(options)} beside one"
            )
        for name, kind in STRATEGIES.items():
            if type(chosen) is kind and name not in self.model.strategies:
                raise ValueError(
                    f"`strategy` of a {self.model.name} model must be one of "
                    f"{', '.join(self.model.strategies)}, got {name!r}"
                )
        return chosen

    def _pieces(self, line: str, number: int, limit: int, on_long: str) -> Iterator[list[int]]:
        # Of spaces alone; the tokenizer would take a tab for an unknown word.
        ids = self.tokenizer.encode_source([line])[0] if line.strip() else []
        if len(ids) <= limit:
            if ids:
                yield ids
            return
        if on_long == "error":
            raise ValueError(
                f"line {number + 1} has {len(ids)} tokens, more than `max_source_tokens` or the "
                f"model allow ({limit}); split it, or ask for on_long='split'"
            )
        yield from self._split(line, limit)

    def _split(self, line: str, limit: int) -> Iterator[list[int]]:
        """Cuts at the last punctuation within the limit, else at the last space, else anywhere."""
        words = line.split()
        sizes = [len(ids) for ids in self.tokenizer.encode_source(words)]
        start = 0
        while start < len(words):
            stop, total = start, 0
            while stop < len(words) and (total + sizes[stop] <= limit or stop == start):
                total += sizes[stop]
                stop += 1
            if stop < len(words):
                ends = [i for i in range(start, stop) if _SENTENCE_END.search(words[i])]
                # A cut in the first half would make more and shorter pieces than needed.
                if ends and ends[-1] - start >= (stop - start) // 2:
                    stop = ends[-1] + 1
            ids = self.tokenizer.encode_source([" ".join(words[start:stop])])[0]
            # Only a single word can still be too long, or a piece by a token at its seams.
            for offset in range(0, len(ids), limit):
                yield ids[offset : offset + limit]
            start = stop


class Translator(LineTranslator):
    """Translates lines of text with one model: `Translator(model, tokenizer).translate(lines)`.

    Lines are sorted by length and batched by tokens; results come back in order and do not
    depend on the batch. Empty lines, and lines of nothing but spaces, give empty lines.
    """

    model: TranslationModel

    def __init__(
        self, model: TranslationModel, tokenizer: Tokenizer, *, digest: str | None = None
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._digest = digest

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def engine(self) -> dict[str, str]:
        kind = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        if self.model.frozen:
            kind = f"{self.model.frozen}, frozen"
        return {"name": "pynar", "version": __version__, "compute_type": kind}

    @property
    def digest(self) -> str:
        return self._digest or weights_digest(self.model)

    def freeze(self, dtype: str = "fp32") -> Translator:
        """A translator with the model frozen for fast inference; see `TranslationModel.freeze`."""
        # Packed weights are no longer those that a digest names.
        return Translator(self.model.freeze(dtype), self.tokenizer, digest=self.digest)

    def to(self, device: torch.device | str) -> Translator:
        self.model.to(device)
        return self

    def batch(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids as `source: [B, S]` with EOS, and `lengths: [B]`, on the model's device."""
        lengths = torch.tensor([len(ids) + 1 for ids in sources])
        source = torch.full((len(sources), int(lengths.max())), PAD)
        for row, ids in zip(source, sources, strict=True):
            row[: len(ids) + 1] = torch.tensor([*ids, EOS])
        return source.to(self.device), lengths.to(self.device)

    def _decode_batch(
        self, sources: list[Sequence[int]], names: list[int], decoding: Strategy
    ) -> list[Translation]:
        source, lengths = self.batch(sources)
        hypotheses = decoding.decode(self.model, source, lengths, indices=torch.tensor(names))
        text = self.tokenizer.decode_target
        texts = [text(rows) for rows in hypotheses.lists()]
        scores, passes = hypotheses.scores.tolist(), hypotheses.passes.tolist()
        traces = [self._trace(hypotheses, row) for row in range(len(sources))]
        drafts = [
            [0] * len(sources) if counts is None else counts.tolist()
            for counts in (hypotheses.accepted, hypotheses.verified)
        ]
        results = []
        for t, s, p, trace, *draft in zip(texts, scores, passes, traces, *drafts, strict=True):
            # A place that scores -inf holds no hypothesis.
            found = [pair for pair in zip(t, s, strict=True) if pair[1] > -math.inf]
            results.append(Translation(t[0], s[0], p, found or [(t[0], s[0])], trace, *draft))
        return results

    def _trace(self, hypotheses: Hypotheses, row: int) -> list[str]:
        length = int(hypotheses.lengths[row, 0]) if hypotheses.trace else 0
        piece = self.tokenizer.target.id_to_piece
        return [
            " ".join(piece(i) for i in state[row, :length].tolist()) for state in hypotheses.trace
        ]


def _batches(sizes: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups similar sizes so that rows x longest stays within `max_tokens`; longest first."""
    batch: list[int] = []
    width = 0
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        width = width or sizes[index] + 1
        if batch and (len(batch) + 1) * width > max_tokens:
            yield batch
            batch, width = [], sizes[index] + 1
        batch.append(index)
    if batch:
        yield batch


def _join(parts: list[Translation]) -> Translation:
    """One line's translation from those of its pieces."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Translation("", 0.0, 0)
    text = " ".join(part.text for part in parts)
    score = sum(part.score for part in parts) / len(parts)
    passes, accepted, verified = (
        sum(getattr(part, name) for part in parts) for name in ("passes", "accepted", "verified")
    )
    return Translation(text, score, passes, [(text, score)], [], accepted, verified)
