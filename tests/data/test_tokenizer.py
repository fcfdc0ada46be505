import shutil

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from text_source import parallel_text, words

from pynar.data import Tokenizer
from pynar.symbols import BOS, EOS, MASK, NAMES, PAD, UNK

SPECIAL = {PAD, BOS, EOS, MASK}
LINES = [*words(200, seed=7), "1995 2024 77", "a - b, c. D! <mask> </s> <s> <pad> <unk>"] * 3


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def bytewise(request):
    return Tokenizer.train(
        LINES, LINES, vocab_size=380, model_type=request.param, byte_fallback=True
    )


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_special_symbols_have_their_ids(text, joint, model_type):
    tokenizer = Tokenizer.train(*text, vocab_size=80, joint=joint, model_type=model_type)
    for side in (tokenizer.source, tokenizer.target):
        assert tuple(side.id_to_piece(i) for i in range(5)) == NAMES
        assert [side.is_control(i) for i in range(6)] == [True, True, True, False, True, False]
    assert tokenizer.source_size == tokenizer.target_size == 80
    assert tokenizer.joint is joint
    assert (tokenizer.source is tokenizer.target) is joint


def test_separate_models_know_only_their_side(text):
    tokenizer = Tokenizer.train(*text, vocab_size=60, joint=False)
    assert UNK not in tokenizer.encode_source(text[0][:1])[0]
    assert UNK in tokenizer.encode_source(text[1][:1])[0]
    assert UNK not in tokenizer.encode_target(text[1][:1])[0]
    assert tokenizer.decode_source(tokenizer.encode_source(text[0])) == text[0]
    assert tokenizer.decode_target(tokenizer.encode_target(text[1])) == text[1]


@given(
    st.lists(st.sampled_from(words(60, seed=7) + ["un", "seenword", "x"]), min_size=1).map(" ".join)
)
def test_known_characters_come_back(bytewise, line):
    assert bytewise.decode_target(bytewise.encode_source([line])) == [line]


# Surrogates are no characters, U+2581 is SentencePiece's space, and runs of spaces are merged.
ordinary = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\u2581 \n"), min_size=1
)


@given(st.lists(ordinary, min_size=1, max_size=4).map(" ".join))
def test_any_character_comes_back_with_byte_fallback(bytewise, line):
    ids = bytewise.encode_target([line])
    assert UNK not in ids[0]
    assert bytewise.decode_target(ids) == [line]


@given(st.lists(st.sampled_from([*NAMES, "<", ">", "mask", "a", " ", "<mask><mask>"])).map("".join))
def test_text_never_produces_control_symbols(bytewise, line):
    assert not SPECIAL & set(bytewise.encode_source([line])[0])


def test_training_text_with_names_of_symbols_does_not_make_pieces_of_them():
    lines = ["the <mask> is a </s> or a <s> <pad>"] * 50
    tokenizer = Tokenizer.train(lines, lines, vocab_size=24, model_type="bpe")
    ids = tokenizer.encode_source(lines[:1])
    assert not SPECIAL & set(ids[0])
    assert tokenizer.decode_source(ids)[0].startswith("the ")


@pytest.mark.parametrize("separator", ["\0", "\u2028", "\u0085", "\r", "\t", "\u2581", "\ufeff"])
def test_training_takes_awkward_characters(separator):
    lines = [f"{word}{separator}{word} {word}" for word in words(60, seed=7)]
    tokenizer = Tokenizer.train(lines, lines, vocab_size=60)
    for ids, line in zip(tokenizer.encode_source(lines), lines, strict=True):
        assert (UNK in ids) == (separator == "\0")
        shown = line.replace("\0", " ⁇ ").replace("\u2581", " ")
        assert tokenizer.decode_source([ids]) == [shown]


def test_digits_can_be_split():
    tokenizer = Tokenizer.train(LINES, LINES, vocab_size=80, split_digits=True)
    pieces = [tokenizer.source.id_to_piece(i) for i in tokenizer.encode_source(["1995 2024"])[0]]
    assert [piece for piece in pieces if piece != "▁"] == list("19952024")


def test_normalization_is_an_option(text):
    lines = [*text[0], "ﬁne ①"]
    plain = Tokenizer.train(lines, lines, vocab_size=80)
    folded = Tokenizer.train(lines, lines, vocab_size=80, normalization="nfkc")
    assert plain.decode_source(plain.encode_source(["ﬁne ①"])) == ["ﬁne ①"]
    assert folded.decode_source(folded.encode_source(["ﬁne ①"])) == ["fine 1"]


