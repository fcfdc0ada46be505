"""The best of many candidates by another model: noisy parallel decoding (Gu et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pynar.decoding.translator import LineTranslator, Translation, Translator
from pynar.symbols import PAD

__all__ = ["AutoregressiveScorer", "RescoringTranslator", "Scorer"]

# Sources, and for each its candidates, all as text; gives each candidate's score, higher is better.
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[Sequence[float]]]


class AutoregressiveScorer:
    """Scores candidates by log p(y | x) of an autoregressive model, all of its tokens in one pass.

    The sum over the tokens, the end of the sentence among them, is divided by their number to the
    power `length_penalty`; 1 gives the mean, by which beam search ranks, too. The model may have
    another tokenizer than the one that wrote the candidates. What has more tokens than it has
    positions for scores -inf.

    Args:
        translator: an autoregressive model, or JANUS, whose left-to-right half is asked.
        max_tokens: of the candidates that are scored at once, padding counted.
    """

    def __init__(
        self, translator: Translator, *, length_penalty: float = 1.0, max_tokens: int = 16384
    ) -> None:
        if not hasattr(translator.model, "score"):
            raise ValueError(
                "AutoregressiveScorer: `translator` must hold a model that goes from left to "
                f"right, got {translator.model.name}"
            )
        if max_tokens < 1:
            raise ValueError(
                f"AutoregressiveScorer: `max_tokens` must be positive, got {max_tokens}"
            )
        self.translator, self.length_penalty = translator, length_penalty
        self.max_tokens = max_tokens

    def __call__(
        self, sources: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        tokenizer = self.translator.tokenizer
        source_ids = tokenizer.encode_source(list(sources))
        longest = self.translator.model.longest
        if longest is not None and (most := max(map(len, source_ids), default=0)) >= longest:
            raise ValueError(
                f"AutoregressiveScorer: `sources` must have at most {longest - 1} tokens, "
                f"for which the model has positions, got {most}"
            )
        ids = [tokenizer.encode_target(list(texts)) for texts in candidates]
        scores: list[list[float]] = [[] for _ in sources]
        for rows in self._batches(ids):
            found = self._score([source_ids[i] for i in rows], [ids[i] for i in rows])
            for i, row in zip(rows, found, strict=True):
                scores[i] = row
        return scores

    def _batches(self, ids: list[list[list[int]]]) -> Iterator[list[int]]:
        """Sentences that are scored together, such as have about as many tokens."""
        batch: list[int] = []
        most = width = 0
        sizes = [max(map(len, rows), default=0) + 1 for rows in ids]
        for i in sorted(range(len(ids)), key=sizes.__getitem__):
            most, width = max(most, len(ids[i])), max(width, sizes[i])
            if batch and (len(batch) + 1) * most * width > self.max_tokens:
                yield batch
                batch, most, width = [], len(ids[i]), sizes[i]
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, sources: list[list[int]], ids: list[list[list[int]]]) -> list[list[float]]:
        model: Any = self.translator.model
        longest = math.inf if model.longest is None else model.longest - 1
        source, source_lengths = self.translator.batch(sources)
        # As many for each source, since its keys and values are shared by neighbouring rows.
        most = max(map(len, ids))
        target, lengths = self._rows(
            [row if len(row) <= longest else [] for rows in ids for row in _filled(rows, most)]
        )
        log_probs = model.score(source, source_lengths, target, lengths)
        means = log_probs / (lengths + 1.0) ** self.length_penalty
        found: list[list[float]] = means.view(len(ids), most).tolist()
        return [
            [
                score if len(row) <= longest else -math.inf
                for score, row in zip(scores, rows, strict=False)
            ]
            for scores, rows in zip(found, ids, strict=True)
        ]

    def _rows(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = [len(row) for row in ids]
        target = torch.full((len(ids), max(lengths, default=0)), PAD)
        for row, own in zip(target, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        device = self.translator.device
        return target.to(device), torch.tensor(lengths, device=device)


def _filled(rows: list[list[int]], count: int) -> list[list[int]]:
    return rows + [[]] * (count - len(rows))


class RescoringTranslator(LineTranslator):
    """A translator whose alternatives are put in order by a scorer; the best one is its result.

    `scorer` is a function of sources and candidates (see `Scorer`), or an autoregressive model's
    translator. How many candidates there are is the strategy's business: `npd` gives all that it
    draws, others as many as `n_best` says. One decoder pass more is counted.

    Example:
        student, teacher = pynar.load("runs/flowseq/best"), pynar.load("runs/teacher/best")
        RescoringTranslator(student, teacher).translate(lines, "npd", samples=10)
    """

    def __init__(self, translator: LineTranslator, scorer: Scorer | Translator) -> None:
        self.translator = translator
        self.model, self.tokenizer = translator.model, translator.tokenizer
        self.scorer = AutoregressiveScorer(scorer) if isinstance(scorer, Translator) else scorer

    @property
    def device(self) -> torch.device:
        return self.translator.device

    @property
    def engine(self) -> dict[str, str]:
        return self.translator.engine

    @property
    def digest(self) -> str:
        return self.translator.digest

    def _decode_batch(
        self, sources: list[Sequence[int]], names: list[int], decoding: Any
    ) -> list[Translation]:
        drafts = self.translator._decode_batch(sources, names, decoding)
        # A text that was found more than once is scored once.
        candidates = [list(dict.fromkeys(text for text, _ in d.alternatives)) for d in drafts]
        scores = self.scorer(self.tokenizer.decode_source(sources), candidates)
        if [len(row) for row in scores] != [len(row) for row in candidates]:
            raise ValueError(
                "RescoringTranslator: `scorer` must give a score for each candidate, "
                f"{[len(row) for row in candidates]}, got {[len(row) for row in scores]}"
            )
        results = []
        for draft, texts, row in zip(drafts, candidates, scores, strict=True):
            # The sort is stable: of equals the one that the model itself preferred.
            ranked = sorted(zip(texts, map(float, row), strict=True), key=lambda pair: -pair[1])
            text, score = ranked[0]
            passes = draft.passes + 1
            results.append(
                replace(draft, text=text, score=score, passes=passes, alternatives=ranked)
            )
        return results
