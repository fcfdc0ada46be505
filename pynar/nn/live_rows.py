"""The live positions of padded batches as rows, for networks that are frozen on the CPU."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pynar.nn.kept import SMALL, kept

__all__ = ["Rows"]

# So many rows' activations stay in the cache from one layer to the next.
GROUP = 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """The live positions of a padded batch `[B, T]`, one after the other."""

    batch: int
    width: int
    ends: list[int]  # where the rows of every sentence end
    bounds: Tensor  # int32 [B, 2]: the rows of every sentence
    lengths: Tensor  # int64 [B]
    places: Tensor | None  # int64 [N]: position in [B * T] of every row; None without padding

    @staticmethod
    def of(lengths: Tensor, width: int) -> Rows:
        make = _kept_rows if len(lengths) * width <= SMALL else _rows
        return make(tuple(lengths.tolist()), width)

    @property
    def count(self) -> int:
        return self.ends[-1] if self.ends else 0

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, C] -> [N, C]`."""
        x = x.flatten(0, 1)
        return x if self.places is None else x[self.places]

    def unpack(self, rows: Tensor) -> Tensor:
        """`[N, C] -> [B, T, C]`, zero in the padding."""
        if self.places is not None:
            padded = rows.new_zeros(self.batch * self.width, rows.shape[1])
            padded[self.places] = rows
            rows = padded
        return rows.view(self.batch, self.width, rows.shape[1])

    @functools.cached_property
    def own(self) -> Tensor:
        """Intervals `[N, 1, 2]` with which a row sees all of its sentence."""
        with torch.inference_mode(False):  # kept as long as the rows, see pynar/nn/kept.py
            return self.each(self.bounds)

    @functools.cached_property
    def sentences(self) -> Tensor:
        """int64 `[N]`: the sentence of every row."""
        with torch.inference_mode(False):
            return torch.arange(self.batch).repeat_interleave(self.lengths)

    def each(self, bounds: Tensor) -> Tensor:
        """Intervals `[N, 1, 2]` of the rows from `bounds: [B, 2]` of their sentences."""
        if self.places is None:
            spread = bounds[:, None].expand(-1, self.width, 2).reshape(-1, 1, 2)
        else:
            spread = bounds.repeat_interleave(self.lengths, 0)[:, None]
        return spread

    def causal(self) -> Tensor:
        """Intervals `[N, 1, 2]` with which a row sees itself and what is before it."""
        rows = torch.arange(self.count, dtype=torch.int32)
        return torch.stack([self.own[:, 0, 0], rows + 1], 1)[:, None]

    def groups(self) -> list[tuple[int, int]]:
        """Ranges of rows, whole sentences, of at most `GROUP` rows where possible."""
        if self.count <= GROUP:
            return [(0, self.count)]
        groups, start = [], 0
        for end, after in zip(self.ends, [*self.ends[1:], math.inf], strict=True):
            if after - start > GROUP:
                groups.append((start, end))
                start = end
        return groups

    def chosen(self, wanted: Tensor) -> Tensor | None:
        """Row numbers of the live positions that `wanted: [B, T]` marks; None if all are."""
        flat = wanted.flatten()
        rows = (flat if self.places is None else flat[self.places]).nonzero()[:, 0]
        return rows if len(rows) < self.count else None


def _rows(lengths: tuple[int, ...], width: int) -> Rows:
    # In Python, since between the kernels' weights every operator's code comes from memory.
    ends = list(itertools.accumulate(lengths))
    batch = len(ends)
    pairs = [*zip([0, *ends], ends, strict=False)]
    # Whatever the default device is: what is kept serves later calls, too.
    bounds = torch.tensor(pairs, dtype=torch.int32, device="cpu").view(batch, 2)
    own_lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    places = None
    if batch and ends[-1] < batch * width:
        live = torch.arange(width, device="cpu") < own_lengths[:, None]
        places = live.flatten().nonzero()[:, 0]
    return Rows(batch, width, ends, bounds, own_lengths, places)


_kept_rows = kept(_rows)
