"""PyNAR: non-autoregressive sequence generation for PyTorch."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynar.decoding import Translator

__all__ = ["__version__", "load"]

try:
    __version__ = version("pynar")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def load(
    directory: str | os.PathLike[str], *, device: str = "cpu", freeze: str | None = None
) -> Translator:
    """Reads a trained model: `pynar.load("runs/cmlm/best").translate(["Guten Tag."])`.

    `freeze` makes it fast: "fp32" (the same translations), "bf16" or "int8" (nearly the same);
    on a GPU "fp32", "bf16" or "fp16".

    Raises:
        OSError: the directory is no checkpoint, or damaged; the message names the file.
        ValueError: `freeze` is another, or not for this device.
    """
    from pynar.checkpoint import load_model
    from pynar.decoding import Translator

    model, tokenizer = load_model(directory, device=device)
    translator = Translator(model, tokenizer)
    return translator if freeze is None else translator.freeze(freeze)
