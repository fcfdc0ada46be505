from __future__ import annotations

import math

import pytest
import torch
from small_systems import make_model

from pynar.data import Tokenizer
from pynar.decoding import (
    BeamSearch,
    DraftAndVerify,
    Greedy,
    MaskPredict,
    NoisyParallel,
    Sampling,
    Strategy,
    Translation,
    Translator,
    strategy,
)
from pynar.symbols import EOS

CASES: list[tuple[str, Strategy]] = [
    ("autoregressive", Greedy()),
    ("autoregressive", BeamSearch(3, n_best=3)),
    ("autoregressive", Sampling(2, seed=4)),
    ("cmlm", MaskPredict(3, 3, n_best=2)),
    ("nat", MaskPredict(1, 2)),
]
every_case = pytest.mark.parametrize("name,decoding", CASES)


def make(name: str, tokenizer: Tokenizer, **changes) -> Translator:
    return Translator(make_model(name, tokenizer.target_size, **changes), tokenizer)


def assert_alike(actual: list[Translation], expected: list[Translation]) -> None:
    assert [(r.text, r.passes) for r in actual] == [(r.text, r.passes) for r in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-5)
        assert [t for t, _ in one.alternatives] == [t for t, _ in other.alternatives]
        scores = [s for _, s in other.alternatives]
        assert [s for _, s in one.alternatives] == pytest.approx(scores, rel=1e-4, abs=1e-5)


@every_case
def test_every_line_is_translated_in_its_place(name: str, decoding: Strategy, lines, tokenizer):
    """Against the strategy itself, one sentence at a time."""
    translator = make(name, tokenizer)
    results = translator.decode(lines[:15], decoding)
    assert len({result.text for result in results}) > 5
    for number, (line, result) in enumerate(zip(lines, results, strict=False)):
        ids = [*tokenizer.encode_source([line])[0], EOS]
        found = decoding.decode(
            translator.model,
            torch.tensor([ids]),
            torch.tensor([len(ids)]),
            indices=torch.tensor([number]),
        )
        texts, scores = tokenizer.decode_target(found.lists()[0]), found.scores[0].tolist()
        alternatives = list(zip(texts, scores, strict=True))
        expected = Translation(texts[0], scores[0], int(found.passes[0]), alternatives)
        assert_alike([result], [expected])


@every_case
@pytest.mark.parametrize("max_tokens", [1, 13, 60])
def test_the_size_of_the_batches_changes_nothing(
    name: str, decoding: Strategy, max_tokens: int, lines, tokenizer
) -> None:
    translator = make(name, tokenizer)
    whole = translator.decode(lines[:30], decoding)
    assert_alike(translator.decode(lines[:30], decoding, max_tokens=max_tokens), whole)


@pytest.mark.parametrize("max_tokens", [1, 13, 60, 4096])
def test_batches_hold_at_most_so_many_tokens(max_tokens: int, lines, tokenizer) -> None:
    translator = make("nat", tokenizer)
    shapes = []
    encode = translator.model.encode

    def watched(source, lengths):
        shapes.append(source.shape)
        return encode(source, lengths)

    translator.model.encode = watched
    translator.decode(lines, max_tokens=max_tokens)
    assert sum(rows for rows, _ in shapes) == len(lines)
    assert all(rows == 1 or rows * width <= max_tokens for rows, width in shapes)
    assert len(shapes) == 1 if max_tokens == 4096 else len(shapes) > 1


@every_case
def test_empty_lines_stay_empty_and_shift_nothing(name, decoding, lines, tokenizer) -> None:
    translator = make(name, tokenizer)
    given = ["", lines[0], "   ", "\t\u00a0\u2028", lines[1], lines[0], ""]
    results = translator.decode(given, decoding)
    for number in (0, 2, 3, 6):
        assert results[number] == Translation("", 0.0, 0)
    if isinstance(decoding, Sampling):  # sentences are named by their place
        return
    two = translator.decode(lines[:2], decoding)
    assert_alike([results[i] for i in (1, 4, 5)], [two[0], two[1], two[0]])


