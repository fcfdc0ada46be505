from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pynar.checkpoint import FORMAT
from pynar.cli import main
from pynar.evaluation.benchmark import System

SIZES = {"dim": 16, "ffn_dim": 24, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model": {"model": "cmlm", **SIZES}, "training": {}}))
    return path


def run(*arguments: object) -> int:
    return main(["bench", "decode", *map(str, arguments)])


@pytest.mark.slow
def test_one_command_leaves_numbers_table_and_plot(recipe: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    system = f"{recipe}:model.decoder_layers=2,iterations=3,length_candidates=4"
    settings = ("--threads", 1, "--batch", 1, 4, "--lengths", 5, "--repetitions", 2)
    assert run("--random", system, "--vocabulary", 50, *settings, "--output", output) == 0
    shown = capsys.readouterr().out
    assert "MaskPredict(iterations=3" in shown and "latency_length.png" in shown
    warning = "no strong baseline among the random models"
    assert f"s] warning: {warning}" in shown and f"\nwarning: {warning}" in shown
    result = json.loads((output / "results.json").read_text())
    assert [(row["kind"], row["batch"], row["length"]) for row in result["rows"]] == [
        ("length", 1, 5),
        ("length", 4, 5),
    ]
    assert [row["layer_evaluations"] for row in result["rows"]] == [1 + 3 * 2 * 4] * 2
    assert (output / "latency_length.png").read_bytes().startswith(b"\x89PNG")
    assert [text.startswith(warning) for text in result["warnings"]] == [True]
    # Without a text there is no quality to draw.
    assert not (output / "quality_latency.png").exists()

    table = (output / "table.md").read_text()
    assert "| sentences/s, 5 tokens |" in table and "1 thread, batch 4" in table
    assert f"**Warning: {warning}" in table

    # Table and plots come from the numbers alone, with quality where there is some.
    quality = {"bleu": 30.0, "chrf": 50.0, "signatures": {"bleu": "x"}}
    for kind, batch in (("text", 1), ("text", "max")):
        changes = {"kind": kind, "batch": batch, "quality": quality, "batch_sentences": 9}
        result["rows"].append({**result["rows"][0], **changes})
    results = tmp_path / "results.json"
    results.write_text(json.dumps(result))
    assert run("--redraw", results, "--output", tmp_path / "again") == 0
    again = tmp_path / "again"
    assert (again / "quality_latency.png").read_bytes().startswith(b"\x89PNG")
    assert "(of 9)" in (again / "table.md").read_text()


def test_every_model_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[System] = []

    def stop(systems: list[System], *_: object, **__: object) -> None:
        asked.extend(systems)
        raise ValueError("nothing is to be measured")

    monkeypatch.setattr("pynar.cli.bench.benchmark", stop)
    for name in ("cmlm", "janus"):
        fields = {**SIZES, "source_vocabulary": 50, "target_vocabulary": 50, "model": name}
        (tmp_path / name).mkdir()
        content = yaml.safe_dump({"format": FORMAT, "model": fields})
        (tmp_path / name / "config.yaml").write_text(content)
    model, rescorer = tmp_path / "cmlm", tmp_path / "janus"
    given = f"{model}:n_best=3,rescorer={rescorer}"
    run("--model", given, "--freeze", "none", "fp32", "bf16", "int8", "--engines", "none")
    assert [system.freeze for system in asked] == [None, "fp32", "bf16", "int8"]
    assert {system.rescorer for system in asked} == {str(rescorer)}
    assert [system.options for system in asked] == [{"n_best": 3}] * 4


def test_mistakes_are_one_line(recipe: Path, tmp_path: Path, capsys) -> None:
    def fails(*arguments: object) -> str:
        capsys.readouterr()
        assert run(*arguments, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return error

    (tmp_path / "one").write_text("a\n")
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "none").write_text("")
    assert "--model checkpoints or --random recipes" in fails()
    assert "ar_base" in fails("--random", "nothing")
    assert "unknown key `beam`" in fails("--random", f"{recipe}:beam=3")
    assert "expected OPTION=VALUE" in fails("--random", f"{recipe}:beam")
    assert "`rescorer` must be none" in fails("--random", f"{recipe}:rescorer=x")
    assert "only a --random recipe" in fails("--model", f"{recipe}:model.dim=3")
    assert "unknown key `dimm`" in fails("--random", f"{recipe}:model.dimm=3")
    assert "--reference needs --source" in fails("--random", recipe, "--reference", recipe)
    one, two, none = (tmp_path / name for name in ("one", "two", "none"))
    error = fails("--random", recipe, "--source", two, "--reference", one)
    assert "as many lines as the source (2), got 1" in error
    assert "expected lines, got none" in fails("--random", recipe, "--source", none)
    assert "`engine` must be one of" in fails(
        "--random", f"{recipe}:model.model=autoregressive", "--engines", "marian"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        run("--random", recipe, "--batch", "0")
    assert "expected a positive number or max, got '0'" in capsys.readouterr().err
