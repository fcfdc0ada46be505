"""Reads the output of `pytest bench --benchmark-json FILE.json` and prints what it means.

    python -m bench.report FILE.json              ratios, and bandwidth against the measured ceiling
    python -m bench.report FILE.json --save OUT   also writes a short form of it, to be kept

Files of the short form are read just as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["main", "shorten"]

BASELINE = "reference"


def _quantiles(stats: dict[str, Any]) -> tuple[float, float]:
    data = stats.get("data")
    if data and len(data) >= 2:
        tenths = statistics.quantiles(data, n=10, method="inclusive")
        return tenths[1], tenths[7]
    return stats["q1"], stats["q3"]


def shorten(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the short form: machine, versions, commit, command, and a row for each timing."""
    if "rows" in report:
        return report
    rows = []
    for benchmark in report["benchmarks"]:
        low, high = _quantiles(benchmark["stats"])
        rows.append(
            {
                "group": benchmark["group"],
                **benchmark["extra_info"],
                "rounds": benchmark["stats"]["rounds"],
                "median": benchmark["stats"]["median"],
                "p20": low,
                "p80": high,
                "min": benchmark["stats"]["min"],
            }
        )
    return {"date": report["datetime"][:10], "machine": report["machine_info"], "rows": rows}


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def main() -> None:
    """Prints, for each group, times, ratios to the reference, and bandwidth."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path)
    parser.add_argument("--save", type=Path, metavar="OUT", help="write the short form to OUT")
    options = parser.parse_args()
    report = shorten(json.loads(options.file.read_text(encoding="utf-8")))

    for name, value in report["machine"].items():
        print(f"{name}: {value}")
    header = f"  {'':24} {'median us':>12} {'p20':>12} {'p80':>12} {'min':>12}"
    header += f" {'x faster':>9} {'GB/s':>7} {'GFLOP/s':>8} {'of ceiling':>10}"
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["group"] == group]
        # Measured around every row; other work on the machine can only lower it.
        ceiling = max(row["ceiling"] for row in rows)
        baseline = next((r["median"] for r in rows if r["implementation"] == BASELINE), None)
        flop_ceiling = max(row.get("flop_ceiling") or 0 for row in rows)
        ceilings = f"{ceiling / 1e9:.1f} GB/s"
        if flop_ceiling:
            ceilings += f", {flop_ceiling / 1e9:.0f} GFLOP/s"
        print(f"\n{group} (ceiling {ceilings})\n{header}")
        for row in rows:
            times = [_microseconds(row[key]) for key in ("median", "p20", "p80", "min")]
            rate = row["bytes_moved"] / row["median"]
            flops = row.get("flops", 0) / row["median"]
            # The one of the two ceilings that is nearer.
            reached = max(rate / ceiling, flops / flop_ceiling if flop_ceiling else 0)
            gflops = f"{flops / 1e9:.0f}" if flops else "-"
            ratio = f"{baseline / row['median']:.2f}" if baseline else "-"
            line = f"  {row['implementation']:24} " + " ".join(f"{time:>12}" for time in times)
            line = f"{line} {ratio:>9} {rate / 1e9:>7.1f} {gflops:>8} {reached:>10.0%}"
            if (peak := row.get("peak_bytes")) is not None:
                line += f"  {peak / 1e6:,.0f} MB at most"
            if turns := row.get("in_turns"):
                line += "  {ratio:.2f}x [{low:.2f}, {high:.2f}] {with}, in turns".format(**turns)
            print(line)
    if options.save:
        options.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
