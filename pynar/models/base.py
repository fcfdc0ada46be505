"""What every translation model shares: configuration, embeddings, encoder, memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.data.batching import Batch
from pynar.nn.dropout import Dropout
from pynar.nn.embedding import Embedding
from pynar.nn.frozen import DTYPES, freeze_network
from pynar.nn.packed import PackedRows, bounds, pack
from pynar.nn.transformer import Decoder, Encoder, Memory
from pynar.ops import (
    PackedWeight,
    divergence_cross_entropy,
    linear_argmax,
    pack_linear,
    packed_linear,
)
from pynar.symbols import BOS, MASK, NUM_SPECIAL, PAD

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Example", "TransformerConfig", "TranslationModel"]

_CHOICES = {
    "norm": ("pre", "post"),
    "positions": ("sinusoidal", "learned", "none"),
    "activation": ("relu", "gelu"),
    "init": ("xavier", "bert"),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and habits of a Transformer; the defaults are the base size of Zhou et al. 2020.

    `embedding_scale` and `embedding_norm` are BART's differences (Lewis et al. 2020).
    """

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
    embedding_scale: bool = True  # token embeddings times sqrt(dim)
    embedding_norm: bool = False  # layer normalisation of tokens plus positions
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
        if self.positions == "none" and self.needs_positions:
            raise ValueError(
                "`positions` must be sinusoidal or learned, got 'none': without them attention "
                "cannot tell one place of a sentence from another"
            )

    @property
    def needs_positions(self) -> bool:
        """Whether the network knows of the order of tokens by their positions alone."""
        return True


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
    strategies: tuple[str, ...]  # names in pynar.decoding, the usual one first
    decoding_defaults: ClassVar[dict[str, Any]] = {}
    frozen: str = ""  # as what, if it is
    packed_modules: ClassVar[tuple[str, ...]] = ("encoder", "decoder")  # in a frozen model
    packed_vocabulary: PackedWeight | None = None
    graphs: Any = None  # of a frozen model on CUDA: pynar.decoding.graphs.Graphs
    exclusion: Tensor  # [V], -inf for banned symbols

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        inputs: dict[str, Any] = {
            "positions": config.positions,
            "max_length": config.max_length,
            "scale": config.embedding_scale,
            "norm": config.embedding_norm,
        }
        self.source_embedding = Embedding(config.source_vocabulary, config.dim, **inputs)
        self.target_embedding = Embedding(config.target_vocabulary, config.dim, **inputs)
        if config.share_embeddings:
            self.target_embedding.tokens = self.source_embedding.tokens
        # Of a frozen model FrozenEncoder and FrozenDecoder, which have the same methods.
        self.encoder: Any = self._make_encoder(config.encoder_layers)
        self.decoder: Any = self._make_decoder(config.decoder_layers)
        self.dropout = Dropout(config.dropout)
        self.register_buffer("exclusion", self._exclude(self.banned), persistent=False)
        self.apply(self._initialise)
        if config.init == "xavier" and config.embedding_scale:
            # Beside scaled token embeddings of unit variance, smaller positions go unheard.
            for embedding in (self.source_embedding, self.target_embedding):
                if embedding.learned is not None:
                    nn.init.normal_(embedding.learned.weight)

    def _make_encoder(self, layers: int) -> nn.Module:
        return self._make(Encoder, layers)

    def _make_decoder(self, layers: int) -> nn.Module:
        return self._make(Decoder, layers)

    def _make(self, kind: type[Encoder] | type[Decoder], layers: int) -> nn.Module:
        config = self.config
        return kind(
            layers,
            config.dim,
            config.ffn_dim,
            config.heads,
            dropout=config.dropout,
            norm=config.norm,
            activation=config.activation,
        )

    def _exclude(self, symbols: tuple[int, ...]) -> Tensor:
        exclusion = torch.zeros(self.config.target_vocabulary)
        exclusion[list(symbols)] = -torch.inf
        return exclusion

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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.graphs = None  # they read the weights where those were
        return super()._apply(fn, recurse)

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
        x = self.source_embedding.norm(embedded + positions)
        states = self.encoder(self.dropout(x), lengths)
        return self.decoder.remember(states, embedded, lengths)

    def logits(self, states: Tensor) -> Tensor:
        """The tied vocabulary projection, `[..., C] -> [..., V]`."""
        if self.packed_vocabulary is None:
            return F.linear(states, self.target_embedding.tokens.weight)
        return packed_linear(states.flatten(0, -2), self.packed_vocabulary).unflatten(
            0, states.shape[:-1]
        )

    def log_probs(self, states: Tensor) -> Tensor:
        """Log-probabilities `[..., V]` in fp32; symbols that are never produced have none."""
        return (self.logits(states).float() + self.exclusion).log_softmax(-1)

    def best(
        self, states: Tensor, k: int | None = None, *, exclusion: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The most probable tokens of `states: [N, C]`, without logits in memory.

        `exclusion: [V]` is -inf for symbols that are not to be produced; the model's own if None.
        Returns tokens and log-probabilities, `[N]` or `[N, k]`, and the log-sum-exp `[N]`.
        """
        weight: Tensor | PackedWeight
        if self.packed_vocabulary is not None:
            states, weight = states.float(), self.packed_vocabulary
        else:
            weight = self.target_embedding.tokens.weight.detach()
            states = states.to(weight.dtype)
        bias = self.exclusion if exclusion is None else exclusion
        bias = bias.float()  # also where the whole model was converted
        return linear_argmax(states, weight, bias, k=k, return_lse=True)  # type: ignore[return-value]

    def log_prob(self, states: Tensor, tokens: Tensor, lse: Tensor) -> Tensor:
        """Log-probability `[N]` of given `tokens: [N]`, with the log-sum-exp from `best`."""
        rows = self.target_embedding.tokens(tokens)
        return (states.float() * rows.float()).sum(-1) + self.exclusion[tokens] - lse

    def freeze(self, dtype: str = "fp32") -> Self:
        """A copy for fast inference: `dtype` "fp32", "bf16" or "int8" (CPU), "fp16" (GPU).

        On the CPU weights are packed for the matrix kernels and batches lose their padding
        (pynar/nn/frozen.py); activations stay fp32. On a GPU the weights are converted.
        The model itself is left as it is; the copy cannot be trained, moved or saved.

        Raises:
            ValueError: the model is frozen already, or the device has no such type.
        """
        if self.frozen:
            raise ValueError(f"freeze: the model is frozen already, as {self.frozen}")
        device = self.exclusion.device.type
        known = ("fp32", "bf16", "int8") if device == "cpu" else ("fp32", "bf16", "fp16")
        if dtype not in known:
            raise ValueError(
                f"freeze: `dtype` on {device} must be one of {', '.join(known)}, got {dtype!r}"
            )
        if device != "cpu":
            types = {**DTYPES, "fp16": torch.float16}
            frozen = self._converted(types[dtype])
            frozen.frozen = dtype
            return frozen
        frozen = copy.copy(self)
        # At once, so that what is tied stays tied.
        frozen._modules = copy.deepcopy(
            {name: own for name, own in self._modules.items() if name not in self.packed_modules}
        )
        frozen.requires_grad_(False).eval()
        packed = DTYPES[dtype]
        frozen.encoder = freeze_network(self.encoder, packed)
        frozen.decoder = freeze_network(self.decoder, packed)
        frozen.packed_vocabulary = pack_linear(self.target_embedding.tokens.weight, packed)
        frozen.frozen = dtype
        return frozen

    def _converted(self, dtype: torch.dtype) -> Self:
        """A copy for a GPU; what forbids symbols stays in fp32."""
        frozen = copy.deepcopy(self).requires_grad_(False).eval()
        exclusion = frozen.exclusion
        frozen.to(dtype)
        frozen.exclusion = exclusion
        return frozen

    def embed_rows(self, embedding: Embedding, rows: PackedRows) -> Tensor:
        """Tokens and positions of packed rows, `[N, C]`, dropped out."""
        return self.place_rows(embedding, embedding.embed(rows.tokens), rows)

    def place_rows(self, embedding: Embedding, embedded: Tensor, rows: PackedRows) -> Tensor:
        """As `embed_rows`, of tokens that are `embedded: [N, C]` already."""
        positions = F.embedding(rows.positions, embedding.positions(0, rows.width))
        return self.dropout(embedding.norm(embedded + positions))

    def encode_rows(self, source: PackedRows) -> Tensor:
        """Encodes sources without padding, `[N, C]`; `encode` is for those who need a `Memory`."""
        return self.encoder.rows(self.embed_rows(self.source_embedding, source), source.intervals)

    def decode_rows(
        self,
        x: Tensor,
        target: PackedRows,
        source: Tensor,
        source_lengths: Tensor,
        read: Tensor | None = None,
    ) -> Tensor:
        """States of decoder inputs `x: [N, C]`, of the rows `read: [M]` alone if given.

        `source: [S, C]` is what `encode_rows` gave.
        """
        return self.decoder.rows(
            x,
            self.decoder.project_rows(source),
            sees=target.intervals,
            reads=bounds(source_lengths)[target.sentence][:, None],
            content=len(x),
            read=read,
        )

    def pack(
        self, example: Example, lengths: Tensor, *, causal: bool = False
    ) -> tuple[PackedRows, PackedRows, Tensor | None, Tensor]:
        """An example without padding; `lengths: [B]` are those of the decoder's inputs.

        On a GPU it reads three numbers back, the only time in a forward pass.

        Returns:
            The source, the decoder's inputs, the rows with a label if not all have one, and the
            labels.
        """
        batch = example.batch
        chosen = example.labels != PAD
        totals = torch.stack([batch.source_lengths.sum(), lengths.sum(), chosen.sum()])
        source_tokens, tokens, num_labels = totals.tolist()
        target = pack(example.inputs, lengths, tokens, causal=causal)
        labels = example.labels[target.sentence, target.positions]
        read = None
        if num_labels < tokens:
            read = (labels == PAD).int().argsort(stable=True)[:num_labels]
            labels = labels[read]
        return pack(batch.source, batch.source_lengths, source_tokens), target, read, labels

    def _token_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies of `labels: [N]`, smoothed while training."""
        entropies, _ = divergence_cross_entropy(
            self.logits(states)[None],
            labels,
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        return entropies.sum()

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Example:
        """Draws the training noise of `batch`."""
        raise NotImplementedError

    def forward(self, example: Example) -> dict[str, Tensor]:
        """The sum of every loss term."""
        raise NotImplementedError
