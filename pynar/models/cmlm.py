"""The conditional masked language model (Ghazvininejad et al. 2019): MaskT, Mask-Predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pynar.data.batching import Batch
from pynar.models.base import Example, TransformerConfig, TranslationModel
from pynar.nn.attention import padding_mask
from pynar.nn.length import LengthPredictor
from pynar.nn.packed import PackedRows
from pynar.nn.transformer import Memory
from pynar.symbols import BOS, EOS, MASK, PAD

__all__ = ["CMLM", "CMLMConfig", "uniform_masking"]


@dataclass(frozen=True, kw_only=True)
class CMLMConfig(TransformerConfig):
    length_kind: str = "absolute"
    length_pooling: str = "mean"
    length_classes: int = 256
    length_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"length_kind": LengthPredictor.KINDS, "length_pooling": LengthPredictor.POOLINGS}
        for field, known in choices.items():
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"`{field}` must be one of {', '.join(known)}, got {value!r}")
        if self.length_classes < 1:
            raise ValueError(f"`length_classes` must be positive, got {self.length_classes}")
        if not self.length_weight >= 0:
            raise ValueError(f"`length_weight` must not be negative, got {self.length_weight}")


def uniform_masking(target: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Chooses which tokens to mask, boolean `[B, T]`: K of n, K uniform in 1 ... n.

    K and the places are drawn a sentence at a time (Ghazvininejad et al. 2019, section 3.2).
    """
    device = target.device
    live = padding_mask(lengths, target.shape[1])[:, 0, 0]
    draw = torch.rand(target.shape, generator=generator, device=device)
    order = draw.masked_fill(~live, 2.0).argsort(1).argsort(1)
    share = torch.rand(target.shape[0], generator=generator, device=device, dtype=torch.float64)
    count = (share * lengths).floor() + 1
    return (order < count[:, None]) & live


class CMLM(TranslationModel):
    """Predicts masked tokens from the source and the other tokens, all at once."""

    Config: ClassVar[type[TransformerConfig]] = CMLMConfig
    name = "cmlm"
    strategies: tuple[str, ...] = ("mask_predict",)
    banned: ClassVar[tuple[int, ...]] = (PAD, BOS, EOS, MASK)

    config: CMLMConfig

    def __init__(self, config: CMLMConfig) -> None:
        super().__init__(config)
        self.length = LengthPredictor(
            config.dim,
            kind=config.length_kind,
            classes=config.length_classes,
            pooling=config.length_pooling,
            longest=self.longest,
        )
        self.length.apply(self._initialise)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"token": 1.0, "length": self.config.length_weight}

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Example:
        masked = uniform_masking(batch.target, batch.target_lengths, generator)
        return self._example(batch, masked)

    def _example(self, batch: Batch, masked: Tensor) -> Example:
        inputs = batch.target.masked_fill(masked, MASK)
        labels = batch.target.masked_fill(~masked, PAD)
        sentences = torch.tensor(batch.target.shape[0], device=labels.device)
        return Example(batch, inputs, labels, {"token": masked.sum(), "length": sentences})

    def forward(self, example: Example) -> dict[str, Tensor]:
        batch = example.batch
        source, target, read, labels = self.pack(example, batch.target_lengths)
        encoded = self.encode_rows(source)
        x = self._embed_inputs(batch, target)
        states = self.decode_rows(x, target, encoded, batch.source_lengths, read)
        return {
            "token": self._token_loss(states, labels),
            "length": self._length_loss(batch, source, encoded),
        }

    def _embed_inputs(self, batch: Batch, target: PackedRows) -> Tensor:
        """What the decoder begins with, `[N, C]`."""
        return self.embed_rows(self.target_embedding, target)

    def _length_loss(self, batch: Batch, source: PackedRows, encoded: Tensor) -> Tensor:
        """That of a batch, from its `encoded: [S, C]` rows."""
        sentences, width = batch.source.shape
        padded = encoded.new_zeros(sentences * width, encoded.shape[1])
        padded = padded.index_copy(0, source.sentence * width + source.positions, encoded)
        return self.length.loss(
            padded.view(sentences, width, encoded.shape[1]),
            batch.source_lengths,
            batch.target_lengths,
        )

    def decode(
        self, tokens: Tensor, lengths: Tensor, memory: Memory, wanted: Tensor | None = None
    ) -> Tensor:
        """Decoder states `[B * n, T, C]` of partially masked `tokens: [B * n, T]`.

        With boolean `wanted: [B * n, T]` only those of the positions it marks, `[N, C]`.
        """
        return self.decoder(self.dropout(self.target_embedding(tokens)), memory, lengths, wanted)

    def fill(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable tokens of masked positions' `states: [N, C]`, and log-probabilities."""
        tokens, log_probs, _ = self.best(states)
        return tokens, log_probs
