"""The journey of a user, command by command, on a corpus of seconds."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import pynar
from pynar.cli import main
from pynar.data import Manifest
from pynar.data.normalisation import corpus
from pynar.decoding import RescoringTranslator, Translation, Translator
from pynar.evaluation import evaluate

needs_ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="the extra `ctranslate2` is missing"
)

SIZES = {"dim": 16, "ffn_dim": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
TRAINING = {
    "max_updates": 6,
    "max_tokens": 512,
    "lr": 1e-2,
    "warmup_updates": 2,
    "validate_every": 3,
    "checkpoint_every": 3,
    "validation_sentences": 4,
    "log_every": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and what `prepare`, `train` and `distill` make of it."""
    place = tmp_path_factory.mktemp("cli")
    for split, examples in zip(("train", "valid", "test"), corpus(300, 10, 8, seed=2), strict=True):
        for side in ("source", "target"):
            lines = "".join(getattr(example, side) + "\n" for example in examples)
            (place / f"{split}.{side}").write_text(lines, encoding="utf-8")
    splits = [
        argument
        for split in ("train", "valid")
        for argument in (f"--{split}", f"{place}/{split}.source", f"{place}/{split}.target")
    ]
    run("prepare", *splits, "--output", place / "data", "--vocab-size", 150, "--split-digits")
    for name in ("autoregressive", "cmlm", "nat", "janus"):
        extra = {} if name == "autoregressive" else {"length_classes": 64}
        recipe = {"model": {"model": name, **SIZES, **extra}, "training": TRAINING}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        recipe_path, output = place / f"{name}.yaml", place / name
        run("train", "--recipe", recipe_path, "--data", place / "data", "--output", output)
    return place


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must be refused; its one line on standard error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_training_leaves_checkpoints_that_load(place: Path) -> None:
    assert Manifest.load(place / "data").splits["train"].pairs == 300
    for name in ("autoregressive", "cmlm", "nat"):
        assert (place / name / "best").is_symlink()
        assert pynar.load(place / name / "best").model.name == name


@pytest.mark.parametrize("name", ["autoregressive", "cmlm", "nat"])
def test_translate_keeps_order_and_empty_lines(place: Path, name: str, monkeypatch, capsys) -> None:
    lines = ["Tea is at 4:15.", "", "Ben bought 3 kg of tea.", "Tea is at 4:15."]
    source = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode() + b"\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", source)
    capsys.readouterr()
    run("translate", place / name / "best")
    captured = capsys.readouterr()
    out = captured.out.split("\n")
    assert len(out) == 5 and out[1] == out[4] == ""
    assert out[0] == out[3]
    assert out[:4] == pynar.load(place / name / "best").translate(lines)
    assert "decoder passes a line" in captured.err


