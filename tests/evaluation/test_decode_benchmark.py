from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import pynar
from pynar import checkpoint
from pynar.data import Tokenizer
from pynar.data.normalisation import corpus
from pynar.decoding import BeamSearch, Greedy, MaskPredict, RescoringTranslator
from pynar.evaluation import evaluate
from pynar.evaluation.benchmark import Plan, System, benchmark, expand, run
from pynar.evaluation.benchmark.client import Worker, WorkerError
from pynar.evaluation.benchmark.engines import (
    CTranslate2Engine,
    PyNAREngine,
    export,
    load_engine,
)
from pynar.evaluation.benchmark.intervals import median_interval, ratio_interval
from pynar.evaluation.benchmark.systems import layer_evaluations
from pynar.evaluation.benchmark.tables import markdown, tables
from pynar.evaluation.benchmark.worker import sample
from pynar.evaluation.environment import busy
from pynar.models import build
from pynar.nn.flows import Coupling

SIZES = {"dim": 16, "ffn_dim": 24, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}
LINES = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that were never trained, a recipe each, and text."""
    place = tmp_path_factory.mktemp("bench")
    examples, _, test = corpus(200, 1, LINES, seed=3)
    text = [example.source for example in examples], [example.target for example in examples]
    tokenizer = Tokenizer.train(*text, vocab_size=120)
    (place / "source").write_text("".join(e.source + "\n" for e in test), encoding="utf-8")
    (place / "target").write_text("".join(e.target + "\n" for e in test), encoding="utf-8")
    sizes = {"source_vocabulary": 120, "target_vocabulary": 120, "share_embeddings": True}
    for name in ("autoregressive", "cmlm", "flowseq"):
        torch.manual_seed(1)
        fields: dict[str, Any] = {"model": name, **SIZES, "norm": "pre"}
        if name == "cmlm":
            fields["length_classes"] = 12
        if name == "flowseq":
            fields |= {"flow_steps": [1, 2, 1], "flow_ffn_dim": 8, "posterior_layers": 1}
        checkpoint.save(place / name, build({**sizes, **fields}), tokenizer)
        recipe = {"model": fields, "training": {}}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return place


def random_system(place: Path, name: str, **changes: Any) -> System:
    recipe = str(place / f"{name}.yaml")
    return System(model=recipe, random=True, vocabulary=60, **changes)


def enumerated(statistic: Any, count: int) -> tuple[float, float]:
    """Percentiles of a statistic over every resample there is."""
    draws = itertools.product(range(count), repeat=count)
    values = [statistic(list(draw)) for draw in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return low, high


def test_the_bootstrap_is_that_over_all_resamples() -> None:
    a, b = np.array([5.0, 3.0, 8.0, 4.0, 7.0]), np.array([1.0, 2.0, 1.5, 3.0, 2.5])
    found = median_interval(list(a))
    assert found["value"] == 5
    assert (found["low"], found["high"]) == enumerated(lambda draw: np.median(a[draw]), 5)
    found = ratio_interval(list(a), list(b))
    expected = enumerated(lambda draw: np.median(a[draw]) / np.median(b[draw]), 5)
    assert found["value"] == 5 / 2
    assert (found["low"], found["high"]) == pytest.approx(expected)


def test_a_drift_that_both_follow_leaves_their_ratio_alone() -> None:
    drift = [1.0, 1.4, 2.0, 3.1, 4.9]
    found = ratio_interval([3 * x for x in drift], drift)
    assert list(found.values()) == pytest.approx([3, 3, 3])
    with pytest.raises(ValueError, match="pairs, got 5 and 1"):
        ratio_interval(drift, [1.0])
    with pytest.raises(ValueError, match="at least one value"):
        median_interval([])


@pytest.mark.parametrize(
    ("name", "strategy", "options", "width"),
    [
        ("autoregressive", "greedy", {}, 1),
        ("autoregressive", "beam", {"beam": 3}, 3),
        ("autoregressive", "sampling", {"samples": 2}, 2),
        ("cmlm", None, {"iterations": 4, "length_candidates": 3}, 3),
        ("cmlm", None, {"iterations": 2, "length_candidates": 20}, 12),
    ],
)
def test_layer_evaluations_are_the_layers_that_run(place, name, strategy, options, width) -> None:
    """Counted by hooks, as the sequences that pass through every layer."""
    system = System(model=str(place / name), strategy=strategy, options=options)
    assert system.width == width
    translator = pynar.load(place / name)
    rows = []
    for stack in (translator.model.encoder, translator.model.decoder):
        for layer in stack.layers:
            layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    (result,) = translator.decode(["Tea is at 4:15."], system.decoding)
    assert layer_evaluations(1, 2, result.passes, width) == (1 + 2 * result.passes * width)
    if strategy == "sampling":
        # Samples end apart: there the count is of the longest one.
        assert sum(rows) <= 1 + 2 * result.passes * width
    else:
        assert sum(rows) == layer_evaluations(1, 2, result.passes, width)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cmlm", {"options": {"iterations": 3, "length_candidates": 4, "n_best": 2}}),
        ("flowseq", {"strategy": "npd", "options": {"length_candidates": 2, "samples": 3}}),
    ],
)
def test_a_rescorer_chooses(place: Path, name: str, options: dict) -> None:
    """As it does elsewhere; its layers are counted by hooks, and its weights with the others."""
    scorer = str(place / "autoregressive")
    system = System(model=str(place / name), rescorer=scorer, **options)
    engine = PyNAREngine(system)
    expected = RescoringTranslator(pynar.load(place / name), pynar.load(scorer))
    (line, *_) = lines = (place / "source").read_text().splitlines()
    results = expected.decode(lines, system.decoding)
    texts, passes = engine.translate(lines)
    assert texts == [result.text for result in results]
    assert passes == [result.passes for result in results]
    models = [engine.translator.model, engine.writer.scorer.translator.model]
    assert engine.parameters == sum(p.numel() for model in models for p in model.parameters())
    assert system.name.startswith(f"{place / name} + {scorer} ")

    rows: list[int] = []
    layers = [models[1].encoder.layers, models[1].decoder.layers]
    for layer in itertools.chain(*layers):
        layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    (result,) = engine.writer.decode([line], system.decoding)
    alone = dataclasses.replace(system, rescorer=None).layer_evaluations(result.passes - 1)
    # Equal ones would have been scored once.
    assert len(result.alternatives) == (2 if name == "cmlm" else 6)
    assert system.layer_evaluations(result.passes) - alone == sum(rows)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("autoregressive", {"strategy": "greedy"}, 8),
        ("autoregressive", {"strategy": "beam", "options": {"beam": 3}}, 8),
        ("cmlm", {"options": {"iterations": 3}}, 3),
        ("flowseq", {}, 1),
        ("flowseq", {"strategy": "npd", "options": {"samples": 2}}, 1),
        ("flowseq", {"strategy": "iwd", "options": {"samples": 2}}, 2),
    ],
)
def test_lengths_are_forced(place: Path, name: str, options: dict, passes: int) -> None:
    engine = PyNAREngine(random_system(place, name, **options))
    batch = engine.prepare([[7] * 7, [9] * 7], 7)
    # As many drafts as were asked for.
    assert getattr(batch[2], "drafts", engine.width) == engine.width
    written, counted = engine.generate(batch)
    assert [len(ids) for ids in written] == [7, 7]
    assert counted == [passes, passes]


def test_couplings_count_as_layers(place: Path) -> None:
    system = random_system(place, "flowseq", options={"samples": 3})
    found = PyNAREngine(system).translator.model
    couplings = sum(isinstance(module, Coupling) for module in found.modules())
    assert system.decoder_layers == 2 + couplings and system.width == 3
    assert random_system(place, "flowseq", strategy="npd").width == 30


def test_sampling_cannot_be_forced(place: Path) -> None:
    engine = PyNAREngine(random_system(place, "autoregressive", strategy="sampling"))
    with pytest.raises(ValueError, match="Sampling cannot be forced"):
        engine.prepare([[7]], 7)


def test_what_has_no_place_in_a_cell_is_left_out_and_told(place: Path) -> None:
    rescored = System(
        model=str(place / "flowseq"), strategy="npd", rescorer=str(place / "autoregressive")
    )
    drafting = System(model="quickstart_janus", random=True, strategy="draft_and_verify")
    sampling = random_system(place, "autoregressive", strategy="sampling")
    greedy = random_system(place, "autoregressive", strategy="greedy")
    systems = [rescored, dataclasses.replace(rescored, freeze="fp32"), drafting, sampling, greedy]
    plan = Plan(threads=(1,), batches=(4,), lengths=(3,), repetitions=1)
    turns: list[str] = []
    measured = {}
    for cell in plan.cells(LINES):
        members = [Clockwork(system, [0.1], turns) for system in systems]
        rows = run._measure(cell, members, run.Scores([], []), plan, ["a"] * LINES)
        measured[cell["kind"]] = [row.system for row in rows if row.failure is None]
    assert measured == {"text": [rescored.name] * 2, "model": [], "length": [greedy.name]}
    warnings = run._warnings(systems, plan, LINES)
    assert len(warnings) == 4
    assert "not measured from ids to ids or with given lengths: its rescorer" in warnings[0]
    assert warnings[1].startswith(f"{drafting.name} is not measured with given lengths: its passes")
    assert warnings[2].startswith(f"{sampling.name} is not measured with given lengths: what it")
    assert warnings[3].startswith("no strong baseline among the checkpoints")
    # Without a text, nobody looks for it there.
    assert not any("from ids" in warning for warning in run._warnings(systems, plan, 0))


def test_a_missing_baseline_is_told(place: Path) -> None:
    model, plan = System(model=str(place / "autoregressive")), Plan(threads=(1,))
    greedy, beam = expand([model], freezes=[None], engines=[])
    nar = System(model=str(place / "cmlm"))
    rescored = dataclasses.replace(greedy, rescorer=model.model)
    assert run._warnings([nar, greedy], plan, LINES) == []
    (warning,) = run._warnings([nar, random_system(place, "cmlm"), greedy], plan, LINES)
    assert "among the random models" in warning and "--random ar_base" in warning
    for systems in ([nar], [nar, beam]):
        (warning,) = run._warnings(systems, plan, LINES)
        assert "among the checkpoints" in warning and "--model runs/ar/best" in warning
    assert "no strong baseline" in run._warnings([rescored], plan, LINES)[-1]


def test_ctranslate2_writes_what_pynar_writes(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    lines = [*(place / "source").read_text().splitlines(), " "]
    ours = System(model=str(place / "autoregressive"), strategy="greedy")
    theirs = dataclasses.replace(ours, engine="ctranslate2")
    export(theirs, str(tmp_path / "text"))
    engine = load_engine(theirs, 1, str(tmp_path / "text"))
    # At batch 1 even the limits are the same.
    alone = [engine.translate([line])[0][0] for line in lines]
    assert alone == [PyNAREngine(ours).translate([line])[0][0] for line in lines]
    shared = load_engine(dataclasses.replace(theirs, workers=True), 2, str(tmp_path / "text"))
    assert isinstance(shared, CTranslate2Engine) and shared.workers == 2
    assert shared.engine.num_translators == 2
    for count in (1, len(lines)):
        assert shared.translate(lines[:count])[0] == engine.translate(lines[:count])[0]
    random = random_system(place, "autoregressive", strategy="greedy", engine="ctranslate2")
    export(random, str(tmp_path / "random"))
    engine = load_engine(random, 1, str(tmp_path / "random"))
    ids, passes = engine.generate(engine.prepare([[7] * 7, [9] * 7], 7))
    assert passes == [8, 8] and [len(row) for row in ids] == [8, 8]
    forced = PyNAREngine(dataclasses.replace(random, engine="pynar"))
    expected, _ = forced.generate(forced.prepare([[7] * 7, [9] * 7], 7))
    assert [row[:7] for row in ids] == expected


class Clockwork:
    """A member without a worker: takes its times from a list and notes its turns."""

    def __init__(self, system: System, seconds: list[float], turns: list[str]) -> None:
        self.system, self.threads, self.turns = system, 1, turns
        self.facts = {"parameters": 5, "base_bytes": 1, "load_seconds": 0.0}
        self.seconds = iter(seconds)

    def warm_up(self, cell: dict) -> None:
        self.turns.append(f"warm {self.system.engine_name}")

    def largest(self, cell: dict) -> tuple[int, str]:
        return 64, "no more"

    def run(self, cell: dict, outputs: bool) -> dict:
        self.turns.append(self.system.engine_name)
        spent = next(self.seconds)
        if spent < 0:
            raise WorkerError("broke")
        batch = [spent, 2 * spent, 3 * spent]
        counts = {"batches": 3, "sentences": 6, "tokens": 12, "passes": 4.0, "peak_bytes": 9}
        return {"seconds": batch, "texts": None, **counts}


def test_systems_take_turns_and_figures_are_medians(place: Path) -> None:
    system = random_system(place, "autoregressive", strategy="greedy")
    turns: list[str] = []
    members = [
        Clockwork(system, [0.1, 0.3, 0.2], turns),
        Clockwork(dataclasses.replace(system, freeze="fp32"), [0.2, 0.6, 0.4], turns),
        Clockwork(dataclasses.replace(system, freeze="int8"), [0.2, -1.0], turns),
    ]
    plan = Plan(threads=(1,), repetitions=3)
    cell = {"kind": "length", "length": 3, "batch": "max", "seed": 0}
    rows = run._measure(cell, members, run.Scores([], []), plan, [])
    names = [member.system.engine_name for member in members]
    assert turns[:3] == [f"warm {name}" for name in names]
    assert turns[3:] == [*names, *names, *names[:2]]
    first, second, third = rows
    assert first.baseline and first.fastest_engine and not second.baseline
    assert first.ms["p50"]["value"] == pytest.approx(400)
    assert first.ms["p95"] is None  # of three batches there is no 95th percentile
    assert first.sentences_per_second["value"] == pytest.approx(6 / 1.2)
    assert first.tokens_per_second["value"] == pytest.approx(12 / 1.2)
    assert list(second.speedup.values()) == pytest.approx([0.5] * 3)
    assert (first.batch, first.batch_sentences, first.peak_bytes) == ("max", 64, 9)
    assert first.layer_evaluations == 1 + 4 * 2
    assert third.failure == "broke" and third.speedup is None


@pytest.fixture(scope="module")
def result(place: Path) -> dict[str, Any]:
    """Everything at once, from real processes."""
    engines = ["ctranslate2:float32"] if _has_ctranslate2() else []
    models = [
        System(model=str(place / "autoregressive"), strategy="greedy"),
        System(model=str(place / "cmlm"), options={"iterations": 3, "length_candidates": 2}),
        random_system(place, "cmlm", changes=['model.positions="learned"', "model.max_length=16"]),
    ]
    plan = Plan(
        threads=(1,),
        batches=(1, 4, "max"),
        lengths=(5, 40),
        repetitions=2,
        latency_sentences=6,
        warmup_sentences=2,
    )
    lines, references = ((place / name).read_text().splitlines() for name in ("source", "target"))
    systems = expand(models, freezes=[None], engines=engines)
    return benchmark(systems, plan, lines=lines, references=[references])


def _has_ctranslate2() -> bool:
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        return False
    return True


def rows_of(result: dict, **facts: Any) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if all(row[k] == v for k, v in facts.items())]


@pytest.mark.slow
def test_every_cell_has_a_row_for_every_system(result: dict) -> None:
    assert result["complete"] and json.loads(json.dumps(result)) == result
    systems = len(result["systems"])
    assert systems == 3 + _has_ctranslate2()
    for kind in ("text", "model"):
        for batch in (1, 4, "max"):
            assert len(rows_of(result, kind=kind, batch=batch)) == systems - 1
    assert len(rows_of(result, kind="length", length=5)) == systems
    assert set(result["ceilings"]["1"]) == {
        "read_bytes_per_second",
        "fp32_matmul_flops",
        "bf16_matmul_flops",
    }
    # Without the name of the build, which not every wheel's metadata has.
    version = result["environment"]["versions"]["torch"]
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]


def test_rows_say_what_ran(result: dict) -> None:
    for row in result["rows"]:
        if row["failure"] is None:
            assert row["repetitions"] == 2 == len(row["compared_ms"])
            assert 0 < row["base_bytes"] and 0 < row["peak_bytes"] and row["parameters"] > 0
            assert row["ms"]["p50"]["low"] <= row["ms"]["p50"]["value"] <= row["ms"]["p50"]["high"]
    (row,) = rows_of(result, kind="text", batch="max", family="cmlm", random=False)
    assert (row["batch_sentences"], row["sentences"], row["passes"]) == (LINES, LINES, 3)
    assert row["layer_evaluations"] == 1 + 3 * 2 * 2
    (row,) = rows_of(result, kind="text", batch=1, family="cmlm", random=False)
    assert row["sentences"] == 6 and sum(b["sentences"] for b in row["buckets"]) == 6
    for batch in (1, 4, "max"):
        assert sum(row["baseline"] for row in rows_of(result, kind="text", batch=batch)) == 1


def test_quality_is_that_of_the_translations(result: dict, place: Path) -> None:
    lines, references = ((place / name).read_text().splitlines() for name in ("source", "target"))
    for name, options in (
        ("autoregressive", {"strategy": "greedy"}),
        ("cmlm", {"iterations": 3, "length_candidates": 2}),
    ):
        texts = pynar.load(place / name).translate(lines, **options)
        expected = dataclasses.asdict(evaluate(texts, [references]))
        rows = rows_of(result, family=name, random=False, engine="PyNAR")
        for row in rows:
            if row["kind"] != "length":
                found = dict(row["quality"])
                assert found.pop("sentences") == LINES
                # Where ids were timed, or a sample of the text, what was scored is named.
                assert found.pop("of")["kind"] == "text"
                assert found == expected
            else:
                assert row["quality"] is None


def test_what_cannot_be_is_a_failed_row_and_a_note(result: dict, place: Path) -> None:
    (row,) = rows_of(result, kind="length", length=40, random=True)
    assert "positions for 16 tokens" in row["failure"]
    assert all(not r["failure"] for r in result["rows"] if r is not row)
    made = tables(result)
    assert [table.title.split(";")[0] for table in made] == [
        "Raw text in to raw text out",
        "Model only: token ids in, token ids out, batches ready",
        "By length of the source, raw text to raw text",
        "By length, model only, source and target of as many random tokens",
    ]
    assert all(len(line) == len(table.header) for table in made for line in table.rows)
    assert "failed (1)" in made[3].rows[-1]
    assert made[3].title.endswith("batch 1, 5 sentences a length")
    # The buckets are those of the source's words.
    words = [len(line.split()) for line in (place / "source").read_text().splitlines()]
    counts = Counter((n - 1) // 10 for n in (words[i] for i in sample(LINES, 6)))
    assert made[2].header[2:] == [
        f"ms p50, {10 * tens + 1}-{10 * tens + 10} words ({count} sentences)"
        for tens, count in sorted(counts.items())
    ]
    assert len(made[2].rows) == len(made[0].rows)
    text = markdown(result)
    assert "positions for 16 tokens" in text and "nrefs:1" in text and "1 (baseline)" in text


@pytest.mark.slow
def test_a_dead_worker_is_told_and_replaced(place: Path) -> None:
    system = System(model=str(place / "cmlm"))
    member = run.Member(system, 1, Plan(threads=(1,)), ["Tea is at 4:15."])
    cell = {"kind": "text", "batch": 1, "lines": 1}
    try:
        assert member.run(cell, outputs=True)["sentences"] == 1
        os.kill(member._worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"signal 9, as when memory runs out"):
            member.run(cell)
        assert member.run(cell)["sentences"] == 1
        worker = member._worker
        with pytest.raises(WorkerError, match="no answer within 0 s"):
            worker.ask({"do": "ceilings", "device": "cpu"}, 0.0)
        assert worker._process.poll() is not None
        with pytest.raises(WorkerError, match="was ended"):
            worker.ask({"do": "ceilings", "device": "cpu"}, 0.0)
    finally:
        member.close()


@pytest.mark.slow
def test_a_failed_request_is_answered_and_the_end_of_the_input_ends_a_worker(place: Path) -> None:
    system = dataclasses.asdict(System(model=str(place / "nothing")))
    with Worker(1) as worker:
        with pytest.raises(WorkerError, match="CheckpointError.*nothing") as caught:
            worker.ask({"do": "load", "system": system}, 60)
        assert not caught.value.dead
        with pytest.raises(WorkerError, match="cannot 'run' here"):
            worker.ask({"do": "run"}, 60)
        worker._process.stdin.close()
        assert worker._process.wait(60) == 0


def test_a_system_that_does_not_load_fails_for_good(place: Path, monkeypatch) -> None:
    started = []

    class Failing:
        def __init__(self, threads: int) -> None:
            started.append(threads)

        def ask(self, request: dict, timeout: float) -> dict:
            raise WorkerError("no such thing")

        def close(self) -> None:
            pass

    monkeypatch.setattr(run, "Worker", Failing)
    member = run.Member(System(model=str(place / "cmlm")), 2, Plan(threads=(2,)), [])
    for _ in range(2):
        with pytest.raises(WorkerError, match="no such thing"):
            member.run({})
    assert started == [2]


def test_the_largest_batch_is_found_by_doubling(place: Path, monkeypatch) -> None:
    """Until the text, the time or the memory runs out."""
    plan = Plan(threads=(1,), batches=(1, 8, "max"), time_limit=10.0)
    member = run.Member(System(model=str(place / "cmlm")), 1, plan, [])

    def search(lines: int, seconds: float = 0.0, memory: int = 1 << 20) -> tuple[int, str]:
        def answer(cell: dict, **request: Any) -> dict:
            if cell["batch"] > memory:
                raise WorkerError("MemoryError")
            return {"seconds": [seconds * cell["batch"]]}

        monkeypatch.setattr(member, "run", answer)
        return member.largest({"kind": "text", "batch": "max", "lines": lines})

    for lines in (100, 5, 8):
        assert search(lines) == (lines, f"there are no more than {lines} sentences")
    assert search(1000, seconds=0.1) == (64, "a batch of 128 took 13 s")
    assert search(1000, seconds=9) == (8, "a batch of 16 took 144 s")
    assert search(1000, memory=40) == (32, "a batch of 64: MemoryError")


def test_a_cell_that_takes_too_long_is_refused(place: Path, monkeypatch) -> None:
    plan = Plan(threads=(1,), time_limit=10.0)
    member = run.Member(System(model=str(place / "cmlm")), 1, plan, [])
    answer = {"seconds": [2.0, 1.0], "batches": 20}
    monkeypatch.setattr(member, "run", lambda cell, **limits: answer)
    with pytest.raises(WorkerError, match="up to 30 s, more than the time limit of 10 s"):
        member.warm_up({})


def test_a_largest_batch_whose_repetitions_take_too_long_is_halved(
    place: Path, monkeypatch
) -> None:
    """One batch is within the limit; a repetition has several."""
    plan = Plan(threads=(1,), batches=(4, "max"), time_limit=10.0)
    member = run.Member(System(model=str(place / "cmlm")), 1, plan, [])

    def answers(seconds: float) -> run._Entry:
        monkeypatch.setattr(
            member,
            "run",
            lambda cell, **_: {"seconds": [seconds * cell["batch"]], "batches": 5},
        )
        entry = run._Entry(member, {"kind": "text", "batch": "max", "lines": 1000}, plan)
        entry.attempt(entry.prepare)
        return entry

    entry = answers(0.1)
    assert entry.row.failure is None and entry.row.batch_sentences == entry.cell["batch"] == 16
    assert entry.row.batch_limit == (
        "a batch of 32: a repetition would take up to 16 s, more than the time limit of 10 s"
    )
    assert "a repetition would take up to 30 s" in str(answers(1.5).row.failure)


def test_engines_are_for_autoregressive_models(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    engines = ["ctranslate2", "ctranslate2:int8", "ctranslate2:int8:workers"]
    model = System(model=str(place / "autoregressive"), strategy="greedy")
    names = [s.engine_name for s in expand([model], freezes=[None], engines=engines)]
    int8 = "CTranslate2 int8"
    assert names == ["PyNAR", "CTranslate2 float32", int8, f"{int8}, workers"]
    rescored = dataclasses.replace(model, rescorer=model.model)  # PyNAR alone
    assert len(expand([rescored], freezes=[None], engines=engines)) == 1
    janus = System(model="quickstart_janus", random=True, strategy="greedy")
    assert len(expand([janus], freezes=[None], engines=engines)) == 1
    for wrong in ("ctranslate2:int8:x", "ctranslate2:int8:workers:2"):
        with pytest.raises(ValueError, match=f"NAME:COMPUTE_TYPE:workers, got '{wrong}'"):
            expand([model], freezes=[None], engines=[wrong])


def test_expansion(place: Path) -> None:
    models = [System(model=str(place / "autoregressive")), System(model=str(place / "cmlm"))]
    freezes = [None, "int8"]
    engines = ["ctranslate2:int8"] if _has_ctranslate2() else []
    systems = expand([*models, models[0]], freezes=freezes, engines=engines)
    others = [system for system in systems if system.engine == "ctranslate2"]
    assert [type(s.decoding) for s in others] == [Greedy, BeamSearch][: 2 * len(engines)]
    assert all(system.engine_name == "CTranslate2 int8" for system in others)
    systems = [system for system in systems if system not in others]
    assert [(type(s.decoding), s.freeze) for s in systems] == [
        (Greedy, None),
        (Greedy, "int8"),
        (BeamSearch, None),
        (BeamSearch, "int8"),
        (MaskPredict, None),
        (MaskPredict, "int8"),
    ]
    assert systems[3].decoding.beam == 5
    assert systems[3].engine_name == "PyNAR frozen int8"


def test_mistakes_are_named_before_anything_starts(place: Path) -> None:
    def fails(message: str, **fields: Any) -> None:
        with pytest.raises(ValueError, match=message):
            system = System(model=str(place / "cmlm"), **fields)
            expand([system], freezes=[None], engines=[])

    fails("`engine` must be one of pynar, ctranslate2, got 'x'", engine="x")
    fails("`freeze` must be one of fp32, bf16, int8", freeze="x")
    fails("must be one of mask_predict", strategy="beam")
    fails("unknown key `beam`", options={"beam": 3})
    fails("goes from left to right, got .*flowseq", rescorer=str(place / "flowseq"))
    with pytest.raises(ValueError, match="`rescorer` must be none with random weights"):
        random_system(place, "flowseq", rescorer=str(place / "autoregressive"))
    with pytest.raises(ValueError, match="`model` must be one of"):
        changed = random_system(place, "cmlm", changes=["model.model=x"])
        expand([changed], freezes=[None], engines=[])
    with pytest.raises(ValueError, match="at least one system"):
        benchmark([], Plan(threads=(1,)))
    with pytest.raises(ValueError, match=r"as many lines as the source \(0\), got 1"):
        benchmark([System(model="x")], Plan(threads=(1,)), references=[["a"]])
    for bad in ({"repetitions": 0}, {"time_limit": 0.0}, {"batches": (0,)}, {"threads": ("x",)}):
        with pytest.raises(ValueError, match="must be positive"):
            Plan(**{"threads": (1,), **bad})


def test_a_sample_is_spread_evenly() -> None:
    assert sample(10, 5) == [0, 2, 4, 6, 8]
    assert sample(3, 5) == [0, 1, 2]


def test_a_busy_machine_is_told_of() -> None:
    assert busy({"load_average": 0.3, "processors": 2}) is None
    assert busy({"load_average": None, "processors": 2}) is None
    assert "load of 3.0 on 2" in busy({"load_average": 3.0, "processors": 2})
