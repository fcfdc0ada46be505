"""Batches of similar length under a token budget, in an order that a seed determines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pynar.data.corpus import Corpus
from pynar.symbols import EOS, PAD

__all__ = ["Batch", "Batches", "collate"]

# Blurs the lengths by which pairs are sorted, or the same pairs would meet in every epoch. On
# Multi30k with 4096 tokens it costs 1 % more padding, and two pairs of a batch meet again in the
# next epoch with probability 0.22 instead of 0.49.
WIDTH_NOISE = 0.1


@dataclass(frozen=True)
class Batch:
    """Sentence pairs as padded tensors; ``B`` may be 0 (see ``Batches``)."""

    source: Tensor  # int64 [B, S], right padded with PAD, EOS appended to every source
    source_lengths: Tensor  # int64 [B], EOS counted
    target: Tensor  # int64 [B, T], right padded with PAD, no BOS, no EOS
    target_lengths: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], positions in the corpus

    def __len__(self) -> int:
        return self.indices.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Returns the batch on ``device``."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))


def collate(
    pairs: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
    indices: Sequence[int] | np.ndarray,
) -> Batch:
    """Pads pairs of (source ids, target ids) into a batch and appends EOS to the sources.

    Raises ``ValueError`` where ``pairs`` and ``indices`` differ in number.
    """
    if len(pairs) != len(indices):
        raise ValueError(
            f"collate: indices must have one entry a pair, {len(pairs)}, got {len(indices)}"
        )
    source, source_lengths = _pad([pair[0] for pair in pairs], extra=1)
    if len(pairs):
        source[np.arange(len(pairs)), source_lengths - 1] = EOS
    target, target_lengths = _pad([pair[1] for pair in pairs], extra=0)
    return Batch(
        source=torch.from_numpy(source),
        source_lengths=torch.from_numpy(source_lengths),
        target=torch.from_numpy(target),
        target_lengths=torch.from_numpy(target_lengths),
        indices=torch.from_numpy(np.array(indices, dtype=np.int64)),
    )


def _pad(rows: list[Sequence[int] | np.ndarray], *, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows as int64 [B, max + extra], padded, and their lengths + extra [B]."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width = int(lengths.max(initial=-extra)) + extra
    padded = np.full((len(rows), width), PAD, dtype=np.int64)
    if len(rows):
        padded[np.arange(width) < lengths[:, None]] = np.concatenate(rows)
    return padded, lengths + extra


class Batches:
    """The batches of a corpus, epoch by epoch.

    A batch holds pairs of similar target and source length and at most ``max_tokens`` padded
    tokens, max(B·S, B·(T+1)), with EOS counted in S and one position a target for the EOS or
    BOS that an autoregressive decoder adds; ``max_sentences`` bounds B besides.

    Which pairs share a batch, and the order of the batches, follow from ``(seed, epoch)`` alone,
    whatever happened before: ``epoch(n, start=k)`` continues an interrupted epoch exactly. Over
    all ranks every pair appears exactly once an epoch, and every rank has the same number of
    batches: rank r takes batches r, r + world_size, …, and where their number is no multiple of
    ``world_size`` the largest batches are halved until it is. Only where no batch has two pairs
    left, as in a corpus with fewer pairs than ranks, do some ranks get an empty batch (B = 0).

    With ``shuffle=False`` every epoch is the same, from short pairs to long ones.

    Raises ``ValueError`` for a budget that a single pair exceeds, naming that pair.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        max_tokens: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        max_sentences: int | None = None,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be in [0, world_size), got rank {rank} and world_size {world_size}"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        if max_sentences is not None and max_sentences < 1:
            raise ValueError(f"max_sentences must be positive, got {max_sentences}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.corpus = corpus
        self.max_tokens = max_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.max_sentences = max_sentences
        # Both sides gain one position, so one number a pair decides what fits:
        # max(B·S, B·(T+1)) = B · max over the batch of max(source, target) + 1.
        self._cost = np.maximum(corpus.source_lengths, corpus.target_lengths).astype(np.int64) + 1
        if len(corpus) and self._cost.max() > max_tokens:
            index = int(self._cost.argmax())
            raise ValueError(
                f"max_tokens must be at least {self._cost[index]} to hold pair {index} of the "
                f"corpus, got {max_tokens}"
            )
        self._cached: tuple[int, list[np.ndarray]] | None = None

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Returns the pairs of every batch of an epoch, over all ranks, in order."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        key = epoch if self.shuffle else 0
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._make_plan(key))
        return self._cached[1]

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        ties = np.arange(len(self.corpus))
        widths = self._cost
        if self.shuffle:
            ties = rng.permutation(ties)
            widths = (widths * (1 + WIDTH_NOISE * rng.random(len(widths)))).astype(np.int64)
        # By the longer side first: each side then is padded to about the longer one. By target,
        # then source, half of the source would be padding wherever one target length alone
        # fills several batches' worth of short sources and a long one.
        order = np.lexsort((ties, self.corpus.target_lengths, widths))
        batches = self._even(self._cut(order))
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Cuts a sequence of pairs greedily into batches within the budget."""
        cost = self._cost[order]
        batches = []
        begin = 0
        while begin < len(order):
            limit = self.max_tokens // int(cost[begin])
            if self.max_sentences is not None:
                limit = min(limit, self.max_sentences)
            widest = np.maximum.accumulate(cost[begin : begin + limit])
            size = widest * np.arange(1, len(widest) + 1)
            count = int(np.searchsorted(size, self.max_tokens, side="right"))
            batches.append(order[begin : begin + count])
            begin += count
        return batches

    def _even(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """Halves the largest batches until their number is a multiple of ``world_size``."""
        batches = list(batches)
        while len(batches) % self.world_size:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[largest]
            half = len(batch) // 2
            batches[largest] = batch[half:]
            batches.append(batch[:half])  # empty where no batch has two pairs left
        return batches

    def batches_in_epoch(self, epoch: int) -> int:
        """Returns the number of batches of an epoch on this rank: the same on every rank."""
        return len(self.plan(epoch)) // self.world_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this rank's batches of an epoch, beginning with the ``start``-th."""
        count = self.batches_in_epoch(epoch)
        if not 0 <= start <= count:
            raise ValueError(f"start must be in [0, {count}], got {start}")
        mine = self.plan(epoch)[self.rank :: self.world_size]
        return (collate([self.corpus[int(i)] for i in pairs], pairs) for pairs in mine[start:])
