"""FlowSeq (Ma et al. 2019): latent variables with a generative flow as their prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynar.data.batching import Batch
from pynar.models.base import Example, TransformerConfig, TranslationModel
from pynar.models.cmlm import CMLMConfig
from pynar.nn.attention import padding_mask
from pynar.nn.embedding import sinusoids
from pynar.nn.flows import NETWORKS, ActNorm, Flow, PositionAttention, PositionSum, WeightNormLinear
from pynar.nn.frozen import DTYPES, FrozenCopy
from pynar.nn.frozen_flow import FrozenFlow, FrozenPositionAttention
from pynar.nn.length import LengthPredictor
from pynar.nn.recurrent import RecurrentDecoder, RecurrentEncoder
from pynar.nn.transformer import Memory
from pynar.nn.transforms import TRANSFORMS
from pynar.ops import padding_intervals
from pynar.symbols import BOS, EOS, MASK, PAD

__all__ = ["FlowSeq", "FlowSeqConfig", "FlowSeqExample", "Posterior", "fill_with_eos"]


_CHOICES = {
    "flow_transform": tuple(TRANSFORMS),
    "flow_network": NETWORKS,
    "network": ("transformer", "rnn"),
}


@dataclass(frozen=True, kw_only=True)
class FlowSeqConfig(CMLMConfig):
    """The defaults are the WMT base model of the paper, whose latent width is that of the model.

    The first `posterior_updates` train without the prior, on the posterior's mean; then the prior
    is fitted to a batch, and the weight of KL rises to 1 over `kl_warmup_updates`.
    `posterior_std` is that of the posterior's heads after fitting them to a batch, as in the
    released code; 0 has them begin at zero, as in the paper.
    With `network: rnn` encoder, posterior and decoder, with `flow_network: rnn` couplings are
    bidirectional LSTMs, of `ffn_dim` and of `flow_ffn_dim` channels; embeddings, the source's
    states and latent variables have `dim`. `token_dropout` hides tokens from the posterior,
    `latent_dropout` steps of the latent variables from the decoder.
    A Transformer decoder gathers the latent variables by attention of positions, as in the paper,
    which takes many updates to learn; without `latent_attention` each step begins with its own,
    by a linear map whose weight begins at zero.
    """

    dim: int = 256
    ffn_dim: int = 1024
    decoder_layers: int = 4
    dropout: float = 0.1
    length_kind: str = "difference"
    length_classes: int = 41
    length_weight: float = 1.0
    posterior_layers: int = 4
    posterior_std: float = 0.0
    token_dropout: float = 0.2
    latent_dropout: float = 0.0
    latent_attention: bool = True
    network: str = "transformer"
    flow_steps: tuple[int, ...] = (4, 4, 2)
    flow_ffn_dim: int = 512
    flow_transform: str = "affine"
    flow_network: str = "attention"
    position_attention: bool = True
    posterior_updates: int = 30000
    kl_warmup_updates: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.posterior_layers < 1:
            raise ValueError(f"`posterior_layers` must be positive, got {self.posterior_layers}")
        if not self.flow_steps or min(self.flow_steps) < 1:
            raise ValueError(f"`flow_steps` must be positive, got {list(self.flow_steps)}")
        for field, choices in _CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise ValueError(f"`{field}` must be one of {', '.join(choices)}, got {value!r}")
        for field in ("token_dropout", "latent_dropout"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise ValueError(f"`{field}` must be in [0, 1), got {value}")
        for field, network in (("ffn_dim", self.network), ("flow_ffn_dim", self.flow_network)):
            if network == "rnn" and ((value := getattr(self, field)) < 2 or value % 2):
                raise ValueError(f"`{field}` must be even, half for a direction, got {value}")
        for field in ("posterior_std", "posterior_updates", "kl_warmup_updates"):
            if not (value := getattr(self, field)) >= 0:
                raise ValueError(f"`{field}` must not be negative, got {value}")
        # The source of a single token, too, and the longest must have a length that is possible.
        least = self.multiple if self.length_kind == "absolute" else 2 * self.multiple - 1
        if self.length_classes < least:
            raise ValueError(
                f"`length_classes` must be at least {least}, so that there is a multiple of "
                f"{self.multiple} for every source (`length_kind` {self.length_kind}), "
                f"got {self.length_classes}"
            )
        if self.positions == "learned" and self.max_length < self.multiple:
            raise ValueError(
                f"`max_length` must be at least {self.multiple}, which targets are filled to, "
                f"got {self.max_length}"
            )
        # Heads of 8 channels in linear maps, and of half the width in couplings.
        if self.dim % 8 or (self.dim // 2) % self.heads:
            raise ValueError(
                "`dim` must be a multiple of 8, and half of it of `heads` "
                f"({self.heads}), got {self.dim}"
            )

    @property
    def needs_positions(self) -> bool:
        return self.network == "transformer"

    @property
    def couplings(self) -> int:
        """How many layers of the size of a decoder's a sentence goes through in the flow."""
        top = len(self.flow_steps) - 1
        levels = enumerate(self.flow_steps)
        units = sum(steps * 2 * (4 if level == top else 6) for level, steps in levels)
        return units + top + 2 * (top + 1) * self.position_attention

    @property
    def multiple(self) -> int:
        """What every target is filled to a multiple of, with EOS."""
        return max(2, 1 << (len(self.flow_steps) - 1))