def test_no_lines_give_no_translations(tokenizer) -> None:
    translator = make("cmlm", tokenizer)
    assert translator.translate([]) == [] and translator.decode([""])[0].text == ""


def test_lines_may_come_from_a_generator(lines, tokenizer) -> None:
    translator = make("nat", tokenizer)
    assert translator.translate(line for line in lines) == translator.translate(lines)


def test_translate_is_the_text_of_decode(lines, tokenizer) -> None:
    translator = make("cmlm", tokenizer)
    results = translator.decode(lines, "mask_predict", options={"iterations": 3})
    assert translator.translate(lines, iterations=3) == [result.text for result in results]
    assert {result.passes for result in results} == {3}


@pytest.mark.parametrize(("chosen", "sizes"), [(Greedy(), [6]), (NoisyParallel(), [2] * 3)])
def test_a_batch_counts_the_drafts_of_each_sentence(chosen, sizes, tokenizer, monkeypatch) -> None:
    translator, found = make("autoregressive", tokenizer), []

    def decode(sources, names, decoding):
        found.append(len(sources))
        return [Translation("", 0.0, 1)] * len(sources)

    monkeypatch.setattr(translator, "_decode_batch", decode)
    translator.decode_ids([[7, 8, 9]] * 6, chosen, max_tokens=2 * 4 * 30)
    assert found == sizes


@pytest.mark.parametrize("names", [[7, 3, 5], [0, 1, 2]])
def test_sampling_follows_the_names_of_the_sentences(names, lines, tokenizer) -> None:
    translator = make("autoregressive", tokenizer)
    sources = tokenizer.encode_source(lines[:3])
    decoding = Sampling(temperature=2.0)
    results = translator.decode_ids(sources, decoding, names=names)
    turned = translator.decode_ids(sources[::-1], decoding, names=names[::-1])
    assert_alike(turned[::-1], results)
    if names == [0, 1, 2]:
        assert_alike(translator.decode_ids(sources, decoding), results)
    else:
        others = translator.decode_ids(sources, decoding)
        assert [r.text for r in others] != [r.text for r in results]


def recorded(translator: Translator) -> list[list[int]]:
    """The sources that reach the model, from now on."""
    pieces: list[list[int]] = []
    decode_ids = translator.decode_ids

    def watched(sources, *arguments, **options):
        pieces.extend(list(ids) for ids in sources)
        return decode_ids(sources, *arguments, **options)

    translator.decode_ids = watched
    return pieces


@pytest.mark.parametrize("limit", [4, 9, 30])
def test_long_lines_are_cut_into_pieces_that_hold_all_they_held(limit: int, lines, tokenizer):
    translator = make("nat", tokenizer)
    pieces = recorded(translator)
    given = [lines[0], ", ".join(lines[:10]), lines[1]]
    translator.decode(given, max_source_tokens=limit)
    assert len(pieces) > 3 and max(map(len, pieces)) <= limit
    text = "".join(tokenizer.decode_source(pieces))
    assert text.replace(" ", "") == "".join(given).replace(" ", "")


def test_a_long_line_is_its_pieces_of_whole_words_joined(lines, tokenizer) -> None:
    translator = make("cmlm", tokenizer)
    sources = recorded(translator)
    long = ", ".join(lines[:10])
    before, result, after = translator.decode([lines[0], long, lines[1]], max_source_tokens=30)
    pieces = tokenizer.decode_source(sources[1:-1])
    assert len(pieces) > 1 and " ".join(pieces) == long
    parts = translator.decode(pieces)
    score = sum(part.score for part in parts) / len(parts)
    text = " ".join(part.text for part in parts)
    passes = sum(part.passes for part in parts)
    assert_alike([result], [Translation(text, score, passes, [(text, score)])])
    assert_alike([before, after], translator.decode(lines[:2]))


