"""Tensors from and to the files of the programs here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def write(path: Path, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    path.write_bytes(tensor.view(BITS.get(tensor.dtype, tensor.dtype)).numpy().tobytes())


def read(path: Path, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=like.dtype).reshape(like.shape)
