import gzip
import hashlib
import importlib
import json
import os
import random
from collections import Counter

import pytest
from text_source import parallel_text

from pynar.data import Corpus, CorpusError, TextError, Tokenizer, prepare, verify
from pynar.data.atomic import replace_directory, temporary_sibling

# ``pynar.data.prepare`` is the function of the same name.
module = importlib.import_module("pynar.data.prepare")


def contents(directory):
    """Every file below a directory, hidden ones included."""
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def as_lists(corpus):
    return [(source.tolist(), target.tolist()) for source, target in corpus]


def expected_pairs(tokenizer, sources, targets):
    """What a corpus must hold, one sentence at a time."""
    return [
        (tokenizer.encode_source([source])[0], tokenizer.encode_target([target])[0])
        for source, target in zip(sources, targets, strict=True)
        if source.strip() and target.strip()
    ]


@pytest.fixture
def files(write, text):
    return write("train.s", text[0]), write("train.t", text[1])


@pytest.mark.parametrize("joint", [True, False])
def test_corpus_holds_the_encoded_text(tmp_path, files, text, joint):
    prepare(tmp_path / "out", train=files, vocab_size=80, joint=joint)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.joint is joint
    corpus = Corpus.open(tmp_path / "out", "train", verify=True)
    assert as_lists(corpus) == expected_pairs(tokenizer, *text)
    assert tokenizer.decode_source([source for source, _ in corpus]) == text[0]
    assert tokenizer.decode_target([target for _, target in corpus]) == text[1]


def test_blocks_do_not_show(tmp_path, files, text, tokenizer, tokenizer_directory, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_PAIRS", 64)
    prepare(tmp_path / "pairs", train=files, tokenizer=tokenizer_directory)
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 1)
    prepare(tmp_path / "characters", train=files, tokenizer=tokenizer_directory)
    for name, blocks in (("pairs", 7), ("characters", 400)):
        corpus = Corpus.open(tmp_path / name, "train")
        assert len(corpus._batches) == blocks
        assert as_lists(corpus) == expected_pairs(tokenizer, *text)


def test_plain_gzipped_and_table_give_the_same_corpus(
    tmp_path, files, text, write, tokenizer_directory
):
    packed = []
    for file in files:
        packed.append(file.with_suffix(file.suffix + ".gz"))
        packed[-1].write_bytes(gzip.compress(file.read_bytes()))
    table = write("t.tsv", [f"{source}\t{target}\r" for source, target in zip(*text, strict=True)])
    kept = []
    for number, train in enumerate([files, tuple(packed), table, str(table)]):
        prepare(tmp_path / f"{number}", train=train, tokenizer=tokenizer_directory)
        kept.append((tmp_path / f"{number}" / "train.arrow").read_bytes())
    assert kept == [kept[0]] * 4


def test_strange_line_ends_never_shift_the_pairs(tmp_path, tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory)
    strange = ["\u2028", "\u2029", "\u0085", "\r", "\0", "\v", "\f", "\x1c", "\x1d", "\x1e"]
    sources = [f"ba{c}de ki" for c in strange] + ["lo mu"]
    targets = [f"LO {i}" for i in range(len(strange))] + ["MU"]
    (tmp_path / "s").write_bytes("\r\n".join(sources).encode())  # no end of the last line
    (tmp_path / "t").write_bytes("\n".join(targets).encode() + b"\n")
    manifest = prepare(
        tmp_path / "out", train=(tmp_path / "s", tmp_path / "t"), tokenizer=tokenizer_directory
    )
    assert manifest.splits["train"].pairs == len(sources)
    assert as_lists(Corpus.open(tmp_path / "out", "train")) == expected_pairs(
        tokenizer, sources, targets
    )


