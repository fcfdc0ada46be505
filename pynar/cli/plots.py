"""Plots of quality against latency or passes, and of latency against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pynar.cli.quickstart import Row

__all__ = [
    "plot_decode_quality",
    "plot_latency_length",
    "plot_quality_latency",
    "plot_quality_passes",
]


STROKES = ("-", "--", ":", "-.")

# Points by panel and label: x, y, and what to write beside them.
Curves = dict[str, dict[str, list[tuple[Any, Any, str]]]]


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


def plot_decode_quality(path: Path, result: dict[str, Any]) -> Path | None:
    """Draws BLEU over latency at batch 1, a panel a number of threads, a line a model and engine.

    Text to text. Returns None, and draws nothing, where there is no quality to show.
    """
    rows = [
        row
        for row in result["rows"]
        if row["kind"] == "text" and row["batch"] == 1 and row["quality"] and not row["failure"]
    ]
    curves: Curves = {}
    for row in rows:
        label = f"{row['model']}, {row['engine']}"
        name = row["system"].removeprefix(row["model"]).strip()
        point = (row["ms"]["p50"], row["quality"]["bleu"], name)
        curves.setdefault(_threads(row), {}).setdefault(label, []).append(point)
    labels = ("milliseconds a sentence, batch 1, text to text (median)", "BLEU")
    return _plot_panels(path, curves, labels)


def plot_latency_length(path: Path, result: dict[str, Any]) -> Path | None:
    """Draws latency at batch 1 over length, a panel a number of threads, a line a system."""
    curves: Curves = {}
    for row in result["rows"]:
        if row["kind"] == "length" and row["batch"] == 1 and not row["failure"]:
            label = f"{row['system']}, {row['engine']}"
            point = (row["length"], row["ms"]["p50"], "")
            curves.setdefault(_threads(row), {}).setdefault(label, []).append(point)
    labels = ("sub-words, in and out", "milliseconds a sentence, batch 1, model only (median)")
    return _plot_panels(path, curves, labels)


def plot_quality_passes(path: Path, rows: Sequence[dict[str, Any]], where: str) -> Path | None:
    """Draws BLEU over the mean number of passes, a line a model and strategy.

    `rows` are those of `pynar evaluate`; Liang et al. 2022 (JANUS), figure 4. Returns None, and
    draws nothing, where no row has passes.
    """
    curves: Curves = {}
    for row in rows:
        if "passes" in row:
            name, _, options = row["system"].partition("(")
            point = (row["passes"], row["bleu"], options.partition(",")[0].rstrip(")"))
            curves.setdefault(where, {}).setdefault(name, []).append(point)
    return _plot_panels(path, curves, ("passes a sentence (mean)", "BLEU"))


def _threads(row: dict[str, Any]) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _plot_panels(path: Path, curves: Curves, labels: tuple[str, str]) -> Path | None:
    """Draws points `(x, y, name)`; of x and y, those that are intervals get error bars."""
    if not curves:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    size = (7 * len(curves), 4.5 + 0.15 * max(map(len, curves.values())))
    figure, panels = plt.subplots(1, len(curves), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, lines) in zip(panels[0], curves.items(), strict=True):
        for number, (label, points) in enumerate(lines.items()):
            sides = [[_bar(point[side]) for point in sorted(points, key=_first)] for side in (0, 1)]
            (xs, x_bars), (ys, y_bars) = (list(zip(*side, strict=True)) for side in sides)
            bars = {
                name: list(zip(*ends, strict=True))
                for name, ends in (("xerr", x_bars), ("yerr", y_bars))
                if any(map(any, ends))
            }
            # There are ten colours; after them come other strokes.
            style = {"linestyle": STROKES[number // 10 % len(STROKES)], "marker": "o"}
            axes.errorbar(xs, ys, markersize=4, label=label, **style, **bars)
            for x, y, point in zip(xs, ys, sorted(points, key=_first), strict=True):
                where = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 6}
                axes.annotate(point[2], (x, y), **where)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())
        axes.tick_params(axis="x", which="both", labelsize=7)
        if any(isinstance(point[1], dict) for points in lines.values() for point in points):
            axes.set_yscale("log")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _first(point: tuple) -> float:
    return _bar(point[0])[0]


def _bar(value: Any) -> tuple[float, tuple[float, float]]:
    """A number or an interval as a place and the lengths of its error bars."""
    if not isinstance(value, dict):
        return value, (0.0, 0.0)
    middle = value["value"]
    return middle, (max(0.0, middle - value["low"]), max(0.0, value["high"] - middle))
