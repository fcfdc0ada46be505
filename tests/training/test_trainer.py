import functools
import json
import re

import pytest
import torch
from standin import StandIn, StandInConfig, make_config, weights_of

from pynar import checkpoint
from pynar.checkpoint import CheckpointError
from pynar.training import NonFiniteError, train


def run(data, output, model=None, *, resume="auto", init_from=None, translate=None, **changes):
    model = model or StandIn()
    config = make_config(**changes)
    result = train(
        model, data, output, config, resume=resume, init_from=init_from, translate=translate
    )
    return result, model


def log_of(output, event):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def state_of(path):
    return checkpoint.load_weights(path), checkpoint.load_training_state(path).tensors


def updates_in(output):
    return sorted(int(path.name.removeprefix("update-")) for path in output.glob("checkpoints/*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_is_uninterrupted_bit_for_bit(data, tmp_path, precision):
    settings = {"precision": precision, "weight_decay": 0.01, "validate_every": 4}
    run(data, tmp_path / "whole", max_updates=16, **settings)
    for end in (3, 9, 16):  # more than an epoch
        run(data, tmp_path / "parts", max_updates=end, **settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert max(line["epoch"] for line in log_of(whole, "train")) > 0
    torch.testing.assert_close(state_of(parts / "last"), state_of(whole / "last"), rtol=0, atol=0)
    assert log_of(parts, "valid")[-1]["loss"] == log_of(whole, "valid")[-1]["loss"]
    values = [checkpoint.load_training_state(path / "last").values for path in (whole, parts)]
    assert values[0]["progress"]["batch"] == values[1]["progress"]["batch"]
    assert values[0]["optimizer"] == values[1]["optimizer"]


def test_same_seed_same_run_other_seed_other_run(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(data, tmp_path / name, seed=seed)
    a, b, c = (checkpoint.load_weights(tmp_path / name / "last") for name in "abc")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["hidden.weight"], c["hidden.weight"])


def test_training_learns_and_writes_what_it_says(data, tmp_path):
    result, model = run(data, tmp_path, max_updates=60, validate_every=20, log_every=10)
    losses = [line["loss"] for line in log_of(tmp_path, "train")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert result.update == result.best_update == 60 and result.skipped == 0
    line = log_of(tmp_path, "train")[-1]
    assert {"token", "length", "lr", "grad_norm", "tokens_per_second", "epoch"} <= line.keys()
    assert result.best_score == -log_of(tmp_path, "valid")[-1]["loss"]
    assert list((tmp_path / "tensorboard").iterdir())
    torch.testing.assert_close(
        checkpoint.load_weights(result.last), weights_of(model), rtol=0, atol=0
    )
    assert model.training


def test_validation_changes_nothing(data, tmp_path):
    run(data, tmp_path / "often", validate_every=1)
    run(data, tmp_path / "once", validate_every=6)
    often, once = (checkpoint.load_weights(tmp_path / n / "last") for n in ("often", "once"))
    torch.testing.assert_close(often, once, rtol=0, atol=0)


def test_old_checkpoints_go_best_ones_stay(data, tmp_path):
    scores = {2: 30.0, 4: 70.0, 6: 20.0, 8: 50.0, 10: 10.0}

    def translate(model, tokenizer, sources):
        assert not model.training
        return sources

    settings = {"max_updates": 10, "validate_every": 2, "checkpoint_every": 1, "keep_last": 2}
    with pytest.MonkeyPatch.context() as patch:
        updates = iter(scores.values())
        patch.setattr("sacrebleu.corpus_bleu", lambda *_: type("B", (), {"score": next(updates)}))
        result, _ = run(
            data, tmp_path, translate=translate, metric="bleu", keep_best=2, average="best",
            **settings,
        )  # fmt: skip
    assert updates_in(tmp_path) == [4, 8, 9, 10]
    assert (tmp_path / "best").resolve().name == "update-0000004"
    assert (tmp_path / "last").resolve().name == "update-0000010"
    assert (result.best_update, result.best_score) == (4, 70.0)
    a, b = (checkpoint.load_weights(tmp_path / f"checkpoints/update-000000{u}") for u in (4, 8))
    mean = checkpoint.load_weights(result.averaged)
    torch.testing.assert_close(mean["hidden.weight"], (a["hidden.weight"] + b["hidden.weight"]) / 2)
    # Links are relative: a run can be moved.
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    checkpoint.verify(moved / "best")


def test_bleu_is_that_of_the_first_sentences(data, tmp_path):
    seen = []

    def translate(model, tokenizer, sources):
        seen.append(len(sources))
        return [source[::-1] for source in sources]  # the right answer

    run(data, tmp_path, translate=translate, metric="bleu", validation_sentences=20)
    assert seen == [20, 20]
    assert log_of(tmp_path, "valid")[-1]["bleu"] == pytest.approx(100)
    with pytest.raises(ValueError, match="a translation a sentence, 30, got 0"):
        run(data, tmp_path / "bad", translate=lambda *_: [])
    with pytest.raises(ValueError, match="`metric: bleu` needs a `translate` function"):
        run(data, tmp_path / "none", metric="bleu")


def test_patience_stops_and_stays_stopped(data, tmp_path):
    settings = {"metric": "bleu", "patience": 2, "translate": lambda m, t, s: ["x"] * len(s)}
    for _ in range(2):
        result, _ = run(data, tmp_path, max_updates=50, **settings)
        assert result.update == 9 and result.best_update == 3


def test_damaged_newest_checkpoint_falls_back_loudly(data, tmp_path, capsys):
    run(data, tmp_path / "whole")
    run(data, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/update-0000006/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    capsys.readouterr()
    run(data, tmp_path / "run")
    text = capsys.readouterr().out
    assert re.search(r"WARNING: .*update-0000006/model.safetensors: has \d+ bytes", text)
    assert "going back to" in text and "update-0000004" in text
    states = [state_of(tmp_path / name / "last") for name in ("whole", "run")]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (tmp_path / "run/checkpoints/damaged-update-0000006").exists()


def test_only_damaged_checkpoints_are_an_error(data, tmp_path):
    run(data, tmp_path)
    for path in tmp_path.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is good.*Remove the directory"):
        run(data, tmp_path)


def test_never_and_always_resume(data, tmp_path):
    with pytest.raises(ValueError, match="`resume: always`: .* holds no checkpoint"):
        run(data, tmp_path, resume="always")
    run(data, tmp_path)
    with pytest.raises(ValueError, match="`resume: never`: .* holds a run already"):
        run(data, tmp_path, resume="never")
    assert run(data, tmp_path, resume="always", max_updates=7)[0].update == 7
    with pytest.raises(ValueError, match="`resume` must be one of auto, never, always, got 'no'"):
        run(data, tmp_path, resume="no")


def test_changed_settings_are_named(data, tmp_path, capsys):
    run(data, tmp_path)
    run(data, tmp_path, max_updates=8, schedule="linear", lr=0.01, log_every=1)
    text = capsys.readouterr().out
    assert (
        "began with: max_updates 6 -> 8, lr 0.02 -> 0.01, schedule inverse_sqrt -> linear" in text
    )
    assert "log_every" not in text
    run(data, tmp_path, max_updates=9, max_tokens=100)
    assert "the batches are others now" in capsys.readouterr().out


def test_resuming_with_another_model_is_an_error(data, tmp_path):
    run(data, tmp_path)
    with pytest.raises(ValueError, match=r"`embedding.weight` must be \[60, 4\]"):
        run(data, tmp_path, StandIn(StandInConfig(dim=4)), max_updates=8)


def test_what_a_killed_process_left_is_removed(data, tmp_path):
    run(data, tmp_path)
    rubbish = [tmp_path / "checkpoints/.update-0000008.1a2b.tmp", tmp_path / ".averaged.1a2b.tmp"]
    for path in rubbish:
        path.mkdir()
    run(data, tmp_path, max_updates=7)
    assert not any(path.exists() for path in rubbish)


class Student(StandIn):
    """A stand-in with a wider length head and one weight more."""

    name = "student"

    def __init__(self):
        super().__init__(seed=3)
        self.length = torch.nn.Linear(self.config.dim, 2)
        self.extra = torch.nn.Parameter(torch.ones(2))

    def forward(self, example):
        batch, losses = example.batch, super().forward(example)
        return losses | {"length": batch.target_lengths.sum() * self.extra.sum()}


def test_init_from_takes_what_fits_and_says_so(data, tmp_path, capsys):
    run(data, tmp_path / "teacher")
    teacher = checkpoint.load_weights(tmp_path / "teacher/last")
    capsys.readouterr()
    frozen = {"lr": 1e-12, "warmup_init": 0.0, "max_updates": 1, "weight_decay": 0.0}
    _, student = run(
        data, tmp_path / "student", Student(), init_from=tmp_path / "teacher/last", **frozen
    )
    text = capsys.readouterr().out
    assert "5 of 8 weights taken" in text
    assert "length.weight (shape [1, 8], not [2, 8])" in text and "extra (not there)" in text
    torch.testing.assert_close(student.embedding.weight.data, teacher["embedding.weight"])
    assert student.readout.weight is student.embedding.weight
    # A resumed run keeps its own weights.
    run(data, tmp_path / "student", Student(), init_from=tmp_path / "nowhere", max_updates=2)


class Exploding(StandIn):
    """Has an infinite loss from the given forward pass on."""

    passes, good = 0, 8

    def forward(self, example):
        losses = super().forward(example)
        self.passes += self.training
        if self.training and self.passes > self.good:
            losses["token"] = losses["token"] * torch.inf
        return losses


def test_too_many_non_finite_updates_stop_the_run_with_advice(data, tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run(data, tmp_path, Exploding(), max_updates=50, non_finite_limit=3, clip_norm=None)
    text = str(caught.value)
    for part in (
        "stopped at update 7: 3 updates in a row had non-finite losses (`token` in 6 batches)",
        "learning rate 0.0151",
        "precision fp32; 3 updates skipped in all",
        "The weights are those of update 4",
        "update-0000006",
        "lower `lr`, lengthen `warmup_updates`, set `clip_norm`, look at",
    ):
        assert part in text
    assert log_of(tmp_path, "train")[-1]["skipped"] == 2


def test_a_few_non_finite_updates_are_reported_and_survived(data, tmp_path, capsys):
    class Hiccup(Exploding):
        def forward(self, example):
            losses = super().forward(example)
            self.good = torch.inf if self.passes == 10 else self.good
            return losses

    result, model = run(data, tmp_path, Hiccup(), max_updates=8)
    assert result.skipped == 1
    assert "skipped 1" in capsys.readouterr().out
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_compiled_model_trains_and_saves_under_its_own_names(data, tmp_path, monkeypatch):
    compiled = []
    real = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled.append(a) or real(*a, **k))
    run(data, tmp_path / "compiled", compile=True, max_updates=2)
    run(data, tmp_path / "eager", max_updates=2)
    a, b = (checkpoint.load_weights(tmp_path / name / "last") for name in ("compiled", "eager"))
    assert len(compiled) == 1
    torch.testing.assert_close(a, b)


def test_data_without_validation_split_trains(data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    for path in data.iterdir():
        (bare / path.name).write_bytes(path.read_bytes())
    (bare / "manifest.json").write_text(json.dumps(manifest))
    result, _ = run(bare, tmp_path / "run")
    assert result.best is None and result.last.exists()


def test_vocabulary_must_be_that_of_the_data(data, tmp_path):
    model = StandIn(StandInConfig(target_vocabulary=61))
    with pytest.raises(ValueError, match="`target_vocabulary` of the model must be 60, .* got 61"):
        run(data, tmp_path, model)


def test_device_settings_of_the_caller_come_back(data, tmp_path):
    torch.use_deterministic_algorithms(False)
    run(data, tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is not there")
def test_missing_device_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="`device: cuda` needs a CUDA device"):
        run(data, tmp_path, device="cuda")