def test_translate_writes_files_whole_and_with_scores(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    arguments = ("--input", place / "test.source", "--output", output)
    model = place / "autoregressive" / "best"
    run("translate", model, *arguments, "--beam", 3, "--n-best", 2, "--scores")
    rows = [line.split("\t") for line in output.read_text().splitlines()]
    assert [int(row[0]) for row in rows] == [i for i in range(8) for _ in range(2)]
    assert all(float(a[1]) >= float(b[1]) for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert list(tmp_path.iterdir()) == [output]


def test_iterations_are_passes(place: Path, capsys) -> None:
    capsys.readouterr()
    run("translate", place / "cmlm/best", "--input", place / "test.source", "--iterations", 3)
    assert "3.0 decoder passes a line" in capsys.readouterr().err


def test_distilled_data_train_a_student(place: Path, tmp_path: Path) -> None:
    teacher, data = place / "autoregressive/best", place / "data"
    run("distill", "--teacher", teacher, "--data", data, "--output", tmp_path / "kd", "--beam", 2)
    assert Manifest.load(tmp_path / "kd").options["distilled"]["options"]["beam"] == 2
    recipe = ("--recipe", place / "nat.yaml", "--init-from", teacher)
    run("train", *recipe, "--data", tmp_path / "kd", "--output", tmp_path / "nat")
    assert (tmp_path / "nat" / "last" / "model.safetensors").exists()


@needs_ctranslate2
def test_an_exported_model_translates_and_distils_as_its_checkpoint(
    place: Path, tmp_path: Path, capsys
) -> None:
    checkpoint, exported = place / "autoregressive/best", tmp_path / "exported"
    run("export", "--model", checkpoint, "--output", exported)
    assert "in float32" in capsys.readouterr().out
    texts = {}
    for name, model, engine in (
        ("checkpoint", checkpoint, ()),
        ("exported", exported, ()),
        ("auto", checkpoint, ("--engine", "auto")),
    ):
        output = tmp_path / f"{name}.txt"
        run("translate", model, "--input", place / "test.source", "--output", output, *engine)
        texts[name] = output.read_text()
    assert texts["checkpoint"] == texts["exported"] == texts["auto"]
    assert "engine: ctranslate2 " in capsys.readouterr().err
    data, manifests = ("--data", place / "data", "--strategy", "greedy"), {}
    for name, teacher, engine in (
        ("auto", checkpoint, ()),
        ("pynar", checkpoint, ("--engine", "pynar")),
        ("exported", exported, ()),
    ):
        output = tmp_path / f"kd-{name}"
        run("distill", "--teacher", teacher, *data, "--output", output, *engine)
        manifests[name] = Manifest.load(output)
    engines = [manifests[n].options["distilled"]["engine"]["name"] for n in manifests]
    assert engines == ["ctranslate2", "pynar", "ctranslate2"]
    train = [manifests[n].files["train.arrow"] for n in manifests]
    assert train[0] == train[1] == train[2]


@needs_ctranslate2
def test_the_engine_asked_for_is_taken_or_refused(place: Path, tmp_path: Path, capsys) -> None:
    text = ("--input", place / "test.source")
    model, other = place / "autoregressive/best", place / "cmlm/best"
    run("translate", model, *text, "--engine", "auto", "--strategy", "sampling")
    assert "engine: pynar (" in capsys.readouterr().err
    run("translate", other, *text, "--engine", "auto")
    assert "engine: pynar (CTranslate2 runs autoregressive" in capsys.readouterr().err
    engine = ("--engine", "ctranslate2")
    assert "not a cmlm model" in fails(capsys, "translate", other, *text, *engine)
    error = fails(capsys, "translate", model, *text, *engine, "--compute-type", "int3")
    assert "`compute_type` must be" in error
    error = fails(capsys, "translate", model, *text, "--compute-type", "int8")
    assert "--compute-type int8 is of --engine ctranslate2" in error
    error = fails(capsys, "export", "--model", other, "--output", tmp_path / "x")
    assert "must be an autoregressive" in error and not (tmp_path / "x").exists()
    run("export", "--model", model, "--output", tmp_path / "x", "--quantization", "int8")
    error = fails(capsys, "translate", tmp_path / "x", *text, "--engine", "pynar")
    assert "is an exported model" in error


def test_a_missing_engine_leaves_the_work_to_ours(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    model, text = place / "autoregressive/best", ("--input", place / "test.source")
    run("translate", model, *text, "--engine", "auto")
    assert "pip install 'pynar[ctranslate2]'" in capsys.readouterr().err
    error = fails(capsys, "translate", model, *text, "--engine", "ctranslate2")
    assert "pip install 'pynar[ctranslate2]'" in error
    error = fails(capsys, "export", "--model", model, "--output", place / "x")
    assert "pip install 'pynar[ctranslate2]'" in error


def test_evaluate_scores_and_times_models_beside_files(place: Path, tmp_path: Path, capsys) -> None:
    results = tmp_path / "results.json"
    models = (place / "autoregressive/best", f"{place}/cmlm/best:iterations=2")
    run(
        *("evaluate", "--reference", place / "test.target", "--source", place / "test.source"),
        *("--hypothesis", place / "test.target", "--model", *models),
        *("--latency-sentences", 2, "--bootstrap", 20, "--json", results, "--diversity"),
        *("--plot", tmp_path / "passes.png"),
    )
    assert (tmp_path / "passes.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(results.read_text())
    rows = written["rows"]
    assert 0 <= written["diversity"]["pairwise_bleu"] <= 100
    # The autoregressive model stands there with greedy search and with its beam.
    assert len(rows) == 4
    assert rows[0]["bleu"] == pytest.approx(100) and "p50_ms" not in rows[0]
    assert "Greedy" in rows[1]["system"] and "beam=5" in rows[2]["system"]
    assert rows[3]["passes"] == 2 and rows[3]["sentences_per_second"] > 0
    assert "nrefs:1" in rows[3]["signatures"]["bleu"]
    assert "paired bootstrap" in capsys.readouterr().out


def test_evaluate_without_timing_keeps_what_is_done(
    place: Path, tmp_path: Path, monkeypatch
) -> None:
    results = tmp_path / "results.json"
    command = (
        *("evaluate", "--reference", place / "test.target", "--source", place / "test.source"),
        *("--no-timing", "--json", results, "--model"),
    )
    ours, other = f"{place}/cmlm/best:iterations=2", place / "autoregressive/best"
    run(*command, ours, other)
    rows = json.loads(results.read_text())["rows"]
    assert [row["passes"] == 2 for row in rows] == [True, False, False]
    assert all("p50_ms" not in row for row in rows)
    lines = pynar.load(place / "cmlm/best").translate(
        (place / "test.source").read_text().splitlines(), iterations=2
    )
    expected = evaluate(lines, [(place / "test.target").read_text().splitlines()])
    assert rows[0]["chrf"] == expected.chrf > 0
    results.unlink()

    def decode(self: Translator, *arguments: Any, **options: Any) -> list[Translation]:
        if self.model.name == "autoregressive":
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    whole = Translator.decode
    monkeypatch.setattr(Translator, "decode", decode)
    assert main([str(argument) for argument in (*command, ours, other)]) == 130
    assert json.loads(results.read_text())["rows"] == rows[:1]


def test_evaluate_says_how_much_of_a_draft_is_accepted(place: Path, tmp_path: Path, capsys) -> None:
    model, results = place / "janus/best", tmp_path / "results.json"
    run(
        *("evaluate", "--reference", place / "test.target", "--source", place / "test.source"),
        *("--no-timing", "--json", results, "--bootstrap", 0),
        *("--model", f"{model}:strategy=draft_and_verify", f"{model}:strategy=greedy"),
    )
    drafted, greedy = json.loads(results.read_text())["rows"]
    found = pynar.load(model).decode(
        (place / "test.source").read_text().splitlines(), "draft_and_verify"
    )
    counts = [sum(one.accepted for one in found), sum(one.verified for one in found)]
    assert drafted["accepted"] == counts[0] / counts[1] and "accepted" not in greedy
    assert "accepted" in capsys.readouterr().out


def test_a_rescorer_chooses_among_candidates(place: Path, tmp_path: Path, capsys) -> None:
    """As `RescoringTranslator` does, from both commands."""
    student, teacher = place / "cmlm/best", place / "autoregressive/best"
    output, results = tmp_path / "out.txt", tmp_path / "results.json"
    chosen = ("--rescorer", teacher, "--iterations", 2, "--n-best", 3, "--output", output)
    run("translate", student, "--input", place / "test.source", *chosen)
    assert "3.0 decoder passes a line" in capsys.readouterr().err
    translator = RescoringTranslator(pynar.load(student), pynar.load(teacher))
    lines = (place / "test.source").read_text().splitlines()
    assert output.read_text().splitlines() == translator.translate(lines, iterations=2, n_best=3)
    run(
        *("evaluate", "--reference", output, "--source", place / "test.source", "--bootstrap", 0),
        *("--model", f"{student}:iterations=2,n_best=3,rescorer={teacher}", "--json", results),
    )
    (row,) = json.loads(results.read_text())["rows"]
    assert row["ter"] == 0 and row["passes"] == 3


def test_average_of_a_checkpoint_with_itself_is_the_checkpoint(place: Path, tmp_path: Path) -> None:
    run("average", *[place / "nat/best"] * 2, "--output", tmp_path / "mean")
    lines = (place / "test.source").read_text().splitlines()
    translate = [
        pynar.load(path).translate(lines) for path in (place / "nat/best", tmp_path / "mean")
    ]
    assert translate[0] == translate[1]


def test_info_lists_the_operators(capsys) -> None:
    run("info")
    assert "mask_predict_step" in capsys.readouterr().out


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys) -> None:
    text, data = place / "test.source", place / "data"
    error = fails(capsys, "translate", tmp_path / "none", "--input", text)
    assert "none" in error
    error = fails(capsys, "translate", place / "cmlm/best", "--input", text, "--beam", 5)
    assert "beam" in error and "iterations" in error
    error = fails(capsys, "translate", place / "cmlm/best", "--input", text, "--strategy", "greedy")
    assert "must be one of mask_predict" in error
    error = fails(capsys, "train", "--recipe", "none", "--data", data, "--output", tmp_path / "x")
    assert "multi30k_ar" in error
    change = ("--set", "training.warmup=3")
    recipe = ("--recipe", place / "nat.yaml")
    error = fails(capsys, "train", *recipe, "--data", data, "--output", tmp_path / "x", *change)
    assert "warmup_updates" in error
    # What cannot be validated is refused before it is trained.
    trained = ("train", "--data", data, "--output", tmp_path / "x", "--recipe")
    change = ("--set", "validation.beam=5")
    error = fails(capsys, *trained, place / "cmlm.yaml", *change)
    assert "`validation`" in error and "beam" in error
    change = ("--set", "model.length_weight=0", "validation.strategy=mask_predict")
    error = fails(capsys, *trained, "quickstart_janus", *change)
    assert "`validation`" in error and "must be one of beam, greedy" in error
    error = fails(capsys, "evaluate", "--reference", text)
    assert "--hypothesis" in error
    error = fails(capsys, "evaluate", "--reference", text, "--hypothesis", place / "train.source")
    assert "8" in error or "300" in error
    scored = ("evaluate", "--reference", text, "--hypothesis", text)
    assert "--model" in fails(capsys, *scored, "--plot", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_missing_argument_shows_usage(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "--recipe" in capsys.readouterr().err
