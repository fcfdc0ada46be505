"""A small model with the interface of `pynar.models`, and data for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pynar.data import Batch, collate
from pynar.symbols import MASK, PAD
from pynar.training import TrainingConfig

VOCABULARY = 60


@dataclass(frozen=True, kw_only=True)
class StandInConfig:
    source_vocabulary: int = VOCABULARY
    target_vocabulary: int = VOCABULARY
    dim: int = 8
    noise: float = 0.3  # share of masked inputs
    dropout: float = 0.2
    sizes: tuple[int, ...] = (1, 2)  # of no use but to be a tuple in a checkpoint


@dataclass(frozen=True)
class Example:
    batch: Batch
    inputs: Tensor
    counts: dict[str, Tensor] = field(default_factory=dict)


class StandIn(nn.Module):
    """Predicts each target token from a noisy copy of itself and the mean of the source."""

    Config = StandInConfig
    name = "stand-in"

    def __init__(self, config: StandInConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config or StandInConfig()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(self.config.target_vocabulary, self.config.dim)
        self.hidden = nn.Linear(self.config.dim, self.config.dim)
        self.dropout = nn.Dropout(self.config.dropout)
        self.readout = nn.Linear(self.config.dim, self.config.target_vocabulary)
        self.readout.weight = self.embedding.weight
        self.length = nn.Linear(self.config.dim, 1)
        self.register_buffer("scale", torch.tensor([2, 3]))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"token": 1.0, "length": 0.01}

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Example:
        draw = torch.rand(batch.target.shape, generator=generator, device=batch.target.device)
        inputs = batch.target.masked_fill(draw < self.config.noise, MASK)
        counts = {"token": batch.target_lengths.sum(), "length": torch.tensor(len(batch))}
        return Example(batch, inputs, counts)

    def forward(self, example: Example) -> dict[str, Tensor]:
        batch = example.batch
        source = self.embedding(batch.source) * (batch.source != PAD)[..., None]
        source = source.sum(1) / batch.source_lengths[:, None]
        states = self.dropout(self.hidden(self.embedding(example.inputs) + source[:, None]).tanh())
        live = batch.target != PAD
        token = nn.functional.cross_entropy(
            self.readout(states[live]), batch.target[live], reduction="sum"
        )
        length = (self.length(source)[:, 0] - batch.target_lengths).square().sum()
        return {"token": token, "length": length}


def make_batch(lengths: list[int], seed: int = 0) -> Batch:
    """A batch of random pairs, both sides of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        tuple(torch.randint(5, VOCABULARY, (n,), generator=generator).numpy() for _ in range(2))
        for n in lengths
    ]
    return collate(pairs, list(range(len(pairs))))


def make_config(**changes) -> TrainingConfig:
    """A configuration for runs of a second."""
    settings = {
        "max_updates": 6,
        "max_tokens": 120,
        "accumulate": 2,
        "lr": 0.02,
        "warmup_updates": 4,
        "validate_every": 3,
        "checkpoint_every": 2,
        "log_every": 2,
        "device": "cpu",
    }
    return TrainingConfig(**{**settings, **changes})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
