"""What to say when losses or gradients stay infinite or NaN."""

from __future__ import annotations

from pathlib import Path

from pynar.training.config import TrainingConfig
from pynar.training.update import Summary

__all__ = ["NonFiniteError", "explain"]


class NonFiniteError(ValueError):
    """Losses or gradients were infinite or NaN too many times in a row."""


def explain(
    summary: Summary, config: TrainingConfig, *, update: int, lr: float, last: Path | None
) -> str:
    """What was not finite, when and under which settings, and what to try."""
    terms = ", ".join(f"`{term}` in {n} batches" for term, n in summary.non_finite.items())
    what = f"non-finite losses ({terms})" if terms else "non-finite gradients of finite losses"
    advice = ["lower `lr`", "lengthen `warmup_updates`"]
    if config.clip_norm is None:
        advice.append("set `clip_norm`")
    if config.precision == "fp16":
        advice.append("use `precision: bf16`")
    if config.precision != "fp32":
        advice.append("use `precision: fp32`")
    if terms:
        advice.append("look at the definition of the loss and at the data")
    return (
        f"stopped at update {update}: {summary.streak} updates in a row had {what} "
        f"(`non_finite_limit` {config.non_finite_limit}; learning rate {lr:.3g}, precision "
        f"{config.precision}; {summary.skipped} updates skipped in all). The weights are those of "
        f"update {update - summary.streak}; the last checkpoint is {last or 'not written yet'}. "
        f"Try to {', '.join(advice)}"
    )
