"""Argument checks of the references, in the words of the extension's (csrc/common/tensor.h)."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["Check"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Check:
    """Raises `ValueError`: *operator: `argument` must have …, got …*."""

    def __init__(self, operator: str) -> None:
        self.operator = operator

    def fail(self, name: str, wanted: str, got: object) -> NoReturn:
        raise ValueError(f"{self.operator}: `{name}` must {wanted}, got {got}")

    def dims(self, name: str, tensor: Tensor, wanted: int, symbols: str) -> None:
        if tensor.dim() != wanted:
            self.fail(name, f"have {wanted} dimensions {symbols}", f"shape {list(tensor.shape)}")

    def shape(self, name: str, tensor: Tensor, wanted: list[int], meaning: str) -> None:
        if list(tensor.shape) != wanted:
            self.fail(name, f"have shape {wanted} ({meaning})", list(tensor.shape))

    def dtype(self, name: str, tensor: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in wanted:
            self.fail(name, f"have dtype {' or '.join(map(_name, wanted))}", _name(tensor.dtype))

    def device(self, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
        if tensor.device != other.device:
            self.fail(name, f"be on {other.device} (device of `{other_name}`)", tensor.device)

    def cpu(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            self.fail(name, "be on cpu, where packed weights are used", tensor.device)

    def values(
        self, name: str, tensor: Tensor, wanted: str, lowest: int, highest: int | None = None
    ) -> None:
        """Checks one number a sentence; not on a GPU, which would have to be waited for."""
        if tensor.device.type != "cpu":
            return
        for sentence, value in enumerate(tensor.tolist()):
            if value < lowest or (highest is not None and value > highest):
                self.fail(name, f"have values {wanted}", f"{value} (sentence {sentence})")
