"""Plots of quality against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynar.cli.quickstart import Row

__all__ = ["plot_quality_latency"]


def plot_quality_latency(path: Path, rows: Sequence[Row], where: str) -> None:
    """Draws exact match over milliseconds a sentence; one line a model, its passes as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[str, list[Row]] = {}
    for row in rows:
        family = row.system.rsplit(" ", 1)[0] if row.system.startswith("CMLM") else row.system
        family = "AR" if family.startswith("AR") else family
        curves.setdefault(f"{family}, {row.data}", []).append(row)
    for label, points in curves.items():
        xs = [point.ms_per_sentence for point in points]
        ys = [point.exact_match for point in points]
        axes.plot(xs, ys, marker="o", label=label)
        for point, x, y in zip(points, xs, ys, strict=True):
            axes.annotate(
                point.system.split(" ", 1)[-1],
                (x, y),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds a sentence, batch 1 (median)")
    axes.set_ylabel("exact match, any valid reading (%)")
    axes.set_title(where, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