def test_empty_lines_and_lists(tokenizer):
    assert tokenizer.encode_source([]) == []
    assert tokenizer.encode_source(["", " "]) == [[], []]
    assert tokenizer.decode_target([[], [PAD, EOS]]) == ["", ""]
    assert tokenizer.decode_target([]) == []


def test_decoding_drops_special_symbols_but_shows_the_unknown(tokenizer, text):
    ids = tokenizer.encode_target(text[1][:1])[0]
    framed = [BOS, *ids[:2], MASK, *ids[2:], EOS, PAD, PAD]
    assert tokenizer.decode_target([framed]) == text[1][:1]
    assert "⁇" in tokenizer.decode_target([[*ids, UNK]])[0]


@pytest.mark.parametrize("wrong", [-1, 120])
def test_decoding_refuses_ids_outside_the_vocabulary(tokenizer, wrong):
    with pytest.raises(ValueError, match=rf"must be in \[0, 120\), got {wrong}"):
        tokenizer.decode_target([[7], [8, wrong]])


def test_one_string_is_not_a_list_of_lines(tokenizer):
    with pytest.raises(ValueError, match="got one string"):
        tokenizer.encode_source("a line")


def test_training_is_reproducible(text):
    first = Tokenizer.train(*text, vocab_size=100)
    assert first.digest == Tokenizer.train(*text, vocab_size=100).digest
    assert first.digest != Tokenizer.train(*text, vocab_size=99).digest


@pytest.mark.parametrize("joint", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, text, joint):
    tokenizer = Tokenizer.train(*text, vocab_size=80, joint=joint)
    tokenizer.save(tmp_path / "new" / "folder")
    files = ["tokenizer.model"] if joint else ["source.model", "target.model"]
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == files
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert (loaded.joint, loaded.digest) == (joint, tokenizer.digest)
    assert loaded.encode_source(text[0]) == tokenizer.encode_source(text[0])
    assert loaded.encode_target(text[1]) == tokenizer.encode_target(text[1])


def test_loading_one_model_file(tmp_path, tokenizer, tokenizer_directory):
    shutil.copy(tokenizer_directory / "tokenizer.model", tmp_path / "other.model")
    loaded = Tokenizer.load(tmp_path / "other.model")
    assert loaded.joint and loaded.digest == tokenizer.digest


def test_loading_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "source.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected tokenizer\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff\xff"])
def test_loading_what_is_no_model(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.model.* "):
        Tokenizer.load(tmp_path)


def test_loading_a_model_with_other_ids(tmp_path, text):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[0]),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=50,
        minloglevel=2,
    )
    with pytest.raises(
        ValueError, match=r"piece 0 must be the special symbol '<pad>', got '<unk>'"
    ):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_vocabulary_larger_than_the_text_allows(text, model_type):
    with pytest.raises(ValueError, match=r"vocab_size must be at most \d+ .* got 5000") as error:
        Tokenizer.train(*text, vocab_size=5000, model_type=model_type)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert Tokenizer.train(*text, vocab_size=largest, model_type=model_type).source_size == largest


def test_vocabulary_too_small_for_the_characters():
    lines = [chr(ord("a") + i) for i in range(20)]
    with pytest.raises(ValueError, match=r"vocab_size must be at least \d+ .* got 10") as error:
        Tokenizer.train(lines, lines, vocab_size=10)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert Tokenizer.train(lines, lines, vocab_size=least, model_type="bpe").source_size == least


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 5}, "vocab_size must exceed the 5 special symbols, got 5"),
        ({"model_type": "word"}, r"model_type must be one of \('unigram', 'bpe'\), got 'word'"),
        ({"normalization": "nfc"}, "normalization must be one of .* got 'nfc'"),
        ({"character_coverage": 0.0}, r"character_coverage must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_options(text, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(*text, **{"vocab_size": 100, **options})


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="SentencePiece could not train on the joint text"):
        Tokenizer.train([], [], vocab_size=100)


def test_threads_do_not_change_the_ids(tokenizer):
    lines, _ = parallel_text(3000, seed=3)
    assert tokenizer.encode_source(lines, threads=1) == tokenizer.encode_source(lines, threads=3)