def test_manifest_counts(tmp_path, write, text, tokenizer, tokenizer_directory):
    rng = random.Random(1)
    sources, targets = list(text[0]), list(text[1])
    for i in rng.sample(range(400), 20):
        sources[i] = rng.choice(["", " ", "\u2581", "\u3000"])
    for i in rng.sample(range(400), 20):
        targets[i] = ""
    for i in range(0, 400, 20):
        targets[i] += "Q"  # an unknown character
    train = write("s", sources), write("t", targets)
    manifest = prepare(
        tmp_path / "out",
        train=train,
        valid=train,
        tokenizer=tokenizer_directory,
        max_length=30,
        max_ratio=2,
    )
    counted = Counter(empty=0, too_long=0, ratio=0)
    kept, kept_valid = [], []
    for source, target in zip(sources, targets, strict=True):
        pair = tokenizer.encode_source([source])[0], tokenizer.encode_target([target])[0]
        short, long = sorted(map(len, pair))
        if not source.strip("\u3000 ") or not target.strip() or short == 0:
            counted["empty"] += 1
        elif long > 30:
            counted["too_long"] += 1
        else:
            kept_valid.append(pair)
            if long > 2 * short:
                counted["ratio"] += 1
            else:
                kept.append(pair)
    assert min(counted.values()) > 5
    assert any(3 in target for _, target in kept)
    info = manifest.splits["train"]
    assert info.skipped == counted
    assert (info.read, info.pairs) == (400, len(kept))
    assert info.read == info.pairs + sum(info.skipped.values())
    assert info.source_tokens == sum(len(source) for source, _ in kept)
    assert info.target_tokens == sum(len(target) for _, target in kept)
    assert info.source_unknown == sum(source.count(3) for source, _ in kept)
    assert info.target_unknown == sum(target.count(3) for _, target in kept)
    assert info.source_lengths == {
        str(k): v for k, v in Counter(len(source) for source, _ in kept).items()
    }
    assert info.target_lengths == {
        str(k): v for k, v in Counter(len(target) for _, target in kept).items()
    }
    assert as_lists(Corpus.open(tmp_path / "out", "train")) == kept
    # The ratio is a matter of training data: the others are measured as they are.
    assert manifest.splits["valid"].skipped == {**counted, "ratio": 0}
    assert as_lists(Corpus.open(tmp_path / "out", "valid")) == kept_valid


