"""What tests and benchmarks share: tolerances, by device and dtype."""

from __future__ import annotations

from typing import TypedDict

import torch

__all__ = ["Tolerance", "tolerance"]


class Tolerance(TypedDict):
    rtol: float
    atol: float


# A result's error is that of its storage type, and of sums in float32 (float64 for float64) in
# another order. On a GPU the exponential is the hardware's, good to two units in the last place.
_TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "cpu": {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 1.6e-2,
    },
    "cuda": {
        torch.float64: 1e-12,
        torch.float32: 2e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 1.6e-2,
    },
}


def tolerance(device: torch.device | str, dtype: torch.dtype) -> Tolerance:
    """Returns `rtol` and `atol` for `torch.testing.assert_close` on results of this dtype.

    Example:
        >>> tolerance("cpu", torch.float32)
        {'rtol': 1e-05, 'atol': 1e-05}
    """
    kind = torch.device(device).type
    if kind not in _TOLERANCES:
        raise ValueError(f"device must be one of {', '.join(_TOLERANCES)}, got {kind}")
    if dtype not in _TOLERANCES[kind]:
        names = ", ".join(map(str, _TOLERANCES[kind]))
        raise ValueError(f"dtype must be one of {names}, got {dtype}")
    value = _TOLERANCES[kind][dtype]
    return {"rtol": value, "atol": value}
