"""The engine against our own decoding, of the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_systems import make_model

from pynar.data import Tokenizer
from pynar.decoding import (
    BeamSearch,
    Greedy,
    MaskPredict,
    Sampling,
    Strategy,
    Translation,
    Translator,
)
from pynar.decoding.ctranslate2 import CTranslate2Translator, export, is_exported, why_not
from pynar.symbols import BOS, MASK, NAMES, PAD

ctranslate2 = pytest.importorskip("ctranslate2", reason="the extra `ctranslate2` is missing")

CONFIGURATIONS = {
    "pre-norm": {},
    "post-norm": {"norm": "post"},
    "gelu": {"activation": "gelu"},
    "learned": {"positions": "learned", "norm": "post", "activation": "gelu", "max_length": 40},
    "unscaled": {"embedding_scale": False, "positions": "learned"},
    "embedding-norm": {"embedding_norm": True, "norm": "post", "positions": "learned"},
    "separate": {"share_embeddings": False},
    "deep-shallow": {"encoder_layers": 4, "decoder_layers": 1},
    "odd": {"dim": 15, "heads": 3, "ffn_dim": 21},
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


def make(name: str, lines: list[str], tokenizer: Tokenizer) -> Translator:
    if name == "separate":
        upper = [line.upper() for line in lines]
        tokenizer = Tokenizer.train(lines, upper, vocab_size=40, joint=False)
    model = make_model("autoregressive", tokenizer.target_size, **CONFIGURATIONS[name])
    with torch.no_grad():  # else all of one size, in which mistakes could hide
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Translator(model, tokenizer)


def assert_alike(actual: list[Translation], expected: list[Translation]) -> None:
    assert [(r.text, r.passes) for r in actual] == [(r.text, r.passes) for r in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert [t for t, _ in one.alternatives] == [t for t, _ in other.alternatives]
        scores = [s for _, s in other.alternatives]
        assert [s for _, s in one.alternatives] == pytest.approx(scores, abs=1e-4)


@every_configuration
def test_greedy_search_writes_the_same(name: str, lines, tokenizer) -> None:
    ours = make(name, lines, tokenizer)
    theirs = CTranslate2Translator.of(ours, compute_type="float32", threads=1)
    expected = ours.decode(lines, Greedy())
    assert len({result.text for result in expected}) > 10
    assert_alike(theirs.decode(lines, Greedy()), expected)


@every_configuration
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_beam_search_finds_the_same(name: str, penalty: float, lines, tokenizer) -> None:
    """All five hypotheses and their scores, wherever the limit of the length is not met."""
    ours = make(name, lines, tokenizer)
    theirs = CTranslate2Translator.of(ours, compute_type="float32", threads=1)
    search = BeamSearch(5, length_penalty=penalty, n_best=5, max_extra=30)
    expected = ours.decode(lines, search)
    found = theirs.decode(lines, search)
    for one, other in zip(found, expected, strict=True):
        assert one.score > other.score - 1e-4
    # A source has two tokens at least, EOS counted.
    free = [i for i, result in enumerate(expected) if result.passes < 2 * 2 + 30]
    assert len(free) > len(lines) / 2
    assert_alike([found[i] for i in free], [expected[i] for i in free])


@every_configuration
@pytest.mark.parametrize("limit", [(0.5, 0), (0.5, 2), (0.0, 1)])
def test_greedy_search_ends_at_the_limit_at_the_price_of_the_end(
    name: str, limit: tuple[float, int], lines, tokenizer
) -> None:
    ours = make(name, lines, tokenizer)
    theirs = CTranslate2Translator.of(ours, compute_type="float32", threads=1)
    assert_alike(theirs.decode(lines, Greedy(*limit)), ours.decode(lines, Greedy(*limit)))


@pytest.mark.parametrize("extra", [0, 2])
def test_beams_that_meet_the_limit_have_honest_scores(extra: int, lines, tokenizer) -> None:
    """Every sentence meets it; most have the best hypothesis of a search that forces the end."""
    ours = make("pre-norm", lines, tokenizer)
    theirs = CTranslate2Translator.of(ours, compute_type="float32", threads=1)
    search = BeamSearch(5, n_best=5, max_ratio=0.5, max_extra=extra)
    found, expected = theirs.decode(lines, search), ours.decode(lines, search)
    assert [one.passes for one in found] == [other.passes for other in expected]
    same = sum(one.text == other.text for one, other in zip(found, expected, strict=True))
    assert same > 0.9 * len(lines)
    for one, other in zip(found, expected, strict=True):
        assert [s for _, s in one.alternatives] == sorted(s for _, s in one.alternatives)[::-1]
        known = dict(other.alternatives)
        for text, score in one.alternatives:
            # Two segmentations of one text may both be there, with a score each.
            if text in known and [t for t, _ in other.alternatives].count(text) == 1:
                if [t for t, _ in one.alternatives].count(text) == 1:
                    assert score == pytest.approx(known[text], abs=1e-4)


@pytest.mark.parametrize(
    "search", [Greedy(0.5, 1), BeamSearch(3, n_best=3, max_ratio=0.5, max_extra=1), BeamSearch(1)]
)
@pytest.mark.parametrize("max_tokens,workers", [(1, 1), (40, 1), (4096, 2)])
def test_neither_batches_nor_workers_change_anything(
    search: Strategy, max_tokens: int, workers: int, lines, tokenizer
) -> None:
    ours = make("pre-norm", lines, tokenizer)
    expected = CTranslate2Translator.of(ours, threads=1).decode(lines[:20], search)
    theirs = CTranslate2Translator.of(ours, threads=1, workers=workers)
    assert_alike(theirs.decode(lines[:20], search, max_tokens=max_tokens), expected)


def test_empty_and_long_lines_are_treated_as_ever(lines, tokenizer) -> None:
    ours = make("learned", lines, tokenizer)
    theirs = CTranslate2Translator.of(ours, threads=1)
    odd = ["", " ".join(lines[:30]), "  \t", lines[0]]
    assert_alike(theirs.decode(odd, Greedy()), ours.decode(odd, Greedy()))
    assert_alike(theirs.decode([]), [])
    with pytest.raises(ValueError, match=r"the model allow \(39\)"):
        theirs.decode(odd, on_long="error")
    assert theirs.translate(odd, "greedy") == ours.translate(odd, "greedy")


def test_more_words_than_the_model_was_built_for_if_its_positions_are_sinusoids(
    lines, tokenizer
) -> None:
    model = make_model("autoregressive", tokenizer.target_size, max_length=4)
    ours = Translator(model, tokenizer)
    theirs = CTranslate2Translator.of(ours, compute_type="float32", threads=1)
    assert_alike(theirs.decode(lines[:9], Greedy()), ours.decode(lines[:9], Greedy()))


def test_sequences_beyond_the_positions_are_an_error(lines, tokenizer) -> None:
    theirs = CTranslate2Translator.of(make("learned", lines, tokenizer), threads=1)
    assert len(theirs.decode_ids([[7] * 39], Greedy())) == 1
    with pytest.raises(ValueError, match="a sequence of 41 tokens is longer than the 40 positions"):
        theirs.decode_ids([[7], [7] * 40], Greedy())


def test_a_beam_wider_than_the_vocabulary_holds_no_banned_symbol() -> None:
    text = ["a b", "b a", "a a b"] * 9
    tokenizer = Tokenizer.train(text, text, vocab_size=9)
    ours = Translator(make_model("autoregressive", 9, norm="post"), tokenizer)
    theirs = CTranslate2Translator.of(ours, threads=1)
    search = BeamSearch(8, n_best=8, length_penalty=0.0, max_extra=30)
    assert_alike(theirs.decode(text[:3], search), ours.decode(text[:3], search))


@pytest.mark.parametrize("quantization", [None, "int8", "float16"])
def test_an_exported_model_needs_nothing_but_the_engine(
    quantization: str | None, lines, tokenizer, tmp_path
) -> None:
    """Pieces in, pieces out, and never a special symbol, however much a model would like one."""
    ours = make("pre-norm", lines, tokenizer)
    with torch.no_grad():
        weight = ours.model.target_embedding.tokens.weight
        weight[[PAD, BOS, MASK]] = 50 * weight[7:10]
    before = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    export(ours.model, tokenizer, tmp_path / "model", quantization=quantization)
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert is_exported(tmp_path / "model")
    engine = ctranslate2.Translator(str(tmp_path / "model"), intra_threads=1)
    ids = tokenizer.encode_source(lines)
    pieces = [[tokenizer.source.id_to_piece(i) for i in row] for row in ids]
    results = engine.translate_batch(pieces, beam_size=1, min_decoding_length=0)
    written = [result.hypotheses[0] for result in results]
    assert not {piece for row in written for piece in row} & {NAMES[i] for i in (PAD, BOS, MASK)}
    if quantization is None:
        texts = tokenizer.decode_target(
            [[tokenizer.target.piece_to_id(piece) for piece in row] for row in written]
        )
        expected = ours.translate(lines, Greedy(max_ratio=0, max_extra=257))
        assert texts == expected


@pytest.mark.parametrize("quantization", ["int8", "int8_float32", "float16", "bfloat16", "int16"])
def test_quantized_models_are_smaller_and_load(
    quantization: str, lines, tokenizer, tmp_path
) -> None:
    ours = make("learned", lines, tokenizer)
    export(ours.model, tokenizer, tmp_path / "full")
    export(ours.model, tokenizer, tmp_path / "small", quantization=quantization)
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("full", "small")]
    assert sizes[1] < 0.7 * sizes[0]
    full, small = (CTranslate2Translator(tmp_path / name, threads=1) for name in ("full", "small"))
    assert small.digest == full.digest == ours.digest
    assert full.engine["compute_type"] == "float32"
    if quantization == "int8":
        assert small.engine["compute_type"].startswith("int8")
    pairs = zip(full.decode(lines, Greedy()), small.decode(lines, Greedy()), strict=True)
    # Loose, since CTranslate2's int8 products saturate on processors without VNNI.
    assert sum(one.score == pytest.approx(other.score, abs=0.3) for one, other in pairs) > 40


def test_the_engine_says_what_it_is(lines, tokenizer) -> None:
    ours = make("pre-norm", lines, tokenizer)
    theirs = CTranslate2Translator.of(ours, compute_type="int8", threads=1)
    assert theirs.engine["name"] == "ctranslate2" != ours.engine["name"] == "pynar"
    assert theirs.engine["version"] == ctranslate2.__version__
    assert theirs.engine["compute_type"].startswith("int8")
    assert ours.engine["compute_type"] == "float32"
    assert theirs.strategy() == BeamSearch()
    assert theirs.strategy("greedy", {"max_extra": 3}) == Greedy(max_extra=3)


@pytest.mark.parametrize(
    "chosen,options,words",
    [
        ("sampling", {}, "of a CTranslate2 model must be one of beam, greedy, got 'sampling'"),
        (Sampling(), {}, "of a CTranslate2 model must be one of beam, greedy, got 'sampling'"),
        (MaskPredict(), {}, "must be one of beam, greedy, got 'mask_predict'"),
        (object(), {}, "`strategy` must be Greedy or BeamSearch, got object"),
        ("beam", {"early_stop": False}, "`early_stop` of BeamSearch must be true, got False"),
        ("beam", {"bean": 4}, "BeamSearch: unknown key `bean`"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(chosen, options, words, lines, tokenizer) -> None:
    theirs = CTranslate2Translator.of(make("pre-norm", lines, tokenizer), threads=1)
    with pytest.raises(ValueError, match=words):
        theirs.decode([], chosen, options=options)
    if not isinstance(chosen, str) and not options:
        with pytest.raises(ValueError, match="must be Greedy or BeamSearch"):
            theirs.decode_ids([[7]], chosen)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"compute_type": "int3"}, "`compute_type` must be, on this .* float32, .*got 'int3'"),
        ({"threads": 0}, "`threads` must be positive, got 0"),
        ({"workers": 0}, "`workers` must be positive, got 0"),
    ],
)
def test_bad_options_are_named(options, words, lines, tokenizer) -> None:
    with pytest.raises(ValueError, match=words):
        CTranslate2Translator.of(make("pre-norm", lines, tokenizer), **options)


def test_what_cannot_be_exported_is_refused(lines, tokenizer, tmp_path) -> None:
    output = tmp_path / "model"
    ours = make("pre-norm", lines, tokenizer)
    for name in ("cmlm", "nat"):
        other = make_model(name, tokenizer.target_size)
        with pytest.raises(ValueError, match=f"`model` must be an autoregressive .*got '{name}'"):
            export(other, tokenizer, output)
        assert name in str(why_not(Translator(other, tokenizer), MaskPredict()))
    small = Tokenizer.train(lines, lines, vocab_size=30)
    with pytest.raises(ValueError, match="`tokenizer` must have .* 40 target pieces, got 30 and"):
        export(ours.model, small, output)
    with pytest.raises(ValueError, match="`quantization` must be one of int8, .*got 'int3'"):
        export(ours.model, tokenizer, output, quantization="int3")
    assert list(tmp_path.iterdir()) == []
    output.mkdir()
    with pytest.raises(FileExistsError, match="model exists"):
        export(ours.model, tokenizer, output)


def test_an_export_that_fails_leaves_nothing(lines, tokenizer, tmp_path, monkeypatch) -> None:
    ours = make("pre-norm", lines, tokenizer)

    def fail(self, directory) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export(ours.model, tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_damaged_directories_are_named(lines, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no model written by `pynar export`"):
        CTranslate2Translator(tmp_path)
    assert not is_exported(tmp_path)
    export(make("pre-norm", lines, tokenizer).model, tokenizer, tmp_path / "model")
    content = (tmp_path / "model" / "model.bin").read_bytes()
    (tmp_path / "model" / "model.bin").write_bytes(content[:-1000])
    with pytest.raises(OSError, match="CTranslate2 cannot load the model"):
        CTranslate2Translator(tmp_path / "model")
    facts = tmp_path / "model" / "pynar.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "format": 99}))
    with pytest.raises(OSError, match="has format 99"):
        CTranslate2Translator(tmp_path / "model")
    facts.write_text("{")
    with pytest.raises(OSError, match="is damaged"):
        CTranslate2Translator(tmp_path / "model")


def test_a_missing_engine_is_one_line_with_the_command(
    lines, tokenizer, tmp_path, monkeypatch
) -> None:
    ours = make("pre-norm", lines, tokenizer)
    assert why_not(ours, BeamSearch()) is None
    assert "Greedy or BeamSearch" in str(why_not(ours, Sampling()))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    command = r"pip install 'pynar\[ctranslate2\]'"
    with pytest.raises(ImportError, match=command):
        export(ours.model, tokenizer, tmp_path / "model")
    with pytest.raises(ImportError, match=command):
        CTranslate2Translator(tmp_path / "model")
    assert "pip install" in str(why_not(ours, BeamSearch()))
