"""A model of which every process holds a share (FSDP2), for what needs more than its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Shards"]


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

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts tensors together that are cut as the parameters of their names, on all processes."""
        sizes = {name: self._rows(name) * self._all[name].shape[1:].numel() for name in tensors}
        padded = [F.pad(t.flatten(), (0, sizes[name] - t.numel())) for name, t in tensors.items()]
        mine = torch.cat(padded)
        everyone = mine.new_empty(self._processes, len(mine))
        torch.distributed.all_gather(list(everyone), mine)
        whole = {}
        for name, pieces in zip(tensors, everyone.split([*sizes.values()], 1), strict=True):
            shape = self._all[name].shape
            whole[name] = pieces.reshape(-1, *shape[1:])[: shape[0]]
        return whole

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This process's piece of what has the shape of a parameter."""
        first = torch.distributed.get_rank() * self._rows(name)
        return whole[first : first + self._rows(name)]

    def _rows(self, name: str) -> int:
        return -(-self._all[name].shape[0] // self._processes)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Has the model hold ordinary parameters meanwhile, on all processes.

        What is written into them is lost, unless `keep` takes it over.
        """
        self._root.reshard()  # after a forward pass alone the model still holds FSDP's
        places = [
            (module, name, share)
            for module in self._model.modules()
            for name, share in module.named_parameters(recurse=False)
        ]
        # Tied ones are one.
        whole = self.gather({name: share.to_local().detach() for name, share in self._all.items()})
        made = {
            id(share): nn.Parameter(whole[name], share.requires_grad)
            for name, share in self._all.items()
        }
        try:
            for module, name, share in places:
                setattr(module, name, made[id(share)])
            yield
        finally:
            for module, name, share in places:
                setattr(module, name, share)

    @torch.no_grad()
    def keep(self, parameters: Mapping[str, Tensor]) -> None:
        """Writes this process's pieces of whole parameters into its shares."""
        for name, parameter in parameters.items():
            self._all[name].to_local().copy_(self.cut(name, parameter))