def test_digests_and_manifest_file(prepared, tmp_path, text, tokenizer):
    manifest = verify(prepared)
    written = json.loads((prepared / "manifest.json").read_text())
    assert written["format"] == "pynar-corpus"
    assert set(os.listdir(prepared)) == {"manifest.json", *manifest.files}
    for name, info in manifest.files.items():
        data = (prepared / name).read_bytes()
        assert (info.bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for path, info in manifest.splits["train"].inputs.items():
        assert info.sha256 == hashlib.sha256(open(path, "rb").read()).hexdigest()
    assert manifest.tokenizer["digest"] == tokenizer.digest
    assert manifest.tokenizer["source_size"] == 120


def test_the_same_input_gives_the_same_bytes(tmp_path, files):
    first = prepare(tmp_path / "1", train=files, vocab_size=80, sample_pairs=200, seed=3)
    prepare(tmp_path / "2", train=files, vocab_size=80, sample_pairs=200, seed=3)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    other = prepare(tmp_path / "3", train=files, vocab_size=80, sample_pairs=200, seed=4)
    assert other.tokenizer["digest"] != first.tokenizer["digest"]


def test_text_of_validation_is_kept_beside_its_tokens(tmp_path, write, tokenizer_directory):
    sources = ["ba  de", "", "unknown Ж", "ki\u2028lo"]
    targets = ["BA DE", "X", "Ж", "KI"]
    split = write("s", sources), write("t", targets)
    prepare(tmp_path / "out", train=split, valid=split, test=split, tokenizer=tokenizer_directory)
    for name in ("valid", "test"):
        corpus = Corpus.open(tmp_path / "out", name)
        assert corpus.has_text
        wanted = [pair for pair in zip(sources, targets, strict=True) if pair[0]]
        assert [corpus.text(i) for i in range(len(corpus))] == wanted
    train = Corpus.open(tmp_path / "out", "train")
    assert not train.has_text
    with pytest.raises(ValueError, match="holds no text"):
        train.text(0)


@pytest.mark.parametrize("limit", [1, 7, 50, 399, 400, 10_000])
def test_sample_is_uniform_ordered_and_bounded(files, text, limit):
    sources, targets, read = module._sample(tuple(map(str, files)), limit, 5, lambda *_: None, 500)
    pairs = list(zip(*text, strict=True))
    sampled = list(zip(sources, targets, strict=True))
    assert read == 400
    assert len(sampled) == min(limit, 400)
    rest = iter(pairs)
    assert all(pair in rest for pair in sampled)  # a subsequence


def test_sample_is_bounded_in_bytes(files, text, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 5000)
    sources, targets, _ = module._sample(tuple(map(str, files)), 10_000, 5, lambda *_: None, 500)
    size = sum(len(line) for line in sources + targets)
    assert 4800 < size <= 5000


def test_every_pair_is_sampled_equally_often(write):
    lines = [f"{i}" for i in range(20)]
    files = str(write("a", lines)), str(write("b", lines))
    counts = Counter()
    for seed in range(400):
        counts.update(module._sample(files, 5, seed, lambda *_: None, 500)[0])
    # 400 draws with probability 1/4: mean 100, standard deviation 8.7.
    assert set(counts) == set(lines)
    assert all(65 <= count <= 135 for count in counts.values())


def test_progress_is_reported(tmp_path, files):
    calls = []
    prepare(
        tmp_path / "out",
        train=files,
        valid=files,
        vocab_size=80,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [
        ("sample", 400, None),
        ("train tokenizer", 0, None),
        ("encode train", 400, 400),
        ("encode valid", 400, None),
    ]


def failing(tmp_path, error, match, **options):
    """Expects an error, and nothing new beside the output."""
    before = contents(tmp_path)
    with pytest.raises(error, match=match):
        prepare(**{"output": tmp_path / "out", **options})
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_bad_text_is_refused_and_nothing_is_left(tmp_path, files, write, tokenizer_directory):
    options = {"tokenizer": tokenizer_directory}
    short = write("short", ["x"] * 399)
    failing(
        tmp_path,
        TextError,
        r"got 400 in .*train\.s and 399 in .*short",
        train=(files[0], short),
        **options,
    )
    failing(
        tmp_path,
        TextError,
        "got 399 in .* and 400 in",
        train=files,
        valid=(short, files[1]),
        **options,
    )
    bad = tmp_path / "bad"
    bad.write_bytes(b"x\n" * 399 + b"\xff\n")
    failing(
        tmp_path, TextError, "bad: line 400 is not valid UTF-8", train=(files[0], bad), **options
    )
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(files[1].read_bytes())[:-9])
    failing(tmp_path, TextError, r"cut\.gz: damaged or truncated", train=(files[0], cut), **options)
    failing(tmp_path, TextError, "line 1 must have 2 columns", train=files[0], **options)
    failing(tmp_path, TextError, "line 1 must have 2 columns", train=files[0], vocab_size=80)
    none = tmp_path / "none"
    failing(
        tmp_path,
        FileNotFoundError,
        "train file .*none does not exist",
        train=(files[0], none),
        **options,
    )
    failing(tmp_path, TextError, "must be a regular file", train=(files[0], tmp_path), **options)
    failing(
        tmp_path,
        ValueError,
        "train must be one TSV file or .* got 3 files",
        train=[*files, bad],
        **options,
    )


def test_nothing_left_after_filtering(tmp_path, files, write, tokenizer_directory):
    blank = write("blank", [""] * 400)
    empty = write("empty", [])
    options = {"tokenizer": tokenizer_directory}
    failing(
        tmp_path,
        TextError,
        "no pair .* left for train: 400 read, 400 empty",
        train=(files[0], blank),
        **options,
    )
    failing(tmp_path, TextError, "left for train: 0 read", train=(empty, empty), **options)
    failing(
        tmp_path,
        TextError,
        "400 read, 0 empty, 400 too long",
        train=(blank.with_name("train.s"), write("long", ["ba " * 9] * 400)),
        max_length=1,
        **options,
    )
    failing(tmp_path, TextError, "has text on both sides", train=(files[0], blank), vocab_size=80)


def test_wrong_options(tmp_path, files, tokenizer_directory):
    trained = {"train": files, "vocab_size": 80}
    failing(tmp_path, ValueError, "either vocab_size.* or tokenizer", train=files)
    failing(
        tmp_path,
        ValueError,
        "either vocab_size.* or tokenizer",
        tokenizer=tokenizer_directory,
        **trained,
    )
    failing(tmp_path, ValueError, "max_length must be positive, got 0", max_length=0, **trained)
    failing(tmp_path, ValueError, "max_ratio must be at least 1, got 0.5", max_ratio=0.5, **trained)
    failing(tmp_path, ValueError, "threads must be positive, got 0", threads=0, **trained)
    failing(tmp_path, ValueError, "vocab_size must be at most", train=files, vocab_size=50_000)
    failing(
        tmp_path,
        FileNotFoundError,
        "tokenizer .* does not exist",
        train=files,
        tokenizer=tmp_path / "x",
    )


def test_full_output_is_refused(tmp_path, files, tokenizer_directory):
    options = {"train": files, "tokenizer": tokenizer_directory}
    (tmp_path / "out").mkdir()
    prepare(tmp_path / "out", **options)  # an empty directory will do
    failing(tmp_path, FileExistsError, "not empty; overwrite=True replaces it", **options)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    failing(tmp_path, FileExistsError, r"also holds notes\.txt", overwrite=True, **options)
    (tmp_path / "out" / "manifest.json").unlink()
    failing(tmp_path, FileExistsError, "no prepared corpus", overwrite=True, **options)
    failing(
        tmp_path, FileExistsError, "is not a directory", output=files[0], overwrite=True, **options
    )


def test_unwritable_output_is_refused_before_any_work(tmp_path, files, tokenizer_directory):
    failing(
        tmp_path,
        OSError,
        r"cannot write .*train\.s/out",
        output=files[0] / "out",
        train=files,
        tokenizer=tokenizer_directory,
        progress=lambda *_: pytest.fail("work was done"),
    )


def test_overwriting_replaces_the_whole_corpus(prepared, files):
    tokenizer = Tokenizer.load(prepared)
    corpus = Corpus.open(prepared, "valid")
    first = as_lists(corpus)
    prepare(prepared, train=files, tokenizer=prepared, overwrite=True)
    assert Tokenizer.load(prepared).digest == tokenizer.digest
    assert len(Corpus.open(prepared, "train", verify=True)) == 400
    with pytest.raises(CorpusError, match="has no split 'valid', only train"):
        Corpus.open(prepared, "valid")
    assert as_lists(corpus) == first  # what is open stays readable
    assert not list(prepared.parent.glob(".*"))


def test_failed_overwriting_leaves_the_old_corpus(prepared, files, write):
    before = contents(prepared)
    with pytest.raises(TextError):
        prepare(prepared, train=files[0], tokenizer=prepared, overwrite=True)
    assert contents(prepared) == before


def test_interrupted_it_leaves_nothing(tmp_path, files, tokenizer_directory):
    def interrupt(*_):
        raise KeyboardInterrupt

    failing(
        tmp_path,
        KeyboardInterrupt,
        None,
        train=files,
        tokenizer=tokenizer_directory,
        progress=interrupt,
    )


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_a_directory(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("pynar.data.atomic._exchange", lambda *_: False)
    for content in ("old", "new"):
        with temporary_sibling(tmp_path / "x") as directory:
            (directory / "file").write_text(content)
            replace_directory(directory, tmp_path / "x")
    assert contents(tmp_path) == {"file": b"new"}
    assert os.listdir(tmp_path) == ["x"]


def test_output_may_be_relative_and_deep(tmp_path, files, tokenizer_directory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare("a/b/out", train=files, tokenizer=tokenizer_directory)
    assert len(Corpus.open("a/b/out", "train")) == 400


def test_larger_corpus_than_one_block(tmp_path, write, tokenizer, tokenizer_directory):
    sources, targets = parallel_text(20_000, seed=11, longest=3)
    prepare(
        tmp_path / "out",
        train=(write("s", sources), write("t", targets)),
        tokenizer=tokenizer_directory,
    )
    corpus = Corpus.open(tmp_path / "out", "train")
    assert len(corpus._batches) == 2
    wanted = zip(tokenizer.encode_source(sources), tokenizer.encode_target(targets), strict=True)
    assert as_lists(corpus) == list(wanted)


def test_enormous_lines_are_not_even_encoded(tmp_path, write, tokenizer_directory):
    sources = ["ba de", "x" * 1000, "ki", "lo", "mu"]
    targets = ["BA", "DE", "K" * 1000, "LO", "Ж" * 320]
    split = write("s", sources), write("t", targets)
    options = {"train": split, "max_length": 10}
    manifest = prepare(tmp_path / "1", tokenizer=tokenizer_directory, **options)
    # 320 unknown characters are one token: it is the number of characters that counts.
    assert manifest.splits["train"].skipped == {"empty": 0, "too_long": 2, "ratio": 0}
    sampled = module._sample(tuple(map(str, split)), 10, 0, lambda *_: None, 320)
    assert sampled == (["ba de", "lo", "mu"], ["BA", "LO", "Ж" * 320], 5)


def test_full_disk_is_named_and_leaves_nothing(tmp_path, files, tokenizer_directory):
    """A limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    contents_before = contents(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*train\.arrow: "):
            prepare(tmp_path / "out", train=files, tokenizer=tokenizer_directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == contents_before
