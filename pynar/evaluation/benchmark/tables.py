"""Tables of a benchmark's results, from what `results.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pynar.evaluation.environment import busy

__all__ = ["Table", "markdown", "tables"]

Row = dict[str, Any]

_TITLES = {
    "text": "Raw text in to raw text out",
    "model": "Model only: token ids in, token ids out, batches ready",
}
NOTES = """\
Every figure is the median over {repetitions} repetitions, in which the systems took turns, each in a process of its own; in brackets its 95 % bootstrap interval.
Before it is divided into batches, the text is sorted by its characters, longest first, for every system; at batch 1 it keeps its order.
"vs. greedy" compares with greedy search of the first autoregressive model by its fastest engine (latency at batch 1, cost a sentence in batches); higher is faster.
† is the fastest of the engines that ran this model with this strategy. Memory is the peak of the whole process, Python and PyTorch included, or what was allocated on a GPU.
Layers are layer evaluations a sentence: encoder layers + passes x decoder layers x sequences side by side, and those of a rescorer for each candidate; a dash where an engine does not tell its passes.
"""  # noqa: E501 - a line a paragraph


@dataclass
class Table:
    """A title, a header, rows of cells, and what is to be said below."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tables(result: dict[str, Any]) -> list[Table]:
    """For every kind and number of threads a table with a line a system."""
    made = []
    for threads in result["plan"]["threads"]:
        rows = [row for row in result["rows"] if row["threads"] == threads]
        for kind, title in _TITLES.items():
            if own := [row for row in rows if row["kind"] == kind]:
                made.append(_text_table(f"{title}; {_threads(threads)}", own))
        if own := [row for row in rows if row["buckets"]]:
            made.append(_bucket_table(_threads(threads), own))
        forced = [row for row in rows if row["kind"] == "length"]
        for batch in dict.fromkeys(row["batch"] for row in forced):
            own = [row for row in forced if row["batch"] == batch]
            counts = {row["sentences"] for row in own if row["failure"] is None}
            each = f", {counts.pop()} sentences a length" if len(counts) == 1 else ""
            made.append(_length_table(f"{_threads(threads)}, batch {batch}{each}", own, batch))
    return made


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _systems(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    systems: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        systems.setdefault((row["system"], row["engine"]), []).append(row)
    return systems


def _text_table(title: str, rows: list[Row]) -> Table:
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    many = [batch for batch in batches if batch != 1]
    header = ["system", "engine", "BLEU", "chrF2++", "passes", "layers"]
    if 1 in batches:
        header += ["ms p50, batch 1", "p95", "p99", "vs. greedy"]
    for batch in many:
        header += [f"sentences/s, batch {batch}", "vs. greedy"]
    table = Table(title, [*header, "tokens/s, last batch", "peak MB"])
    for (system, engine), own in _systems(rows).items():
        by_batch = {row["batch"]: row for row in own}
        quality = next((row["quality"] for row in own if row["quality"]), None)
        cells = [system, engine]
        cells += [_number(quality and quality[key]) for key in ("bleu", "chrf")]
        done = [row for row in own if row["failure"] is None]
        cells += [
            _number(done[0][key] if done else None) for key in ("passes", "layer_evaluations")
        ]
        for batch in batches:
            row = by_batch[batch]
            if row["failure"] is not None:
                cells += [_failed(table, row)] + ["-"] * (3 if batch == 1 else 1)
            elif batch == 1:
                ms = row["ms"]
                cells += [_interval(ms["p50"]) + _mark(row)]
                cells += [_value(ms["p95"]), _value(ms["p99"]), _speedup(row)]
            else:
                size = f" (of {row['batch_sentences']})" if batch == "max" else ""
                cells += [_interval(row["sentences_per_second"]) + size + _mark(row), _speedup(row)]
        cells += [_value(done[-1]["tokens_per_second"]) if done else "-", _megabytes(done)]
        table.rows.append(cells)
    return table


def _bucket_table(where: str, rows: list[Row]) -> Table:
    header = ["system", "engine"]
    for bucket in rows[0]["buckets"]:  # of the same lines for all
        low, high = bucket["words"]
        words = f"{low} words and more" if high is None else f"{low}-{high} words"
        header.append(f"ms p50, {words} ({bucket['sentences']} sentences)")
    table = Table(f"By length of the source, raw text to raw text; {where}, batch 1", header)
    for row in rows:
        cells = [_interval(bucket["p50_ms"]) for bucket in row["buckets"]]
        table.rows.append([row["system"], row["engine"], *cells])
    return table


def _length_table(where: str, rows: list[Row], batch: int | str) -> Table:
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    unit = "ms" if batch == 1 else "sentences/s"
    title = f"By length, model only, source and target of as many random tokens; {where}"
    header = ["system", "engine"]
    for length in lengths:
        header += [f"{unit}, {length} tokens", "layers", "vs. greedy"]
    table = Table(title, [*header, "peak MB"])
    for (system, engine), own in _systems(rows).items():
        cells = [system, engine]
        for row in sorted(own, key=lambda row: lengths.index(row["length"])):
            if row["failure"] is not None:
                cells += [_failed(table, row), "-", "-"]
                continue
            figure = row["ms"]["p50"] if batch == 1 else row["sentences_per_second"]
            size = f" (of {row['batch_sentences']})" if batch == "max" else ""
            cells += [_interval(figure) + size + _mark(row)]
            cells += [_number(row["layer_evaluations"]), _speedup(row)]
        table.rows.append([*cells, _megabytes([row for row in own if row["failure"] is None])])
    return table


def _failed(table: Table, row: Row) -> str:
    message = f"{row['system']}, {row['engine']}: {row['failure']}"
    if message not in table.notes:
        table.notes.append(message)
    return f"failed ({table.notes.index(message) + 1})"


def _mark(row: Row) -> str:
    return " †" if row["fastest_engine"] else ""


def _speedup(row: Row) -> str:
    if row["baseline"]:
        return "1 (baseline)"
    return "-" if row["speedup"] is None else _interval(row["speedup"], "x")


def _megabytes(rows: list[Row]) -> str:
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return f"{max(peaks) / 2**20:.0f}" if peaks else "-"


def _value(interval: dict[str, float] | None) -> str:
    return _number(None if interval is None else interval["value"])


def _interval(interval: dict[str, float], unit: str = "") -> str:
    low, high = _number(interval["low"]), _number(interval["high"])
    return f"{_number(interval['value'])}{unit} [{low}, {high}]"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def markdown(result: dict[str, Any]) -> str:
    """All tables, with what a reader needs to know of their making."""
    facts = result["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v is not None)
    parts = ["# Decoding benchmark", f"`{facts['command']}`"]
    if not result["complete"]:
        parts.append("**Interrupted before it was done.**")
    where = facts["gpu"] if result["device"] != "cpu" else facts["processor"]
    parts.append(
        f"{where}, {facts['processors']} processors; {versions}; commit {facts['commit']}; "
        f"{facts['date']}."
    )
    if warning := busy(facts):
        parts.append(f"**Warning: {warning}.**")
    parts += [f"**Warning: {warning}.**" for warning in result.get("warnings", [])]
    for threads, rates in result["ceilings"].items():
        parts.append(
            f"Ceilings with {_threads(int(threads))}: "
            f"{rates['read_bytes_per_second'] / 1e9:.1f} GB/s read, matrix product "
            f"{rates['fp32_matmul_flops'] / 1e9:.0f} GFLOP/s fp32, "
            f"{rates['bf16_matmul_flops'] / 1e9:.0f} GFLOP/s bf16."
        )
    parts += NOTES.format(repetitions=result["plan"]["repetitions"]).splitlines()
    for signature in sorted({s for row in result["rows"] for s in _signatures(row)}):
        parts.append(f"`{signature}`")
    for table in tables(result):
        parts.append(f"## {table.title}")
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += [f"({number}) {note}" for number, note in enumerate(table.notes, 1)]
    return "\n\n".join(parts) + "\n"


def _signatures(row: Row) -> list[str]:
    if not row["quality"]:
        return []
    return [f"{name}: {text}" for name, text in row["quality"]["signatures"].items()]
