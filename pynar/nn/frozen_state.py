"""What a frozen decoder remembers of a batch: its source, and prefixes of its targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pynar.nn.live_rows import Rows
from pynar.nn.transformer import KeysValues

__all__ = ["FrozenCache", "FrozenMemory"]


@dataclass(frozen=True)
class FrozenMemory:
    """`Memory` of packed sentences: they keep their rows when others leave the batch."""

    all_states: Tensor  # [B, S, C]
    all_embedded: Tensor  # [B, S, C]
    lengths: Tensor  # [B], of the sentences still there
    bounds: Tensor  # int32 [B, 2], their rows
    source: Rows  # of all sentences
    keys_values: list[tuple[Tensor, Tensor]]  # per layer, [N, H, D] each
    index: Tensor | None = None  # of the sentences still there
    layouts: dict[Any, Any] | None = None

    @property
    def states(self) -> Tensor:
        return self.all_states if self.index is None else self.all_states[self.index]

    @property
    def embedded(self) -> Tensor:
        return self.all_embedded if self.index is None else self.all_embedded[self.index]

    def rows(self) -> tuple[KeysValues, Tensor]:
        """As `Memory.rows`: keys and values `[N, H, D]` of every layer, and sentences `[B, 2]`."""
        return self.keys_values, self.bounds

    def select(self, index: Tensor) -> FrozenMemory:
        """Keeps the sentences of `index`; nothing is copied."""
        return replace(
            self,
            lengths=self.lengths[index],
            bounds=self.bounds[index],
            index=index if self.index is None else self.index[index],
        )


class FrozenCache:
    """Keys and values of target prefixes, `[rows, capacity, 2 H, D]` for each layer.

    A row of the batch has a place, which it keeps when others leave; where a hypothesis goes on
    in several rows, all but one of them get a copy in a place that has become free.
    """

    def __init__(self, rows: int, layers: int, heads: int, dim: int) -> None:
        self.position = 0
        self.capacity = 16
        self.places = torch.arange(rows)
        self.data = [
            torch.empty(rows, self.capacity, 2 * heads, dim // heads) for _ in range(layers)
        ]
        self._locate()

    def _locate(self) -> None:
        start = self.places * self.capacity
        self.slots = start + self.position  # what this step writes
        self.sees = torch.stack([start, self.slots + 1], 1).int()[:, None]  # what it attends to
        self._ends = self.sees[:, 0, 1]

    def reserve(self) -> None:
        if self.position == self.capacity:
            self.capacity *= 2
            self.data = [torch.cat([part, torch.empty_like(part)], 1) for part in self.data]
            self._locate()

    def advance(self) -> None:
        self.position += 1
        self.slots += 1
        self._ends += 1

    def select(self, index: Tensor) -> None:
        """Makes row i go on from what was row `index[i]`."""
        wanted = self.places[index]
        chosen = wanted.tolist()
        taken = set(chosen)
        if len(taken) == len(chosen):
            self.places = wanted
        else:
            self.places = self._copied(chosen, taken)
        self._locate()

    def _copied(self, chosen: list[int], taken: set[int]) -> Tensor:
        """The places of rows of which several may go on from one of the `chosen` places."""
        free = [place for place in range(self.data[0].shape[0]) if place not in taken]
        seen: set[int] = set()
        sources, targets = [], []
        for row, place in enumerate(chosen):
            if place in seen:
                sources.append(place)
                targets.append(free.pop())
                chosen[row] = targets[-1]
            seen.add(place)
        for part in self.data:
            part[targets, : self.position] = part[sources, : self.position]
        return torch.tensor(chosen)
