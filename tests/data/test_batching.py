import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pynar.data import Batch, Batches, Corpus, collate
from pynar.symbols import EOS, PAD


def make_corpus(lengths):
    """Pairs of the given lengths; the ids tell which pair they belong to."""
    return Corpus.from_pairs(
        [([10 + i] * source, [1000 + i] * target) for i, (source, target) in enumerate(lengths)]
    )


def random_corpus(count, seed=0):
    rng = np.random.default_rng(seed)
    source = rng.integers(1, 40, count)
    target = np.maximum(1, source + rng.integers(-10, 11, count))
    return make_corpus(zip(source.tolist(), target.tolist(), strict=True))


def same(first, second):
    fields = [field.name for field in dataclasses.fields(Batch)]
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in fields)


def indices(batches):
    return [batch.indices.tolist() for batch in batches]


lengths_strategy = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40)


def test_collate_by_hand():
    batch = collate([([7, 8, 9], [5]), ([6], []), ([], [5, 6])], [4, 2, 9])
    assert batch.source.tolist() == [[7, 8, 9, EOS], [6, EOS, PAD, PAD], [EOS, PAD, PAD, PAD]]
    assert batch.source_lengths.tolist() == [4, 2, 1]
    assert batch.target.tolist() == [[5, PAD], [PAD, PAD], [5, 6]]
    assert batch.target_lengths.tolist() == [1, 0, 2]
    assert batch.indices.tolist() == [4, 2, 9]
    assert len(batch) == 3


def test_tensors_are_int64_and_writable():
    corpus = make_corpus([(3, 2), (1, 5)])
    batch = collate([corpus[0], corpus[1]], np.array([0, 1], dtype=np.int32))
    for field in dataclasses.fields(batch):
        assert getattr(batch, field.name).dtype == torch.int64
    batch.source[0, 0] = 77
    assert corpus[0][0][0] == 10


def test_empty_batch():
    batch = collate([], [])
    assert batch.source.shape == batch.target.shape == (0, 0) or batch.source.shape[0] == 0
    assert [getattr(batch, f.name).shape[0] for f in dataclasses.fields(batch)] == [0] * 5
    assert len(batch.to("cpu")) == 0


def test_collate_wants_one_index_a_pair():
    with pytest.raises(ValueError, match="one entry a pair, 1, got 2"):
        collate([([5], [5])], [0, 1])


