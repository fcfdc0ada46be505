from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from pynar.data import Corpus, Manifest, Tokenizer, prepare, verify
from pynar.decoding import BeamSearch, Greedy, Sampling, Translator
from pynar.decoding.ctranslate2 import CTranslate2Translator
from pynar.distill import distill
from pynar.models import build

needs_ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="the extra `ctranslate2` is missing"
)

PAIRS = [(f"{a} and {b}", f"{b} {a}") for a in "abcdefgh" for b in "stuvwxyz"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, pairs in (("train", PAIRS), ("valid", PAIRS[:7]), ("test", PAIRS[7:12])):
        for side in (0, 1):
            lines = "".join(pair[side] + "\n" for pair in pairs)
            (tmp_path / f"{name}.{side}").write_text(lines)
    splits = {
        name: (tmp_path / f"{name}.0", tmp_path / f"{name}.1")
        for name in ("train", "valid", "test")
    }
    prepare(tmp_path / "data", **splits, vocab_size=35, model_type="bpe")
    return tmp_path / "data"


@pytest.fixture
def teacher(data: Path) -> Translator:
    tokenizer = Tokenizer.load(data)
    size = tokenizer.source_size
    model = build(
        {
            "model": "autoregressive",
            "source_vocabulary": size,
            "target_vocabulary": size,
            "dim": 8,
            "ffn_dim": 16,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
        }
    )
    return Translator(model, tokenizer)


def _pairs(directory: Path, split: str = "train") -> list[tuple[list[int], list[int]]]:
    return [(s.tolist(), t.tolist()) for s, t in Corpus.open(directory, split)]


def _expected(teacher: Translator, data: Path, strategy) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for i, (source, _) in enumerate(_pairs(data)):
        text = teacher.decode_ids([source], strategy, names=[i])[0].text
        if target := teacher.tokenizer.encode_target([text])[0]:
            pairs.append((source, target))
    return pairs


@pytest.mark.parametrize("strategy", [Greedy(max_extra=3), Sampling(seed=3, max_extra=3)])
def test_targets_are_the_teachers_and_nothing_else_changes(data, teacher, strategy, tmp_path):
    manifest = distill(teacher, data, tmp_path / "out", strategy, shard_size=10, max_tokens=50)
    assert _pairs(tmp_path / "out") == _expected(teacher, data, strategy)
    for split in ("valid", "test"):
        assert _pairs(tmp_path / "out", split) == _pairs(data, split)
        assert (tmp_path / "out" / f"{split}.arrow").read_bytes() == (
            data / f"{split}.arrow"
        ).read_bytes()
    assert verify(tmp_path / "out") == manifest == Manifest.load(tmp_path / "out")
    assert manifest.options["distilled"]["strategy"] == type(strategy).__name__
    assert manifest.splits["train"].read == len(PAIRS)
    assert manifest.splits["train"].pairs == len(_pairs(tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_processes_share_the_shards(data, teacher, tmp_path):
    strategy = Greedy(max_extra=3)
    arguments = (teacher, data, tmp_path / "out", strategy)
    assert distill(*arguments, shard_size=10, rank=1, world_size=2) is None
    assert len(list((tmp_path / "out.partial").glob("shard-*"))) == 3
    assert distill(*arguments, shard_size=10, rank=0, world_size=2) is not None
    assert _pairs(tmp_path / "out") == _expected(teacher, data, strategy)


def test_an_interrupted_run_goes_on_with_the_shards_it_has(data, teacher, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    arguments = (teacher, data, tmp_path / "out", Greedy(max_extra=3))
    with pytest.raises(Killed):
        distill(*arguments, shard_size=10, progress=interrupt)
    assert not (tmp_path / "out").exists()
    sentences = []
    original = Translator.decode_ids

    def counting(self, sources, *rest, **options):
        sentences.extend(sources)
        return original(self, sources, *rest, **options)

    monkeypatch.setattr(Translator, "decode_ids", counting)
    distill(*arguments, shard_size=10)
    assert len(sentences) == len(PAIRS) - 30
    monkeypatch.undo()
    assert _pairs(tmp_path / "out") == _expected(teacher, data, Greedy(max_extra=3))


def test_shards_of_another_distillation_are_refused(data, teacher, tmp_path):
    arguments = (data, tmp_path / "out")
    distill(teacher, *arguments, Greedy(), shard_size=10, rank=1, world_size=2)
    with pytest.raises(ValueError, match="another strategy, options"):
        distill(teacher, *arguments, Sampling(), shard_size=10)
    with torch.no_grad():
        next(teacher.model.parameters())[7] += 1
    with pytest.raises(ValueError, match="another teacher"):
        distill(teacher, *arguments, Greedy(), shard_size=10)


def test_a_teacher_with_another_tokenizer_is_refused(data, teacher, tmp_path):
    teacher.tokenizer = Tokenizer.train(
        ["other words of another text"] * 9, ["some more"] * 9, vocab_size=24, model_type="bpe"
    )
    with pytest.raises(ValueError, match="the teacher must have the tokenizer of"):
        distill(teacher, data, tmp_path / "out", Greedy())


def test_an_existing_output_is_left_alone(data, teacher, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        distill(teacher, data, tmp_path / "out", Greedy())


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"rank": 2, "world_size": 2}])
def test_bad_options_are_named(data, teacher, tmp_path, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        distill(teacher, data, tmp_path / "out", Greedy(), **options)
    assert not (tmp_path / "out.partial").exists()


def test_the_manifest_names_the_teachers_weights(data, teacher, tmp_path):
    first = distill(teacher, data, tmp_path / "a", Greedy(max_extra=1))
    again = distill(teacher, data, tmp_path / "b", Greedy(max_extra=1))
    with torch.no_grad():
        next(teacher.model.parameters())[7] += 1
    other = distill(teacher, data, tmp_path / "c", Greedy(max_extra=1))
    digests = [m.options["distilled"]["teacher"] for m in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["options"]["distilled"]


def test_the_manifest_names_the_engine(data, teacher, tmp_path):
    manifest = distill(teacher, data, tmp_path / "out", Greedy(max_extra=1))
    engine = manifest.options["distilled"]["engine"]
    assert engine == teacher.engine and engine["name"] == "pynar"


@needs_ctranslate2
@pytest.mark.parametrize("strategy", [Greedy(max_extra=3), BeamSearch(3, max_extra=3)])
def test_another_engine_writes_the_same_corpus(data, teacher, strategy, tmp_path):
    engine = CTranslate2Translator.of(teacher, compute_type="float32", threads=1)
    manifest = distill(engine, data, tmp_path / "out", strategy, shard_size=10, max_tokens=50)
    assert _pairs(tmp_path / "out") == _expected(teacher, data, strategy)
    facts = verify(tmp_path / "out").options["distilled"]
    assert facts == manifest.options["distilled"]
    assert facts["engine"] == engine.engine
    assert facts["engine"]["name"] == "ctranslate2" and facts["engine"]["version"]
    assert facts["engine"]["compute_type"] == "float32"
    assert facts["teacher"] == teacher.digest


@needs_ctranslate2
def test_shards_of_another_engine_are_refused(data, teacher, tmp_path):
    arguments = (data, tmp_path / "out", Greedy(max_extra=3))
    engine = CTranslate2Translator.of(teacher, compute_type="float32", threads=1)
    distill(engine, *arguments, shard_size=10, rank=1, world_size=2)
    with pytest.raises(ValueError, match="made with another engine;"):
        distill(teacher, *arguments, shard_size=10)
    with pytest.raises(ValueError, match="made with another engine;"):
        other = CTranslate2Translator.of(teacher, compute_type="int8", threads=1)
        distill(other, *arguments, shard_size=10)
    assert distill(engine, *arguments, shard_size=10, rank=0, world_size=2) is not None
    with pytest.raises(ValueError, match="must be Greedy or BeamSearch, got Sampling"):
        distill(engine, data, tmp_path / "other", Sampling())
