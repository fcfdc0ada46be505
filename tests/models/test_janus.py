from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from small_models import SIZES, VOCABULARY, gradients, make_batch

from bench.padded_janus import autoregressive_streams, auxiliary_streams, decode, losses
from pynar.data.batching import Batch, collate
from pynar.models import JANUS, build
from pynar.models.janus import JANUSExample, disjoint_span_masking, span_masking
from pynar.symbols import BOS, EOS, MASK, NUM_SPECIAL, PAD
from pynar.testing import Tolerance, tolerance
from tests.watch import Watch

CLOSE = tolerance("cpu", torch.float64)
SINGLE = tolerance("cpu", torch.float32)  # of the length's loss, whatever the model's type
EVERY = ("ar", "nar", "aux", "kl_ar_nar", "kl_nar_aux", "kl_ar_aux", "length")
both_norms = pytest.mark.parametrize("norm", ["pre", "post"])
both_positions = pytest.mark.parametrize("query_positions", ["previous", "own"])
# Terms that are trained, as in the paper's ablation and less.
CHOICES = [
    EVERY,
    ("ar",),
    ("ar", "nar", "length"),
    ("ar", "nar", "kl_ar_nar", "length"),
    ("ar", "nar", "aux", "kl_nar_aux", "kl_ar_aux", "length"),
    ("aux", "length"),
    ("ar", "kl_nar_aux", "length"),
    ("nar", "aux"),
]


