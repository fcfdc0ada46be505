"""The autoregressive Transformer: teacher, baseline and rescorer (Vaswani et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.data.batching import Batch
from pynar.models.base import Example, TransformerConfig, TranslationModel
from pynar.nn.transformer import DecoderCache, Memory
from pynar.symbols import BOS, EOS, PAD

__all__ = ["AutoregressiveConfig", "AutoregressiveTransformer"]


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(TransformerConfig):
    pass


class AutoregressiveTransformer(TranslationModel):
    """Predicts y_t from x and y_<t; decoded by greedy search, beam search or sampling."""

    Config: ClassVar[type[TransformerConfig]] = AutoregressiveConfig
    name = "autoregressive"
    strategies = ("beam", "greedy", "sampling")

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Example:
        """Shifts the target: inputs `<s> y`, labels `y </s>`."""
        inputs = F.pad(batch.target, (1, 0), value=BOS)
        labels = F.pad(batch.target, (0, 1), value=PAD)
        labels = labels.scatter(1, batch.target_lengths[:, None], EOS)
        return Example(batch, inputs, labels, {"token": (labels != PAD).sum()})

    def forward(self, example: Example) -> dict[str, Tensor]:
        batch = example.batch
        source, target, read, labels = self.pack(example, batch.target_lengths + 1, causal=True)
        x = self.embed_rows(self.target_embedding, target)
        states = self.decode_rows(x, target, self.encode_rows(source), batch.source_lengths, read)
        return {"token": self._token_loss(states, labels)}

    def score(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Log-probability `[B * n]` of each `target: [B * n, T]` (no BOS, no EOS) with its EOS.

        The n targets of a source follow each other and share its keys and values.
        """
        batch = Batch(source, source_lengths, target, target_lengths, target_lengths)
        example = self.corrupt(batch, torch.Generator(target.device))
        memory = self.encode(source, source_lengths)
        states = self.decoder(self.target_embedding(example.inputs), memory)
        rows = example.labels != PAD
        states, labels = states[rows], example.labels[rows]
        if torch.is_grad_enabled():
            log_probs = self.log_probs(states).gather(-1, labels[:, None])[:, 0]
        else:  # which `best` is made for
            log_probs = self.log_prob(states, labels, self.best(states)[2])
        return log_probs.new_zeros(rows.shape).masked_scatter(rows, log_probs).sum(-1)

    def step(self, tokens: Tensor, memory: Memory, cache: DecoderCache) -> Tensor:
        """Decoder states `[N, C]` from which the token after `tokens: [N]` follows."""
        x = self.target_embedding(tokens[:, None], start=cache.position)
        return self.decoder.step(x, memory, cache)[:, 0]