def test_counts_of_drafts_are_those_of_the_pieces(lines, tokenizer) -> None:
    translator = make("janus", tokenizer)
    ids = [*tokenizer.encode_source([lines[0]])[0], EOS]
    found = DraftAndVerify().decode(translator.model, torch.tensor([ids]), torch.tensor([len(ids)]))
    sources = recorded(translator)
    long = ", ".join(lines[:10])
    one, joined = translator.decode([lines[0], long], "draft_and_verify", max_source_tokens=30)
    assert (one.accepted, one.verified) == (int(found.accepted[0]), int(found.verified[0]))
    parts = translator.decode(tokenizer.decode_source(sources[1:]), "draft_and_verify")
    assert len(parts) > 1 and joined.verified == sum(part.verified for part in parts)
    assert joined.accepted == sum(part.accepted for part in parts)
    plain = translator.decode(lines[:1], "greedy")[0]
    assert (plain.accepted, plain.verified) == (0, 0)


def test_long_lines_are_cut_at_punctuation_where_that_makes_no_small_pieces(tokenizer) -> None:
    translator = make("nat", tokenizer)
    pieces = recorded(translator)
    word = tokenizer.decode_source([tokenizer.encode_source(["a"])[0]])[0]
    size = len(tokenizer.encode_source(["a a a a"])[0])
    translator.decode([f"{word} a a a, a a a a a a"], max_source_tokens=size + 3)
    assert tokenizer.decode_source(pieces[:1]) == ["a a a a,"]
    pieces.clear()
    translator.decode(["a, a a a a a a a a a"], max_source_tokens=size + 3)
    assert tokenizer.decode_source(pieces[:1]) != ["a,"]


def test_one_endless_word_is_cut_anywhere(tokenizer) -> None:
    translator = make("nat", tokenizer)
    pieces = recorded(translator)
    translator.decode(["abcdefgh" * 20], max_source_tokens=7)
    assert {len(piece) for piece in pieces[:-1]} == {7} and len(pieces[-1]) <= 7
    assert [i for piece in pieces for i in piece] == tokenizer.encode_source(["abcdefgh" * 20])[0]


def test_long_lines_are_refused_by_number_if_asked(lines, tokenizer) -> None:
    translator = make("nat", tokenizer)
    long = " ".join(lines[:5])
    size = len(tokenizer.encode_source([long])[0])
    with pytest.raises(ValueError, match=rf"line 2 has {size} tokens, .*\({size - 1}\); split it"):
        translator.decode([lines[0], long], on_long="error", max_source_tokens=size - 1)
    assert translator.decode([long], on_long="error", max_source_tokens=size)[0].passes == 1


@pytest.mark.parametrize("name", ["autoregressive", "cmlm", "nat"])
def test_lines_longer_than_the_positions_are_cut_as_well(name: str, lines, tokenizer) -> None:
    translator = make(name, tokenizer, positions="learned", max_length=16)
    pieces = recorded(translator)
    long = " ".join(lines[:12])
    assert translator.translate([long])[0]
    assert len(pieces) > 1 and max(map(len, pieces)) <= 15
    with pytest.raises(ValueError, match=r"the model allow \(15\)"):
        translator.decode([long], on_long="error")


def test_alternatives_are_as_many_as_there_are_and_sorted(lines, tokenizer) -> None:
    results = make("autoregressive", tokenizer).decode(lines[:8], BeamSearch(4, n_best=4))
    for result in results:
        scores = [score for _, score in result.alternatives]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert result.alternatives[0] == (result.text, result.score)
    # One source token has 6 + 1 possible lengths of classes -6 ... 5, fewer than the 12 asked for.
    short = make("cmlm", tokenizer, length_kind="difference").decode(
        ["a", lines[0]], MaskPredict(1, length_candidates=12, n_best=12)
    )
    size = len(tokenizer.encode_source(["a"])[0]) + 1
    assert len(short[0].alternatives) == size + 5
    assert all(score > -math.inf for result in short for _, score in result.alternatives)


def test_a_trace_has_a_line_for_every_pass(lines, tokenizer) -> None:
    translator = make("cmlm", tokenizer)
    for result in translator.decode(lines[:4], MaskPredict(3, trace=True)):
        assert len(result.trace) == 3
        pieces = [tokenizer.target.piece_to_id(piece) for piece in result.trace[-1].split(" ")]
        assert tokenizer.decode_target([pieces]) == [result.text]
    assert translator.decode(lines[:1])[0].trace == []


