"""The definition of every operator in plain PyTorch; `pynar.ops` has the fast ones."""

from pynar.reference.mask_predict_step import mask_predict_step

__all__ = ["mask_predict_step"]
