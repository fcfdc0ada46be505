"""Validation: the loss on all processes, and BLEU on the first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sacrebleu
import torch
from lightning_fabric import Fabric
from torch import nn

from pynar.data import Batches, Corpus, Tokenizer
from pynar.training.config import TrainingConfig
from pynar.training.seeds import VALIDATION, seed_device, seeds
from pynar.training.update import Updater

__all__ = ["Figures", "Translate", "Validator"]

Translate = Callable[[nn.Module, Tokenizer, Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Figures:
    """One validation: the mean of every loss term, their weighted sum, and BLEU if wanted.

    `more` is what the model itself says of the first batch.
    """

    losses: dict[str, float]
    loss: float
    bleu: float | None
    more: dict[str, float]

    def score(self, metric: str) -> float:
        """The chosen metric, so that higher is better; what is not a number is worst."""
        value = self.bleu if metric == "bleu" else -self.loss
        return -math.inf if value is None or math.isnan(value) else value


class Validator:
    """Measures a model on the validation split, always with the same noise.

    Args:
        translate: called on rank 0 with the model in evaluation mode, the tokenizer and source
            sentences; returns their translations. None leaves BLEU out.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: TrainingConfig,
        corpus: Corpus,
        tokenizer: Tokenizer,
        translate: Translate | None,
    ) -> None:
        self._fabric, self._config = fabric, config
        self._corpus, self._tokenizer, self._translate = corpus, tokenizer, translate
        self._batches = Batches(
            corpus,
            max_tokens=config.validation_max_tokens or config.max_tokens,
            shuffle=False,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )

    def __call__(self, updater: Updater) -> Figures:
        updater.module.eval()
        try:
            with torch.no_grad():
                losses, more = self._losses(updater)
                bleu = self._bleu(updater) if self._translate is not None else None
        finally:
            updater.module.train()
        weights = updater.model.loss_weights
        loss = sum(weights[term] * loss for term, loss in losses.items())
        return Figures(losses, loss, bleu, more)

    def _losses(self, updater: Updater) -> tuple[dict[str, float], dict[str, float]]:
        device = self._fabric.device
        totals = torch.zeros(2, len(updater.terms), dtype=torch.float64, device=device)
        generator = torch.Generator(device)
        more: dict[str, float] = {}
        for i, batch in enumerate(self._batches.epoch(0)):
            place = (self._config.seed, VALIDATION, 0, self._fabric.global_rank)
            noise, other = seeds(*place, i)
            seed_device(device, other)
            example = updater.model.corrupt(batch.to(device), generator.manual_seed(noise))
            totals[0] += updater.forward(example)
            totals[1] += updater.counts(example)
            diagnose = getattr(updater.model, "diagnose", None)
            if i == 0 and diagnose is not None:
                with updater.whole(only_first=True):
                    more = diagnose(example) if self._fabric.is_global_zero else {}
        sums, counts = updater.reduce(totals).tolist()
        means = [s / c if c else math.nan for s, c in zip(sums, counts, strict=True)]
        return dict(zip(updater.terms, means, strict=True)), more

    def _bleu(self, updater: Updater) -> float:
        with updater.whole(only_first=True):
            bleu = self._measure(updater.model) if self._fabric.is_global_zero else 0.0
        return self._fabric.broadcast(bleu)

    def _measure(self, model: nn.Module) -> float:
        count = min(len(self._corpus), self._config.validation_sentences or len(self._corpus))
        sources, references = self._text(count)
        assert self._translate is not None
        hypotheses = list(self._translate(model, self._tokenizer, sources))
        if len(hypotheses) != count:
            raise ValueError(
                f"`translate` must return a translation a sentence, {count}, got {len(hypotheses)}"
            )
        return sacrebleu.corpus_bleu(hypotheses, [references]).score

    def _text(self, count: int) -> tuple[list[str], list[str]]:
        """Source and target of the first sentences; of the pieces where no text was kept."""
        if self._corpus.has_text:
            sources, references = zip(*(self._corpus.text(i) for i in range(count)), strict=True)
            return list(sources), list(references)
        pairs = list(itertools.islice(self._corpus, count))
        return (
            self._tokenizer.decode_source(pair[0].tolist() for pair in pairs),
            self._tokenizer.decode_target(pair[1].tolist() for pair in pairs),
        )
