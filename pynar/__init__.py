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


def load(directory: str | os.PathLike[str], *, device: str = "cpu") -> Translator:
    """Reads a trained model: `pynar.load("runs/cmlm/best").translate(["Guten Tag."])`.

    Raises:
        OSError: the directory is no checkpoint, or damaged; the message names the file.
    """
    from pynar.checkpoint import load_model
    from pynar.decoding import Translator

    model, tokenizer = load_model(directory, device=device)
    return Translator(model, tokenizer)