def make_janus(terms: tuple[str, ...] = EVERY, **changes: Any) -> JANUS:
    """A tiny model in float64 whose every parameter matters."""
    torch.manual_seed(0)
    weights = {f"{term}_weight": float(term in terms) for term in EVERY}
    model = build({"model": "janus", **SIZES, **weights, **changes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(model, JANUS)
    return model.train()


def close(*terms: str) -> Tolerance:
    return SINGLE if "length" in terms else CLOSE


def pairs(targets: list[int]) -> Batch:
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(NUM_SPECIAL, VOCABULARY) for _ in range(count)]

    return collate([(ids(rng.randrange(7)), ids(t)) for t in targets], range(len(targets)))


def slow(model: JANUS, batch: Batch, masked: torch.Tensor) -> dict[str, torch.Tensor]:
    lengths = batch.target_lengths.tolist()
    targets = [row[:n] for row, n in zip(batch.target.tolist(), lengths, strict=True)]
    ar = autoregressive_streams(targets, model.config.query_positions == "own")
    streams = ar, auxiliary_streams(targets, masked.tolist())
    return losses(model, batch, masked, *streams)


def draw(batch: Batch, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    live = torch.arange(batch.target.shape[1]) < batch.target_lengths[:, None]
    return (torch.rand(batch.target.shape, generator=generator) < share) & live


def make_example(model: JANUS, batch: Batch) -> JANUSExample:
    return model.corrupt(batch, torch.Generator().manual_seed(2))


def total(model: JANUS, found: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum((weight * found[term] for term, weight in model.loss_weights.items()))


@both_norms
@both_positions
@pytest.mark.parametrize("terms", CHOICES, ids="+".join)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_losses_and_gradients_are_those_of_padded_passes(
    norm: str, query_positions: str, terms: tuple[str, ...], share: float
) -> None:
    options = {"norm": norm, "query_positions": query_positions}
    model = make_janus(terms, positions="learned", max_length=11, **options)
    batch = pairs([4, 0, 7, 1, 9])
    masked = draw(batch, share)
    found = model(model.example(batch, masked))
    assert found.keys() == model.loss_weights.keys() == set(terms)
    if "length" not in terms:
        model.length = make_janus().length  # which the truth wants to have
    expected = slow(model, batch, masked)
    for term in terms:
        torch.testing.assert_close(found[term].double(), expected[term].double(), **close(term))
    total(model, found).backward()
    ours = gradients(model)
    model.zero_grad()
    (total(model, expected) + 0 * expected["length"]).backward()
    for name, gradient in gradients(model).items():
        if ours[name] is not None:
            torch.testing.assert_close(ours[name], gradient, **close(*terms))
        else:
            assert name.startswith("length")


@both_norms
def test_every_sentence_of_up_to_four_tokens_with_every_mask(norm: str) -> None:
    """All n up to 6 positions, and of each all sets of masked tokens."""
    model = make_janus(norm=norm)
    masks = [m for t in range(5) for m in itertools.product([False, True], repeat=t)]
    batch = pairs([len(m) for m in masks])
    masked = torch.tensor([[*m, *[False] * (4 - len(m))] for m in masks])
    found, expected = model(model.example(batch, masked)), slow(model, batch, masked)
    for term in EVERY:
        torch.testing.assert_close(found[term], expected[term], **close(term))
    for row, mask in enumerate(masks):
        part = alone(batch, row)
        found = model(model.example(part, torch.tensor([mask]).view(1, -1).bool()))
        expected = slow(model, part, torch.tensor([mask]).view(1, -1).bool())
        for term in EVERY:
            torch.testing.assert_close(found[term], expected[term], **close(term))


def alone(batch: Batch, row: int) -> Batch:
    source, target = int(batch.source_lengths[row]), int(batch.target_lengths[row])
    rows = slice(row, row + 1)
    return Batch(
        batch.source[rows, :source],
        batch.source_lengths[rows],
        batch.target[rows, :target],
        batch.target_lengths[rows],
        batch.indices[rows],
    )


def test_losses_of_a_batch_are_the_sums_over_its_sentences_alone() -> None:
    model, batch = make_janus(), pairs([4, 0, 7, 1, 9])
    masked = draw(batch, 0.6)
    together = model(model.example(batch, masked))
    parts = []
    for row in range(len(batch)):
        part = alone(batch, row)
        parts.append(model(model.example(part, masked[row : row + 1, : part.target.shape[1]])))
    for term, loss in together.items():
        torch.testing.assert_close(loss, sum(part[term] for part in parts), **close(term))


@pytest.mark.parametrize("garbage", [PAD, 7])
def test_padding_and_what_it_holds_change_no_loss(garbage: int) -> None:
    model, batch = make_janus(), pairs([4, 0, 7])
    masked = draw(batch, 0.6)

    def filled(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.pad(ids, (0, 3))
        return torch.where(torch.arange(wide.shape[1]) < lengths[:, None], wide, garbage)

    other = Batch(
        filled(batch.source, batch.source_lengths),
        batch.source_lengths,
        filled(batch.target, batch.target_lengths),
        batch.target_lengths,
        batch.indices,
    )
    expected = model(model.example(batch, masked))
    found = model(model.example(other, torch.nn.functional.pad(masked, (0, 3))))
    for term, loss in found.items():
        torch.testing.assert_close(loss, expected[term], **close(term))


def test_counts_are_what_is_summed() -> None:
    """With all probabilities at 1 / V, and no divergence, sums show counts."""
    model, batch = make_janus(), make_batch()
    example = make_example(model, batch)
    with torch.no_grad():
        model.target_embedding.tokens.weight.zero_()
        model.length.output.weight.zero_()
        model.length.output.bias.zero_()
    found = model(example)
    masked = int((example.labels != PAD).sum())
    assert masked > 0
    tokens = int(batch.target_lengths.sum()) + len(batch)
    for term, count in {"ar": tokens, "nar": masked, "aux": masked}.items():
        assert example.counts[term] == count
        assert found[term].item() == pytest.approx(count * math.log(VOCABULARY))
    for term in ("kl_ar_nar", "kl_nar_aux", "kl_ar_aux"):
        assert example.counts[term] == masked
        assert found[term].item() == pytest.approx(0, abs=1e-9)
    assert example.counts["length"] == len(batch)


@pytest.mark.parametrize("terms", CHOICES, ids="+".join)
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_no_loss_and_zero_gradients(
    terms: tuple[str, ...], training: bool
) -> None:
    model = make_janus(terms, dropout=0.1).train(training)
    example = make_example(model, make_batch(()))
    found = model(example)
    for term, loss in found.items():
        assert loss == 0 and example.counts[term] == 0
    total(model, found).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize("terms", CHOICES, ids="+".join)
def test_gradients_reach_every_parameter(terms: tuple[str, ...]) -> None:
    model = make_janus(terms, positions="learned", share_embeddings=False, max_length=11)
    batch = pairs([9, 9, 4, 6])
    total(model, model(model.example(batch, draw(batch, 0.6)))).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_a_batch_without_masked_tokens_trains_what_there_is() -> None:
    model, batch = make_janus(), pairs([3, 1])
    example = model.example(batch, torch.zeros_like(batch.target, dtype=torch.bool))
    found = model(example)
    for term in EVERY:
        without = term not in ("ar", "length")
        assert (found[term] == 0) == without and (example.counts[term] == 0) == without
    total(model, found).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def on_meta(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if isinstance(x, dict):
        return {name: on_meta(part) for name, part in x.items()}
    names = getattr(x, "_fields", ()) or getattr(x, "__dataclass_fields__", ())
    return type(x)(*(on_meta(getattr(x, name)) for name in names)) if names else x


@pytest.mark.parametrize("terms", CHOICES, ids="+".join)
def test_an_update_waits_for_the_device_once(terms: tuple[str, ...]) -> None:
    """For the numbers of rows: the layout is made, all else runs on meta tensors."""
    model = make_janus(terms, dropout=0.1)
    example = on_meta(make_example(model, pairs([9, 9, 4, 6])))
    model = model.float().to("meta")
    with Watch() as watch:
        found = model(example)
        total(model, found).backward()
    assert watch.found == []
    assert all(p.grad is not None for p in model.parameters())


def states(model: JANUS, batch: Batch, masked: torch.Tensor) -> dict[str, torch.Tensor]:
    example = model.example(batch, masked)
    streams = example.streams
    sizes = [len(rows) for rows in (streams.ar, streams.nar, streams.aux)]
    every = model.states(example, model.encode_rows(example.source))
    return dict(zip(("ar", "nar", "aux"), every.split(sizes), strict=True))


@both_norms
@torch.no_grad()
def test_no_prediction_sees_what_it_predicts(norm: str) -> None:
    """An AR query sees no token from its own on; an AUX query and a mask not theirs."""
    model, batch = make_janus(norm=norm), pairs([8])
    masked = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
    places = masked[0].nonzero()[:, 0].tolist()
    rest = [t for t in range(9) if t not in places]
    order = torch.tensor([*places, *rest]).argsort()  # AR states: of masked tokens first
    before = states(model, batch, masked)
    for changed in range(8):
        target = batch.target.clone()
        target[0, changed] = NUM_SPECIAL + (target[0, changed] - NUM_SPECIAL + 1) % 8
        other = Batch(
            batch.source, batch.source_lengths, target, batch.target_lengths, batch.indices
        )
        after = states(model, other, masked)
        moved = {name: (after[name] - before[name]).abs().amax(-1) > 1e-9 for name in before}
        assert moved["ar"][order].tolist() == [t > changed for t in range(9)]
        given = changed not in places
        assert moved["nar"].tolist() == [given] * len(places)
        assert moved["aux"].tolist() == [given or place > changed for place in places]


@both_norms
@torch.no_grad()
def test_rows_left_out_of_the_last_layer_change_nothing(norm: str) -> None:
    model, batch = make_janus(norm=norm), pairs([4, 0, 7, 1, 9])
    example = model.example(batch, draw(batch, 0.5))
    streams = example.streams
    source = model.encode_rows(example.source)
    arguments = {
        "sees": streams.rows.intervals,
        "reads": streams.source,
        "content": streams.content,
    }
    x = model.embed_rows(model.target_embedding, streams.rows)
    keys_values = model.decoder.project_rows(source)
    every = model.decoder.rows(x, keys_values, **arguments)
    read = torch.cat([streams.ar, streams.nar, streams.aux])
    some = model.decoder.rows(x, keys_values, **arguments, read=read)
    torch.testing.assert_close(some, every[read], **CLOSE)


@both_norms
@torch.no_grad()
def test_packed_encoding_is_padded_encoding(norm: str) -> None:
    model, batch = make_janus(norm=norm), pairs([4, 0, 7, 1, 9])
    memory = model.encode(batch.source, batch.source_lengths)
    live = torch.arange(batch.source.shape[1]) < batch.source_lengths[:, None]
    example = make_example(model, batch)
    torch.testing.assert_close(model.encode_rows(example.source), memory.states[live], **CLOSE)


def test_half_precision_training_is_close_to_single_precision() -> None:
    model, batch = make_janus().float(), pairs([4, 0, 7, 1, 9])
    example = make_example(model, batch)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = model(example)
        total(model, found).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        results.append((torch.stack([found[term] for term in EVERY]), norm))
    (exact, exact_norm), (cast, cast_norm) = results
    torch.testing.assert_close(cast, exact, rtol=0.1, atol=0.05)
    torch.testing.assert_close(cast_norm, exact_norm, rtol=0.1, atol=0)


def slow_spans(n: int, rng: random.Random, table: list[float]) -> list[bool]:
    """The rule, one sentence at a time: which of the n - 2 tokens are masked."""
    budget, spans = math.ceil(0.7 * n), []
    while sum(spans) < budget:
        spans.append(rng.choices(range(len(table)), table)[0])
    spans[-1] -= sum(spans) - budget
    spans = [span for span in spans if span]
    hidden = [False] * n
    for start, span in zip(rng.sample(range(n), len(spans)), spans, strict=True):
        for place in range(start, start + (span if start + span <= n else 1)):
            hidden[place] = True
    return hidden[1:-1]


@pytest.mark.parametrize("n,rate", [(3, None), (8, 0.61), (22, 0.57), (102, 0.55)])
def test_spans_are_masked_as_one_sentence_at_a_time(n: int, rate: float | None) -> None:
    """Means of rate, of its square and at every place, within five standard errors."""
    table = [math.exp(-2) * 2**k / math.factorial(k) for k in range(30)]
    table = [p if p >= 1e-7 else 0.0 for p in table]
    rng, rows = random.Random(0), 4000
    truth = torch.tensor([slow_spans(n, rng, table) for _ in range(rows)]).view(rows, n - 2)
    lengths = torch.full((rows,), n - 2)
    target = torch.full((rows, n), 7)  # beside a longer sentence, as in a batch
    found = span_masking(target, lengths, torch.Generator().manual_seed(0))
    assert found.dtype == torch.bool and not found[:, n - 2 :].any()
    found = found[:, : n - 2]
    assert_alike(statistics(found), statistics(truth))
    if rate is not None:
        assert float(found.float().mean()) == pytest.approx(rate, abs=0.01)


def assert_alike(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """Means over as many rows of both agree within five standard errors."""
    for one, other in zip(found, truth, strict=True):
        error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-12).all()


def statistics(masked: torch.Tensor) -> list[torch.Tensor]:
    x = masked.double()
    share = x.mean(1, keepdim=True)
    masked = masked.bool()
    runs = (masked[:, 1:] & ~masked[:, :-1]).sum(1, keepdim=True).double()
    none = (x.sum(1, keepdim=True) == 0).double()
    return [x, share, share**2, runs, none]


def test_some_short_sentences_have_nothing_masked() -> None:
    rows = 100_000
    lengths = torch.full((rows,), 6)
    masked = span_masking(lengths[:, None].expand(-1, 6), lengths, torch.Generator())
    share = float((~masked.any(1)).double().mean())
    # Two spans at the two ends, one of at least five positions, or one of six at the right end:
    p = [math.exp(-2) * 2**k / math.factorial(k) / (1 - math.exp(-2)) for k in range(14)]
    expected = sum(p[6:]) / 8 + (p[5] + p[1] * sum(p[5:])) / 56
    assert abs(share - expected) < 5 * (expected / rows) ** 0.5


def slow_disjoint_spans(count: int, rng: random.Random, table: list[float]) -> list[bool]:
    """Spans, of none among them, until 70 % are masked; then all in random order."""
    budget, spans = round(0.7 * count), []
    while sum(spans) < budget:
        spans.append(rng.choices(range(len(table)), table)[0])
    if spans:
        spans[-1] -= sum(spans) - budget
    parts = [[True] * span for span in spans] + [[False]] * (count - budget)
    rng.shuffle(parts)
    return [hidden for part in parts for hidden in part]


def run_lengths(masked: torch.Tensor) -> torch.Tensor:
    """How many runs of 1, 2, ... 8 and more masked tokens there are in each row, `[B, 8]`."""
    counts = torch.zeros(len(masked), 8, dtype=torch.double)
    for row, places in zip(counts, masked.tolist(), strict=True):
        for hidden, run in itertools.groupby(places):
            if hidden:
                row[min(len(list(run)), 8) - 1] += 1
    return counts


@pytest.mark.parametrize("count", [1, 2, 5, 20, 100])
def test_disjoint_spans_are_masked_as_one_sentence_at_a_time(count: int) -> None:
    table = [math.exp(-2) * 2**k / math.factorial(k) for k in range(14)]
    rng, rows = random.Random(0), 2000
    truth = torch.tensor([slow_disjoint_spans(count, rng, table) for _ in range(rows)])
    lengths = torch.full((rows,), count)
    target = torch.full((rows, count + 3), 7)  # beside a longer sentence, as in a batch
    found = disjoint_span_masking(target, lengths, torch.Generator().manual_seed(0))
    assert found.dtype == torch.bool and not found[:, count:].any()
    found = found[:, :count]
    assert_alike([*statistics(found), run_lengths(found)], [*statistics(truth), run_lengths(truth)])


@pytest.mark.parametrize("ratio,mean", [(0.7, 2.0), (0.1, 2.0), (0.5, 30.0), (1.0, 0.5)])
def test_disjoint_spans_mask_the_share_exactly(ratio: float, mean: float) -> None:
    lengths = torch.arange(131)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        target = torch.full((131, 130), 7)
        masked = disjoint_span_masking(target, lengths, generator, ratio=ratio, mean=mean)
        assert masked.sum(1).tolist() == [round(ratio * count) for count in range(131)]
        assert not (masked & (torch.arange(130) >= lengths[:, None])).any()


def test_a_model_masks_disjoint_spans_when_told_to() -> None:
    model = make_janus(masking="disjoint_spans", mask_ratio=0.6, mean_span=3.0)
    for targets in ([0, 1, 5, 9], [0, 0]):
        batch = pairs(targets)
        example = model.corrupt(batch, torch.Generator().manual_seed(2))
        expected = disjoint_span_masking(
            batch.target,
            batch.target_lengths,
            torch.Generator().manual_seed(2),
            ratio=0.6,
            mean=3.0,
        )
        assert torch.equal(example.inputs == MASK, expected)
        assert expected.sum(1).tolist() == [round(0.6 * count) for count in targets]
        assert all(loss.isfinite() for loss in model(example).values())


def test_uniform_masking_hides_any_number_of_tokens() -> None:
    batch, model = pairs([5] * 2000), make_janus(masking="uniform")
    example = model.corrupt(batch, torch.Generator().manual_seed(2))
    hidden = (example.inputs == MASK).sum(1)
    shares = hidden.bincount(minlength=6) / len(batch)
    assert shares[0] == 0
    # Each of 1 ... 5 in a fifth of the sentences; four standard deviations.
    assert (shares[1:] - 0.2).abs().max() < 4 * math.sqrt(0.2 * 0.8 / 2000)


@pytest.mark.parametrize("draw", [span_masking, disjoint_span_masking])
def test_masking_follows_the_generator_and_the_lengths(draw: Any) -> None:
    lengths = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(0))
    target = torch.full((50, 30), 7)
    first, again, other = (
        draw(target, lengths, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not (first & (torch.arange(30) >= lengths[:, None])).any()
    assert draw(target[:0], lengths[:0], torch.Generator()).shape == (0, 30)
    assert draw(target[:, :0], torch.zeros_like(lengths), torch.Generator()).shape == (50, 0)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"kl_ar_aux_weight": -1.0}, "`kl_ar_aux_weight` must not be negative, got -1.0"),
        ({"ar_weight": 0.0, "nar_weight": 0.0, "aux_weight": 0.0}, "one of `ar_weight`, `nar_w"),
        ({"query_positions": "next"}, "`query_positions` must be one of previous, own, got 'next'"),
        ({"masking": "all"}, "`masking` must be one of spans, disjoint_spans, uniform, got 'all'"),
        ({"mask_ratio": 0.0}, r"`mask_ratio` must be in \(0, 1\], got 0.0"),
        ({"mean_span": 0.0}, r"`mean_span` must be in \(0, 100\], got 0.0"),
        ({"positions": "learned", "max_length": 2}, "`max_length` must be at least 3, got 2"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build({"model": "janus", **SIZES, **changes})


def test_weights_have_the_names_of_other_models() -> None:
    ours = set(make_janus().state_dict())
    assert ours == set(build({"model": "cmlm", **SIZES}).state_dict())
    teacher = set(build({"model": "autoregressive", **SIZES}).state_dict())
    assert set(make_janus(("ar",)).state_dict()) == teacher < ours


def stepwise(model: JANUS, source: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
    """Log-probabilities of every next token, by steps over one sentence `[S]`."""
    memory = model.encode(source[None], torch.tensor([len(source)]))
    cache = model.decoder.cache(1, memory.states)
    return [
        model.log_probs(model.step(torch.tensor([token]), memory, cache))[0]
        for token in [BOS, *tokens]
    ]


@both_norms
@both_positions
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_steps_are_whole_passes_over_the_prefix(
    norm: str, query_positions: str, frozen: bool
) -> None:
    """Of 40 tokens, so that the cache grows; the truth is the padded two-stream decoder."""
    model = make_janus(norm=norm, query_positions=query_positions).float().eval()
    batch = pairs([4, 40, 1])
    decoding = model.freeze() if frozen else model
    scores = decoding.score(batch.source, batch.source_lengths, batch.target, batch.target_lengths)
    for row, score in enumerate(scores):
        source = batch.source[row, : batch.source_lengths[row]]
        tokens = batch.target[row, : batch.target_lengths[row]].tolist()
        memory = model.encode(source[None], batch.source_lengths[row : row + 1])
        expected = 0.0
        for place, found in enumerate(stepwise(decoding, source, tokens)):
            streams = autoregressive_streams([tokens[:place]], query_positions == "own")
            _, query = decode(model, streams, memory.states, memory.mask)
            log_probs = model.log_probs(query[0, -1])
            torch.testing.assert_close(found, log_probs, rtol=1e-4, atol=1e-4)
            expected = expected + log_probs[[*tokens, EOS][place]]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


@both_norms
@torch.no_grad()
def test_masked_tokens_are_decoded_as_in_training(norm: str) -> None:
    model, batch = make_janus(norm=norm), pairs([4, 1, 7])
    masked = draw(batch, 0.6)
    memory = model.encode(batch.source, batch.source_lengths)
    tokens = batch.target.masked_fill(masked, MASK)
    found = model.decode(tokens, batch.target_lengths, memory)
    torch.testing.assert_close(found[masked], states(model, batch, masked)["nar"], **CLOSE)
    some = model.decode(tokens, batch.target_lengths, memory, masked)
    torch.testing.assert_close(some, found[masked], **CLOSE)


def test_score_can_be_trained_on() -> None:
    model, batch = make_janus(("ar",)), pairs([4, 1, 7])
    arguments = batch.source, batch.source_lengths, batch.target, batch.target_lengths
    score = model.score(*arguments)
    score.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        again = model.float().score(*arguments)
    torch.testing.assert_close(again, score.float(), **SINGLE)


@torch.no_grad()
def test_a_sentence_ends_left_to_right_but_not_among_masks() -> None:
    model, h = make_janus().float(), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    h = h + 5 * model.target_embedding.tokens.weight[EOS]
    assert (model.best(h)[0] == EOS).any()
    tokens, log_probs = model.fill(h)
    assert (tokens > EOS).all() and (tokens != MASK).all()
    logits = model.logits(h)
    logits[:, [PAD, BOS, EOS, MASK]] = -torch.inf
    best, index = logits.log_softmax(-1).max(-1)
    assert torch.equal(tokens, index)
    torch.testing.assert_close(log_probs, best, **SINGLE)


def test_without_a_length_only_left_to_right_decoding_is_offered() -> None:
    assert make_janus(("ar",)).strategies == ("beam", "greedy", "sampling")
    assert "mask_predict" in make_janus(("ar", "length")).strategies


def test_the_frame_takes_two_of_the_positions() -> None:
    model, batch = make_janus(positions="learned", max_length=11), pairs([9])
    assert model.longest == model.length.longest == 9
    assert model(make_example(model, batch))["ar"] > 0
    with pytest.raises(ValueError, match="a sequence of 12 tokens is longer than the model's 11"):
        model(make_example(model, pairs([10])))
