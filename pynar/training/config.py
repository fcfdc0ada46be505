"""The configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train: everything but the model, the data and where the output goes.

    An update is one optimizer step. It sees `accumulate` batches of `max_tokens` on each of the
    processes that `torchrun` starts, and every loss term is a mean over all of them.
    """

    max_updates: int
    max_tokens: int = 4096  # a batch, on one device
    accumulate: int = 1
    seed: int = 1

    lr: float = 5e-4
    schedule: Literal["constant", "inverse_sqrt", "noam", "linear", "cosine", "exponential"] = (
        "inverse_sqrt"
    )
    warmup_updates: int = 4000
    warmup_init: float = 1e-7
    min_lr: float = 0.0  # floor of the decay; where "linear" and "cosine" end
    gamma: float = 0.999995  # "exponential": factor of one update
    width: int = 512  # "noam": width of the model

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    clip_norm: float | None = 1.0

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # auto: see `devices.precision_on`
    # What the processes of `torchrun` have in common: "ddp", everything; "fsdp", a share each of
    # weights, gradients and optimizer (FSDP2), put together where the whole is needed.
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    deterministic: bool = True

    validate_every: int = 1000
    validation_max_tokens: int | None = None  # `max_tokens` unless given
    validation_sentences: int | None = 500  # translated for BLEU; None for all
    metric: Literal["loss", "bleu"] = "loss"  # which one is "best"
    patience: int | None = None  # validations without a new best before the run stops
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = None  # also after so much time
    keep_last: int = 5
    keep_best: int = 1
    average: Literal["none", "last", "best"] = "none"  # of the kept checkpoints, at the end
    log_every: int = 100
    non_finite_limit: int = 20  # consecutive updates

    def __post_init__(self) -> None:
        for name in (
            "max_updates",
            "max_tokens",
            "accumulate",
            "width",
            "validate_every",
            "validation_max_tokens",
            "validation_sentences",
            "patience",
            "checkpoint_every",
            "keep_last",
            "keep_best",
            "log_every",
            "non_finite_limit",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        for name in ("lr", "eps", "gamma", "clip_norm", "checkpoint_minutes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")
        for name in ("seed", "warmup_updates", "warmup_init", "min_lr", "weight_decay"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"`parallel` must be ddp or fsdp, got {self.parallel!r}")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError("`precision` must be fp32 or bf16 with `parallel: fsdp`, got 'fp16'")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be in [0, 1), got {list(self.betas)}")
        if self.schedule in ("inverse_sqrt", "noam") and self.warmup_updates < 1:
            raise ValueError(
                f"`warmup_updates` must be at least 1 with `schedule: {self.schedule}`, "
                f"got {self.warmup_updates}"
            )
