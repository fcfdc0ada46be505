"""What every translation model shares: configuration, embeddings, encoder, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.data.batching import Batch
from pynar.nn.embedding import Embedding
from pynar.nn.transformer import Decoder, Encoder, Memory
from pynar.symbols import BOS, MASK, NUM_SPECIAL, PAD

__all__ = ["Example", "TransformerConfig", "TranslationModel"]

_CHOICES = {
    "norm": ("pre", "post"),
    "positions": ("sinusoidal", "learned"),
    "activation": ("relu", "gelu"),
    "init": ("xavier", "bert"),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and habits of a Transformer; the defaults are the base size of Zhou et al. 2020."""

    source_vocabulary: int
    target_vocabulary: int
    share_embeddings: bool = True
    dim: int = 512
    ffn_dim: int = 2048
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.3
    norm: str = "post"
    positions: str = "sinusoidal"
    max_length: int = 1024
    activation: str = "relu"
    init: str = "xavier"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for field in ("dim", "ffn_dim", "heads", "encoder_layers", "decoder_layers", "max_length"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"`{field}` must be positive, got {value}")
        for field in ("source_vocabulary", "target_vocabulary"):
            if (value := getattr(self, field)) < NUM_SPECIAL:
                raise ValueError(
                    f"`{field}` must count the {NUM_SPECIAL} special symbols, got {value}"
                )
        for field, choices in _CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise ValueError(f"`{field}` must be one of {', '.join(choices)}, got {value!r}")
        if self.dim % self.heads:
            raise ValueError(f"`dim` must be a multiple of `heads` ({self.heads}), got {self.dim}")
        if self.share_embeddings and self.source_vocabulary != self.target_vocabulary:
            raise ValueError(
                "`share_embeddings` needs one vocabulary, got "
                f"{self.source_vocabulary} source and {self.target_vocabulary} target symbols"
            )
        for field in ("dropout", "label_smoothing"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise ValueError(f"`{field}` must be in [0, 1), got {value}")


@dataclass(frozen=True)
class Example:
    """A batch with its training noise drawn, and the normaliser of every loss term.

    The noise is drawn before the forward pass so that the counts of all workers and
    accumulation steps of an update are known when the first gradient is computed: every term
    is then exactly a mean over all its tokens, wherever they lie.
    """

    batch: Batch
    inputs: Tensor  # [B, T], what the decoder sees
    labels: Tensor  # [B, T], PAD where no loss is taken
    counts: dict[str, Tensor]


class TranslationModel(nn.Module):
    """Encoder, decoder and tied output projection; subclasses are the published models.

    Calling the model with an `Example` gives the *sum* of every loss term; `loss_weights` says
    how the means are combined.
    """

    Config: ClassVar[type[TransformerConfig]] = TransformerConfig
    name: ClassVar[str]
    banned: ClassVar[tuple[int, ...]] = (PAD, BOS, MASK)  # never produced
    strategies: ClassVar[tuple[str, ...]]  # names in pynar.decoding, the usual one first
    decoding_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        positions: dict[str, Any] = {"positions": config.positions, "max_length": config.max_length}
        self.source_embedding = Embedding(config.source_vocabulary, config.dim, **positions)
        self.target_embedding = Embedding(config.target_vocabulary, config.dim, **positions)
        if config.share_embeddings:
            self.target_embedding.tokens = self.source_embedding.tokens
        sizes = (config.dim, config.ffn_dim, config.heads)
        habits: dict[str, Any] = {
            "dropout": config.dropout,
            "norm": config.norm,
            "activation": config.activation,
        }
        self.encoder = Encoder(config.encoder_layers, *sizes, **habits)
        self.decoder = Decoder(config.decoder_layers, *sizes, **habits)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(self._initialise)
        if config.init == "xavier":
            # Beside scaled token embeddings of unit variance, smaller positions go unheard.
            for embedding in (self.source_embedding, self.target_embedding):
                if embedding.learned is not None:
                    nn.init.normal_(embedding.learned.weight)

    def _initialise(self, module: nn.Module) -> None:
        bert = self.config.init == "bert"
        if isinstance(module, nn.Linear):
            if bert:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if bert else self.config.dim**-0.5)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])

    @property
    def longest(self) -> int | None:
        """The most tokens a sequence may have, on either side; None where there is no limit."""
        return self.config.max_length if self.config.positions == "learned" else None

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"token": 1.0}

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """Encodes `source: [B, S]`, EOS included, and projects it for every decoder layer."""
        embedded = self.source_embedding.embed(source)
        positions = self.source_embedding.positions(0, source.shape[1])
        states = self.encoder(self.dropout(embedded + positions), lengths)
        return Memory(states, embedded, lengths, self.decoder.project(states))

    def logits(self, states: Tensor) -> Tensor:
        """The tied vocabulary projection, `[..., C] -> [..., V]`."""
        return F.linear(states, self.target_embedding.tokens.weight)

    def _token_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies of `labels: [B, T]`, smoothed while training.

        Only rows with a label are projected to the vocabulary. On a GPU this selection reads
        their number back, once a forward pass; the projection it saves costs far more.
        """
        rows = labels != PAD
        smoothing = self.config.label_smoothing if self.training else 0.0
        return F.cross_entropy(
            self.logits(states[rows]).float(),
            labels[rows],
            reduction="sum",
            label_smoothing=smoothing,
        )

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Example:
        """Draws the training noise of `batch`."""
        raise NotImplementedError

    def forward(self, example: Example) -> dict[str, Tensor]:
        """The sum of every loss term."""
        raise NotImplementedError
