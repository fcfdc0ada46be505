from __future__ import annotations

import json
from pathlib import Path

import pytest

import pynar
from pynar.cli import main, quickstart


@pytest.mark.slow
def test_quickstart_leaves_table_plot_and_models(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(quickstart, "SIZES", {"train": 400, "valid": 10, "test": 12})
    output = tmp_path / "quickstart"
    arguments = ["quickstart", "--output", str(output), "--updates", "0.01"]
    assert main(arguments) == 0
    rows = json.loads((output / "results.json").read_text())
    assert [set(row) for row in rows] == [
        {
            "system",
            "data",
            "passes",
            "exact_match",
            "bleu",
            "repetition",
            "ms_per_sentence",
            "sentences_per_second",
            "speedup",
        }
    ] * 16
    assert [(row["system"], row["data"]) for row in rows[:3]] == [
        ("AR greedy", "raw"),
        ("AR beam 5", "raw"),
        ("vanilla NAT", "raw"),
    ]
    janus, flowseq = rows[-6:-3], rows[-3:]
    names = ["JANUS greedy", "JANUS draft and verify", "JANUS 4"]
    assert [row["system"] for row in janus] == names
    # Draft and verify writes what greedy search writes.
    assert janus[0]["exact_match"] == janus[1]["exact_match"]
    assert janus[0]["bleu"] == janus[1]["bleu"]
    names = ["FlowSeq", "FlowSeq IWD 15", "FlowSeq NPD 30"]
    assert [row["system"] for row in flowseq] == names
    # A short sentence takes part in fewer passes.
    passes = [row["passes"] for row in rows if row["system"].startswith("CMLM")]
    assert all(n - 1 < p <= n for p, n in zip(passes, [1, 4, 10] * 2, strict=True))
    assert rows[0]["speedup"] == 1.0
    assert (output / "quality_latency.png").read_bytes().startswith(b"\x89PNG")
    for name, kind in (("teacher", ""), *quickstart.STUDENTS):
        model = "-".join(filter(None, (name, kind)))
        assert len(pynar.load(output / model / "best").translate(["Tea is at 4:15."])) == 1

    # Run again, it goes on where it was: nothing is trained anew. What was measured will do.
    monkeypatch.setattr(quickstart, "_measure", lambda *_: [quickstart.Row(**row) for row in rows])
    trained = (output / "teacher/best/model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (output / "teacher/best/model.safetensors").stat().st_mtime_ns == trained

    capsys.readouterr()
    assert main([*arguments[:3], "--updates", "0.02"]) == 2
    assert "other settings" in capsys.readouterr().err