@pytest.mark.parametrize(
    "name,kind,options,expected",
    [
        ("autoregressive", None, {}, BeamSearch()),
        ("autoregressive", None, {"beam": 2, "length_penalty": 1}, BeamSearch(2, 1.0)),
        ("autoregressive", "greedy", {"max_extra": 3}, Greedy(max_extra=3)),
        ("autoregressive", "sampling", {"top_k": 2}, Sampling(top_k=2)),
        ("cmlm", None, {}, MaskPredict()),
        ("cmlm", "mask_predict", {"iterations": 4}, MaskPredict(4)),
        ("nat", None, {}, MaskPredict(1)),
        ("nat", None, {"iterations": 2}, MaskPredict(2)),
    ],
)
def test_strategies_are_made_by_name_with_the_models_defaults(name, kind, options, expected):
    made = strategy(make_model(name), kind, options)
    assert made == expected and type(made) is type(expected)


@pytest.mark.parametrize(
    "name,kind,options,words",
    [
        ("cmlm", None, {"iteration": 4}, "MaskPredict: .*did you mean `iterations`.*n_best, trace"),
        ("cmlm", None, {"beam": 4}, "MaskPredict: unknown key `beam`; the known ones are iter"),
        ("autoregressive", None, {"iterations": 4}, "BeamSearch: unknown key `iterations`"),
        ("autoregressive", None, {"beam": 2.5}, "BeamSearch: `beam` must be an integer, got 2.5"),
        ("cmlm", None, {"iterations": 0}, "MaskPredict: `iterations` must be positive"),
        ("cmlm", "beam", {}, "of a cmlm model must be one of mask_predict, got 'beam'"),
        ("autoregressive", "mask_predict", {}, "must be one of beam, greedy, sampling, got 'mask"),
        ("autoregressive", "bean", {}, "must be one of beam, greedy, sampling, got 'bean'"),
        ("autoregressive", MaskPredict(), {}, "must be one of beam, greedy, sampling, got 'mask"),
        ("nat", Greedy(), {}, "of a nat model must be one of mask_predict, got 'greedy'"),
        ("cmlm", MaskPredict(), {"iterations": 4}, "belong into the strategy object, got iter"),
    ],
)
def test_what_a_model_or_strategy_lacks_is_refused(name, kind, options, words, tokenizer):
    with pytest.raises(ValueError, match=words):
        make(name, tokenizer).translate(["a"], kind, **options)


@pytest.mark.parametrize(
    "given,options,words",
    [
        ("one string", {}, "`lines` must be a sequence of strings, got one string"),
        (["a"], {"on_long": "cut"}, "`on_long` must be one of split, error, got 'cut'"),
        (["a"], {"max_tokens": 0}, "`max_tokens` and `max_source_tokens` must be positive"),
        (["a"], {"max_source_tokens": 0}, "must be positive"),
    ],
)
def test_senseless_arguments_are_refused(given, options, words, tokenizer) -> None:
    with pytest.raises(ValueError, match=words):
        make("nat", tokenizer).decode(given, **options)


def test_a_strategy_of_ones_own_needs_only_its_method(lines, tokenizer) -> None:
    class Shortest:
        def decode(self, model, source, source_lengths, *, indices=None):
            return MaskPredict(1).decode(
                model, source, source_lengths, target_lengths=torch.ones(len(source), 1).long()
            )

    translator = make("cmlm", tokenizer)
    results = translator.decode(lines[:5], Shortest())
    assert [result.passes for result in results] == [1] * 5


def test_a_translator_puts_its_model_into_evaluation_mode(lines, tokenizer) -> None:
    model = make_model("cmlm", tokenizer.target_size).train()
    assert not Translator(model, tokenizer).model.training


def test_separate_vocabularies_are_read_and_written_each_on_its_side(lines) -> None:
    upper = [line.upper() for line in lines]
    tokenizer = Tokenizer.train(lines, upper, vocab_size=40, joint=False)
    model = make_model("autoregressive", 40, share_embeddings=False)
    for text in Translator(model, tokenizer).translate(lines[:5], "greedy"):
        assert text and text == text.upper()
