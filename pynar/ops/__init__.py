"""Operators: functions of tensors, on the CPU, on CUDA, and under `torch.compile`."""

from pynar.ops.mask_predict_step import mask_predict_step

__all__ = ["mask_predict_step"]