@given(lengths_strategy, st.integers(13, 60), st.integers(1, 5), st.booleans())
def test_each_pair_once_within_the_budget(lengths, max_tokens, world_size, shuffle):
    corpus = make_corpus(lengths)
    ranks = [
        Batches(corpus, max_tokens=max_tokens, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in (0, 3):
        batches = [list(rank.epoch(epoch)) for rank in ranks]
        counts = {len(own) for own in batches} | {rank.batches_in_epoch(epoch) for rank in ranks}
        assert len(counts) == 1
        everything = list(chain.from_iterable(batches))
        assert sorted(chain.from_iterable(indices(everything))) == list(range(len(lengths)))
        if any(len(batch) > 1 for batch in everything):
            assert all(len(batch) for batch in everything)
        for batch in everything:
            size, width = batch.source.shape
            assert max(size * width, size * (batch.target.shape[1] + 1)) <= max_tokens
            for row, index in enumerate(batch.indices.tolist()):
                source, target = lengths[index]
                wanted = [10 + index] * source + [EOS]
                assert batch.source[row].tolist() == wanted + [PAD] * (width - len(wanted))
                assert batch.source_lengths[row] == source + 1
                assert batch.target[row].tolist()[:target] == [1000 + index] * target
                assert not batch.target[row, target:].any()
                assert batch.target_lengths[row] == target


@given(lengths_strategy, st.integers(13, 60), st.integers(1, 4))
def test_no_batch_could_take_one_pair_more(lengths, max_tokens, max_sentences):
    """Greedy: the first pair of the next batch does not fit into this one."""
    batches = Batches(
        make_corpus(lengths), max_tokens=max_tokens, shuffle=False, max_sentences=max_sentences
    )
    plan = [pairs.tolist() for pairs in batches.plan(0)]
    for now, following in zip(plan, plan[1:], strict=False):
        joined = [*now, following[0]]
        widest = max(max(lengths[i]) + 1 for i in joined)
        assert len(joined) > max_sentences or len(joined) * widest > max_tokens


def test_seed_and_epoch_determine_the_order():
    corpus = random_corpus(500)
    batches = Batches(corpus, max_tokens=400, seed=1)
    first = indices(batches.epoch(2))
    assert indices(Batches(corpus, max_tokens=400, seed=1).epoch(2)) == first
    list(batches.epoch(7))
    assert indices(batches.epoch(2)) == first
    assert indices(batches.epoch(3)) != first
    assert indices(Batches(corpus, max_tokens=400, seed=2).epoch(2)) != first


def test_order_does_not_depend_on_global_random_state():
    corpus = random_corpus(200)
    np.random.seed(0)
    torch.manual_seed(0)
    first = indices(Batches(corpus, max_tokens=300).epoch(0))
    np.random.seed(1)
    torch.manual_seed(1)
    assert indices(Batches(corpus, max_tokens=300).epoch(0)) == first


@pytest.mark.parametrize("world_size", [1, 3])
def test_resumed_is_uninterrupted(world_size):
    corpus = random_corpus(300)
    options = {"max_tokens": 300, "seed": 9, "rank": world_size - 1, "world_size": world_size}
    whole = list(Batches(corpus, **options).epoch(4))
    for start in range(len(whole) + 1):
        resumed = list(Batches(corpus, **options).epoch(4, start=start))
        assert len(resumed) == len(whole) - start
        assert all(map(same, resumed, whole[start:]))


def test_ranks_take_turns_in_one_order():
    corpus = random_corpus(300)
    ranks = [Batches(corpus, max_tokens=300, rank=r, world_size=4) for r in range(4)]
    steps = zip(*(indices(rank.epoch(1)) for rank in ranks), strict=True)
    assert list(chain.from_iterable(steps)) == [pairs.tolist() for pairs in ranks[0].plan(1)]


def test_world_size_changes_few_batches():
    corpus = random_corpus(500)

    def batches(world_size):
        plan = Batches(corpus, max_tokens=400, world_size=world_size).plan(0)
        return {frozenset(pairs.tolist()) for pairs in plan}

    assert len(batches(1) - batches(4)) <= 3


def test_fewer_pairs_than_ranks():
    corpus = make_corpus([(2, 2), (3, 3)])
    ranks = [Batches(corpus, max_tokens=50, rank=r, world_size=5) for r in range(5)]
    assert [rank.batches_in_epoch(0) for rank in ranks] == [1] * 5
    sizes = [len(batch) for rank in ranks for batch in rank.epoch(0)]
    assert sorted(sizes) == [0, 0, 0, 1, 1]


def test_empty_corpus():
    batches = Batches(Corpus.from_pairs([]), max_tokens=50, world_size=2)
    assert batches.batches_in_epoch(0) == 0
    assert list(batches.epoch(0)) == []


def test_pairs_change_their_company():
    corpus = random_corpus(2000)
    batches = Batches(corpus, max_tokens=400)
    first, second = ({frozenset(pairs.tolist()) for pairs in batches.plan(n)} for n in (0, 1))
    assert len(first & second) < len(first) / 20


def test_little_is_padding():
    corpus = random_corpus(3000)
    batches = list(Batches(corpus, max_tokens=1000).epoch(0))
    tokens = sum(int(b.source_lengths.sum() + b.target_lengths.sum()) for b in batches)
    padded = sum(b.source.numel() + b.target.numel() for b in batches)
    assert tokens / padded > 0.85  # 0.45 in random order


def test_unshuffled_goes_from_short_to_long_every_epoch():
    corpus = random_corpus(300)
    batches = Batches(corpus, max_tokens=300, shuffle=False, seed=3)
    widths = [max(b.source.shape[1], b.target.shape[1] + 1) for b in batches.epoch(0)]
    assert widths == sorted(widths)
    assert indices(batches.epoch(0)) == indices(batches.epoch(5))
    assert indices(Batches(corpus, max_tokens=300, shuffle=False).epoch(0)) == indices(
        batches.epoch(0)
    )


@pytest.mark.parametrize("pair, needed", [((60, 3), 61), ((3, 70), 71)])
def test_pair_beyond_the_budget_is_named(pair, needed):
    corpus = make_corpus([(2, 2), pair, (3, 3)])
    with pytest.raises(ValueError, match=f"at least {needed} to hold pair 1 .* got {needed - 1}"):
        Batches(corpus, max_tokens=needed - 1)
    assert Batches(corpus, max_tokens=needed).batches_in_epoch(0) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens must be positive, got 0"),
        ({"max_sentences": 0}, "max_sentences must be positive, got 0"),
        ({"rank": 2, "world_size": 2}, "got rank 2 and world_size 2"),
        ({"rank": -1}, "got rank -1"),
        ({"world_size": 0}, "got rank 0 and world_size 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(make_corpus([(2, 2)]), **{"max_tokens": 50, **options})


def test_wrong_epoch_and_start():
    batches = Batches(make_corpus([(2, 2)]), max_tokens=50)
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        batches.batches_in_epoch(-1)
    for start in (-1, 2):
        with pytest.raises(ValueError, match=rf"start must be in \[0, 1\], got {start}"):
            batches.epoch(0, start=start)


def test_batch_moves_to_a_device():
    batch = collate([([5], [6, 7])], [0]).to("meta")
    assert {getattr(batch, f.name).device.type for f in dataclasses.fields(batch)} == {"meta"}


def test_corpus_from_disk_gives_batches(prepared):
    corpus = Corpus.open(prepared, "train")
    for batch in Batches(corpus, max_tokens=500).epoch(0):
        for row, index in enumerate(batch.indices.tolist()):
            source, target = corpus[index]
            assert batch.source[row, : len(source)].tolist() == source.tolist()
            assert batch.target[row, : len(target)].tolist() == target.tolist()
