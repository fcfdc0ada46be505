import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynar.data import Corpus, CorpusError, CorpusWriter, Manifest, verify

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
pairs_strategy = st.lists(st.tuples(ids, ids), max_size=8)


def as_lists(corpus):
    return [(source.tolist(), target.tolist()) for source, target in corpus]


@given(pairs_strategy)
def test_corpus_in_memory(pairs):
    corpus = Corpus.from_pairs(pairs)
    assert len(corpus) == len(pairs)
    assert as_lists(corpus) == pairs
    assert corpus.source_lengths.tolist() == [len(source) for source, _ in pairs]
    assert corpus.target_lengths.tolist() == [len(target) for _, target in pairs]


@given(st.lists(pairs_strategy, max_size=5))
def test_blocks_written_come_back_in_order(tmp_path_factory, blocks):
    path = tmp_path_factory.mktemp("writer") / "x.arrow"
    with CorpusWriter(path) as writer:
        for block in blocks:
            writer.write([source for source, _ in block], [target for _, target in block])
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        corpus = Corpus([reader.get_batch(i) for i in range(reader.num_record_batches)])
        table = reader.read_all()
        flat = [pair for block in blocks for pair in block]
        assert as_lists(corpus) == flat
        assert table.column("source").to_pylist() == [source for source, _ in flat]
        assert table.column("target").to_pylist() == [target for _, target in flat]


def test_items(prepared):
    corpus = Corpus.open(prepared, "train")
    source, target = corpus[5]
    assert source.dtype == target.dtype == np.int32
    assert source.ndim == target.ndim == 1
    assert corpus[-1][0].tolist() == corpus[len(corpus) - 1][0].tolist()
    with pytest.raises(ValueError, match="read-only"):
        source[0] = 1
    for index in (len(corpus), -len(corpus) - 1):
        with pytest.raises(IndexError, match=f"pair {index} of a corpus with 300"):
            corpus[index]


def test_any_arrow_reader_opens_the_file(prepared):
    table = pa.ipc.open_file(str(prepared / "valid.arrow")).read_all()
    corpus = Corpus.open(prepared, "valid")
    assert table.column_names == ["source", "target", "source_text", "target_text"]
    assert table.column("source").to_pylist() == [source.tolist() for source, _ in corpus]
    assert table.column("target_text").to_pylist() == [corpus.text(i)[1] for i in range(100)]


def test_digest_is_that_of_the_file(prepared):
    corpus = Corpus.open(prepared, "train")
    assert corpus.digest == Manifest.load(prepared).files["train.arrow"].sha256
    assert corpus.info.pairs == len(corpus)


def test_manifest_comes_back(prepared, tmp_path):
    manifest = Manifest.load(prepared)
    (tmp_path / "copy").mkdir()
    manifest.save(tmp_path / "copy")
    assert Manifest.load(tmp_path / "copy") == manifest


def test_what_is_no_corpus(tmp_path, prepared):
    with pytest.raises(FileNotFoundError, match="no prepared corpus: it has no manifest.json"):
        Corpus.open(tmp_path, "train")
    with pytest.raises(CorpusError, match="has no split 'dev', only train, valid"):
        Corpus.open(prepared, "dev")


@pytest.mark.parametrize("name", ["train.arrow", "tokenizer.model"])
def test_other_sizes_are_noticed_at_once(prepared, name):
    path = prepared / name
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(
        CorpusError, match=rf"{name} must have {len(data)} bytes .* got {len(data) - 8}"
    ):
        Corpus.open(prepared, "train")
    path.unlink()
    with pytest.raises(CorpusError, match=rf"{name} is in the manifest but does not exist"):
        Corpus.open(prepared, "train")


def test_one_flipped_bit_is_noticed_by_verify(prepared):
    path = prepared / "train.arrow"
    data = bytearray(path.read_bytes())
    for position in range(8, len(data), len(data) // 25):
        data[position] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorpusError, match=r"train\.arrow must have SHA-256"):
            verify(prepared)
        with pytest.raises(CorpusError, match=r"train\.arrow must have SHA-256"):
            Corpus.open(prepared, "train", verify=True)
        data[position] ^= 4
    path.write_bytes(data)
    verify(prepared)


def test_data_of_another_corpus_is_noticed_at_once(prepared):
    """Same size, other content: the counts tell."""
    corpus = Corpus.open(prepared, "train")
    pairs = as_lists(corpus)
    longest = max(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    source, target = pairs[longest]
    pairs[longest] = (source[:-1], [*target, source[-1]])
    with CorpusWriter(prepared / "train.arrow") as writer:
        writer.write([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["files"]["train.arrow"]["bytes"] = (prepared / "train.arrow").stat().st_size
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CorpusError, match=r"train\.arrow must hold 300 pairs with .* by its manifest"
    ):
        Corpus.open(prepared, "train")


def test_other_columns_are_noticed(prepared):
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(str(prepared / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["files"]["train.arrow"]["bytes"] = (prepared / "train.arrow").stat().st_size
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=r"must have columns \['source', 'target'\], got \['a'\]"):
        Corpus.open(prepared, "train")


def test_damaged_arrow_file_of_the_right_size(prepared):
    path = prepared / "train.arrow"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CorpusError, match=r"train\.arrow is damaged"):
        Corpus.open(prepared, "train")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: "{", "manifest.json is damaged"),
        (lambda m: "[]", "not the manifest of a prepared corpus"),
        (lambda m: json.dumps({**m, "format": "other"}), "not the manifest of a prepared corpus"),
        (lambda m: json.dumps({**m, "format_version": 99}), "must have format_version 1, got 99"),
        (lambda m: json.dumps({**m, "splits": {"train": {}}}), "manifest.json is damaged"),
        (lambda m: json.dumps({**m, "files": {}}), r"says nothing about \['train.arrow'"),
        (
            lambda m: json.dumps({k: v for k, v in m.items() if k != "splits"}),
            "is damaged: .*splits",
        ),
        (lambda m: "\udcff", "manifest.json is damaged"),
    ],
)
def test_damaged_manifest(prepared, change, message):
    path = prepared / "manifest.json"
    changed = change(json.loads(path.read_text()))
    path.write_bytes(changed.encode(errors="surrogateescape"))
    with pytest.raises(CorpusError, match=message):
        Corpus.open(prepared, "train")
