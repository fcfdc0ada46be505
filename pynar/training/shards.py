"""A model of which every process holds a share (FSDP2), for what needs more than its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Shards"]

_TOGETHER = 1 << 24  # numbers


class Shards:
    """The shares of this process in the parameters of a model that was sharded as a whole.

    A parameter `[N, ...]` is cut along N into as many pieces of ceil(N / processes) as there are;
    the last ones may be shorter, or nothing.

    Args:
        root: the module that `fully_shard` was called with; the parameters of `model` are its own.
    """

    def __init__(self, root: Any, model: nn.Module) -> None:
        self._root, self._model = root, model
        self._all: dict[str, DTensor] = {
            name: cast(DTensor, parameter) for name, parameter in model.named_parameters()
        }
        self._processes = torch.distributed.get_world_size()
        # What is trained, as ordinary tensors: operators on lists of DTensors take time that grows
        # with the square of their number.
        self.own = {
            name: nn.Parameter(share.to_local().detach())
            for name, share in self._all.items()
            if share.requires_grad
        }

    def take_gradients(self) -> None:
        """Hands the gradients of the last backward pass to the parameters in `own`."""
        for name, own in self.own.items():
            share = self._all[name]
            own.grad = None if share.grad is None else cast(DTensor, share.grad).to_local()
            share.grad = None

    def gather(
        self,
        tensors: Mapping[str, Tensor],
        *,
        only_first: bool = False,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Puts tensors together that are cut as the parameters of their names.

        All processes get them; with `only_first` the first one alone, and the others nothing. They
        go to `device`, if that is given, some at a time.
        """
        kept = not only_first or torch.distributed.get_rank() == 0
        whole: dict[str, Tensor] = {}
        for names in self._groups(tensors):
            sizes = [self._rows(name) * self._all[name].shape[1:].numel() for name in names]
            padded = [
                F.pad(tensors[name].flatten(), (0, size - tensors[name].numel()))
                for name, size in zip(names, sizes, strict=True)
            ]
            mine = torch.cat(padded)
            everyone = mine.new_empty(self._processes, len(mine))
            torch.distributed.all_gather(list(everyone), mine)
            for name, pieces in zip(names, everyone.split(sizes, 1), strict=True):
                shape = self._all[name].shape
                if kept:
                    found = pieces.reshape(-1, *shape[1:])[: shape[0]]
                    whole[name] = found.to(device or found.device, copy=True)
        return whole

    def _groups(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Names of parameters that go through memory together: not all of a model at once."""
        group: list[str] = []
        size = 0
        for name in names:
            more = self._all[name].numel()
            if group and size + more > _TOGETHER:
                yield group
                group, size = [], 0
            group.append(name)
            size += more
        if group:
            yield group

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's piece of what has the shape of a parameter."""
        first = torch.distributed.get_rank() * self._rows(name)
        return whole[first : first + self._rows(name)]

    def _rows(self, name: str) -> int:
        return -(-self._all[name].shape[0] // self._processes)

    @contextmanager
    def whole(self, *, only_first: bool = False) -> Iterator[None]:
        """Has the model hold ordinary parameters meanwhile; all processes must enter it together.

        With `only_first` that of the first process alone does. What is written into them is lost,
        unless `keep` takes it over.
        """
        places = self._make_whole(only_first)
        try:
            yield
        finally:
            for module, name, share in places:
                setattr(module, name, share)

    def dissolve(self) -> None:
        """Leaves the model whole for good, on all processes."""
        self._make_whole(only_first=False)

    def _make_whole(self, only_first: bool) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Returns where shares were."""
        self._root.reshard()  # after a forward pass alone the model still holds FSDP's
        places = [
            (module, name, share)
            for module in self._model.modules()
            for name, share in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        # Tied ones are one.
        shares = {name: share.to_local().detach() for name, share in self._all.items()}
        whole = self.gather(shares, only_first=only_first)
        if not whole:
            return []
        made = {
            id(share): nn.Parameter(whole.pop(name), share.requires_grad)
            for name, share in self._all.items()
        }
        for module, name, share in places:
            setattr(module, name, made[id(share)])
        return places

    @torch.no_grad()
    def keep(self, parameters: Mapping[str, Tensor]) -> None:
        """Writes this process's pieces of whole parameters into its shares."""
        for name, parameter in parameters.items():
            self._all[name].to_local().copy_(self.cut(name, parameter))