@dataclass(frozen=True)
class FlowSeqExample(Example):
    """`inputs` and `labels` are the target, filled with EOS."""

    lengths: Tensor  # [B], with the filling
    kept: Tensor  # boolean [B, T], tokens that the posterior sees
    noise: Tensor  # [B, T, C], from N(0, 1)
    seen: Tensor | None = None  # boolean [B, T], latent variables that the decoder sees


@dataclass(frozen=True)
class Posterior:
    """q(z | x, y), a normal distribution of its own for every number; zero in the padding."""

    mean: Tensor  # [B, T, C]
    log_variance: Tensor  # [B, T, C]

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + noise * (0.5 * self.log_variance).exp()


def fill_with_eos(target: Tensor, lengths: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Fills each target of `[B, T]` to a multiple of steps; there may be nothing to fill.

    Returns:
        The tokens, `[B, T']`, and the filled lengths, `[B]`.
    """
    width = -(-max(target.shape[1], 1) // multiple) * multiple
    filled = (lengths.clamp(min=1) + multiple - 1) // multiple * multiple
    place = torch.arange(width, device=target.device)
    tokens = F.pad(target, (0, width - target.shape[1]), value=PAD)
    eos = (place >= lengths[:, None]) & (place < filled[:, None])
    tokens = tokens.masked_fill(eos, EOS)
    return tokens.masked_fill(place >= filled[:, None], PAD), filled


def _hide(x: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Dropout of whole steps of `x: [B, T, C]`, of which `kept: [B, T]` are not."""
    return x * (kept / (1 - rate))[..., None]


class FlowSeq(TranslationModel):
    r"""Draws latent variables from a flow given the source, and all tokens at once from those.

    .. math:: \log p(y | x) \ge E_{q(z | x, y)} [\log p(y | z, x)]
                  - \mathrm{KL}(q(z | x, y) \| p(z | x)), \qquad
              p(z | x) = p_\epsilon(f^{-1}(z; x)) \, |\det \partial f^{-1} / \partial z|

    (equations 2 to 4). `Flow` maps z to noise, and noise to z to decode.
    """

    Config: ClassVar[type[TransformerConfig]] = FlowSeqConfig
    name = "flowseq"
    strategies: tuple[str, ...] = ("latent_argmax", "npd", "iwd")
    decoding_defaults: ClassVar[dict[str, Any]] = {}
    banned = (PAD, BOS, MASK)

    config: FlowSeqConfig
    packed_modules = (*TranslationModel.packed_modules, "prior")
    _factors: tuple[Tensor, Tensor] | None = None  # of the matrices, where frozen on a GPU

    def __init__(self, config: FlowSeqConfig) -> None:
        super().__init__(config)
        self.length = LengthPredictor(
            config.dim,
            kind=config.length_kind,
            classes=config.length_classes,
            pooling=config.length_pooling,
            longest=self.longest,
            multiple=config.multiple,
        )
        self.posterior: Any = self._make_decoder(config.posterior_layers)
        self.gather: nn.Module | None = None  # an LSTM knows its place in a sequence
        if config.network == "transformer":
            attends = config.latent_attention
            self.gather = (
                PositionAttention(config.dim, config.heads) if attends else PositionSum(config.dim)
            )
        self.prior: Any = Flow(  # of a frozen model FrozenFlow or FrozenCopy
            config.dim,
            config.dim,
            hidden=config.flow_ffn_dim,
            heads=config.heads,
            steps=config.flow_steps,
            position_attention=config.position_attention,
            transform=config.flow_transform,
            network=config.flow_network,
        )
        for module in (self.length, self.posterior, self.gather, self.prior):
            if module is not None:
                module.apply(self._initialise)
        if isinstance(self.gather, PositionSum):
            # The decoder begins without latent variables, of which it would have to unlearn noise.
            nn.init.zeros_(self.gather.value.weight)
        self.mean = WeightNormLinear(config.dim, config.dim)
        self.log_variance = WeightNormLinear(config.dim, config.dim)
        if not config.posterior_std:
            for head in (self.mean, self.log_variance):
                nn.init.zeros_(head.gain)
        self._with_prior = True

    def _make_encoder(self, layers: int) -> nn.Module:
        if self.config.network == "transformer":
            return super()._make_encoder(layers)
        return RecurrentEncoder(layers, self.config.dim, self.config.ffn_dim)

    def _make_decoder(self, layers: int) -> nn.Module:
        config = self.config
        if config.network == "transformer":
            return super()._make_decoder(layers)
        return RecurrentDecoder(layers, config.dim, config.ffn_dim, dropout=config.dropout)

    @property
    def longest(self) -> int | None:
        """Of a multiple of steps."""
        if self.config.positions != "learned":
            return None
        return self.config.max_length // self.config.multiple * self.config.multiple

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"token": 1.0, "kl": 1.0, "length": self.config.length_weight}

    def weights_at(self, update: int) -> dict[str, float]:
        """The weight of every term in an update, counted from 1."""
        since = update - self.config.posterior_updates
        share = since / max(self.config.kl_warmup_updates, 1)
        return self.loss_weights | {"kl": min(max(share, 0.0), 1.0)}

    def fits(self, update: int) -> bool:
        """Whether weights are fitted to a batch when this update begins.

        The posterior's heads in the first update, the prior when it first takes part.
        """
        return any(self._fitted(update))

    def _fitted(self, update: int) -> tuple[bool, bool]:
        heads = update == 1 and self.config.posterior_std > 0
        return heads, update == self.config.posterior_updates + 1

    def begin_update(self, update: int, batch: Batch, generator: torch.Generator) -> bool:
        """Prepares an update; returns whether weights were fitted to the batch, see `fits`."""
        self._with_prior = update > self.config.posterior_updates
        heads, prior = self._fitted(update)
        if not self.fits(update):
            return False
        training = self.training
        self.eval()
        with torch.no_grad():
            example = self.corrupt(batch, generator)
            memory = self.encode(batch.source, batch.source_lengths)
            if heads:
                rows = self._read(example.inputs, example.lengths, memory)[example.labels != PAD]
                self.mean.fit(rows, self.config.posterior_std)
                self.log_variance.fit(rows, self.config.posterior_std)
            if prior:
                posterior = self.infer(example.inputs, example.lengths, memory)
                z = posterior.sample(example.noise)
                keys_values = self.prior.project(memory.states)
                self.prior.initialise(z, example.lengths, keys_values, memory.lengths)
        self.train(training)
        return True

    def corrupt(self, batch: Batch, generator: torch.Generator) -> FlowSeqExample:
        tokens, lengths = fill_with_eos(batch.target, batch.target_lengths, self.config.multiple)
        live = padding_mask(lengths, tokens.shape[1])[:, 0, 0]
        draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        noise = torch.randn(
            *tokens.shape, self.config.dim, generator=generator, device=tokens.device
        )
        count = live.sum()
        sentences = torch.tensor(len(batch), device=tokens.device)
        counts = {"token": count, "kl": count, "length": sentences}
        kept = draw >= self.config.token_dropout
        seen = None
        if rate := self.config.latent_dropout:
            seen = torch.rand(tokens.shape, generator=generator, device=tokens.device) >= rate
        return FlowSeqExample(batch, tokens, tokens, counts, lengths, kept, noise, seen)

    def forward(self, example: FlowSeqExample) -> dict[str, Tensor]:  # type: ignore[override]
        batch = example.batch
        memory = self.encode(batch.source, batch.source_lengths)
        kept = example.kept if self.training else None
        posterior = self.infer(example.inputs, example.lengths, memory, kept)
        # What is drawn at first is the mean, for which no prior is needed.
        with_prior = self._with_prior or not self.training
        z = posterior.sample(example.noise) if with_prior else posterior.mean
        live = example.labels != PAD
        shown = z
        if self.training and example.seen is not None:
            shown = _hide(z, example.seen, self.config.latent_dropout)
        states = self.decode_latent(shown, example.lengths, memory, live)
        losses = {
            "token": self._token_loss(states, example.labels[live]),
            "length": self.length.loss(memory.states, memory.lengths, example.lengths),
        }
        if with_prior:
            noise = example.noise.masked_fill(~live[..., None], 0)
            log_q = -0.5 * (posterior.log_variance + noise.square()).sum((1, 2))
            losses["kl"] = (log_q - self.log_prior(z, example.lengths, memory)).sum()
        else:
            # So that every parameter has a gradient, which processes side by side need.
            unused = (*self.prior.parameters(), *self.log_variance.parameters())
            losses["kl"] = torch.stack([p.sum() for p in unused]).sum() * 0.0
        return losses

    @torch.no_grad()
    def diagnose(self, example: FlowSeqExample) -> dict[str, float]:  # type: ignore[override]
        """Whether the latent variables are used, and by what.

        All a step: `kl_token`, the KL divergence (near 0, the decoder does without z);
        `posterior_token`, `prior_sample_token` and `prior_token`, the cross-entropy of the tokens
        given a sample of the posterior, a sample of the prior and the prior's mode (the latter two
        far above the first, z says what the prior does not know of; all about equal with `kl_token`
        near 0, z is not used);
        `posterior_mean_std` and `posterior_std`, over steps and within one; `logdet_0` and so on,
        of every level of the flow.
        """
        batch, live = example.batch, example.labels != PAD
        memory = self.encode(batch.source, batch.source_lengths)
        posterior = self.infer(example.inputs, example.lengths, memory)
        noise = example.noise.masked_fill(~live[..., None], 0)
        z, steps = posterior.sample(noise), live.sum()
        keys_values = self.prior.project(memory.states)
        drawn, logdets = self.prior(z, example.lengths, keys_values, memory.lengths, by_level=True)
        log_q = -0.5 * (posterior.log_variance + noise.square()).sum()
        log_p = logdets.sum() - 0.5 * drawn.square().sum()
        mode, _ = self.sample_prior(torch.zeros_like(noise), example.lengths, memory)
        sample, _ = self.sample_prior(noise, example.lengths, memory)

        def token_loss(z: Tensor) -> Tensor:
            states = self.decode_latent(z, example.lengths, memory, live)
            return self._token_loss(states, example.labels[live]) / steps

        found = {
            "kl_token": (log_q - log_p) / steps,
            "posterior_token": token_loss(z),
            "prior_sample_token": token_loss(sample),
            "prior_token": token_loss(mode),
            "posterior_mean_std": posterior.mean[live].std(0, correction=0).mean(),
            "posterior_std": (0.5 * posterior.log_variance[live]).exp().mean(),
        }
        levels = {f"logdet_{i}": total / steps for i, total in enumerate(logdets.sum(0))}
        return {name: float(value) for name, value in (found | levels).items()}

    def _read(
        self, tokens: Tensor, lengths: Tensor, memory: Memory, kept: Tensor | None = None
    ) -> Tensor:
        x = self.target_embedding.embed(tokens)
        if kept is not None:
            # Whole tokens, before they have positions.
            x = _hide(x, kept, self.config.token_dropout)
        x = self.target_embedding.norm(x + self.target_embedding.positions(0, tokens.shape[1]))
        own = Memory(
            memory.states, memory.embedded, memory.lengths, self.posterior.project(memory.states)
        )
        return self.posterior(self.dropout(x), own, lengths)  # type: ignore[no-any-return]

    def infer(
        self, tokens: Tensor, lengths: Tensor, memory: Memory, kept: Tensor | None = None
    ) -> Posterior:
        """The posterior of filled targets `[B * n, T]`, n for each source.

        Boolean `kept: [B * n, T]` marks the tokens that are not hidden from it.
        """
        states = self._read(tokens, lengths, memory, kept)
        live = padding_mask(lengths, tokens.shape[1])[:, 0, 0, :, None]
        mean, log_variance = self.mean(states), self.log_variance(states)
        return Posterior(mean.masked_fill(~live, 0), log_variance.masked_fill(~live, 0))

    def log_prior(self, z: Tensor, lengths: Tensor, memory: Memory) -> Tensor:
        """log p(z | x) of `z: [B * n, T, C]`, without the constant of the normal distribution."""
        noise, logdet = self.prior(
            z, lengths, self.prior.project(memory.states), memory.lengths, factors=self._factors
        )
        return logdet - 0.5 * noise.square().sum((1, 2))

    def sample_prior(self, noise: Tensor, lengths: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """z from `noise: [B * n, T, C]`, and log p(z | x) as `log_prior` has it."""
        z, logdet = self.prior(
            noise,
            lengths,
            self.prior.project(memory.states),
            memory.lengths,
            inverse=True,
            factors=self._factors,
        )
        live = padding_mask(lengths, noise.shape[1])[:, 0, 0, :, None]
        density = -0.5 * noise.masked_fill(~live, 0).square().sum((1, 2))
        return z, density - logdet

    def decode_latent(
        self, z: Tensor, lengths: Tensor, memory: Memory, wanted: Tensor | None = None
    ) -> Tensor:
        """Decoder states `[B * n, T, C]` of latent variables, or `[N, C]` of those `wanted`."""
        z = z.to(memory.states.dtype)
        if self.gather is not None:
            positions = sinusoids(z.shape[1] + 1, z.shape[2], z.device)[1:].to(z.dtype)
            z = self.gather(z, positions, padding_intervals(lengths, z.shape[1]))
            z = self.dropout(z)
        return self.decoder(z, memory, lengths, wanted)  # type: ignore[no-any-return]

    def reconstruction(self, states: Tensor, tokens: Tensor) -> Tensor:
        """log p(y_t | z, x) of `tokens: [N]` from states `[N, C]`."""
        return self.log_prob(states, tokens, self.best(states)[2])

    def freeze(self, dtype: str = "fp32") -> FlowSeq:
        frozen = super().freeze(dtype)
        cpu = frozen.exclusion.device.type == "cpu"
        with torch.no_grad():
            if cpu and isinstance(self.gather, PositionAttention):
                frozen.gather = FrozenPositionAttention(self.gather, DTYPES[dtype])
            if cpu and self.config.flow_network == "attention":
                frozen.prior = FrozenFlow(self.prior, DTYPES[dtype])
                return frozen
            frozen._factors = self.prior.factors()
            if cpu:
                frozen.prior = FrozenCopy(self.prior)
        return frozen

    def _converted(self, dtype: torch.dtype) -> FlowSeq:
        """The maps of the flow keep fp32, of which products of 120 of them need the digits."""
        frozen = super()._converted(dtype)
        for own, kept in zip(frozen.prior.modules(), self.prior.modules(), strict=True):
            if isinstance(own, ActNorm):
                own.float().load_state_dict(kept.state_dict())
        return frozen
