"""Operators: functions of tensors, on the CPU, on CUDA, and under `torch.compile`."""

from pynar.ops.divergence_cross_entropy import divergence_cross_entropy
from pynar.ops.interval_attention import interval_attention
from pynar.ops.intervals import (
    causal_intervals,
    interval_mask,
    padding_intervals,
    two_stream_intervals,
)
from pynar.ops.linear_argmax import linear_argmax
from pynar.ops.mask_predict_step import mask_predict_step
from pynar.ops.packed_layer import PackedLayer, packed_layer
from pynar.ops.packed_linear import PackedWeight, pack_linear, packed_linear

__all__ = [
    "PackedLayer",
    "PackedWeight",
    "causal_intervals",
    "divergence_cross_entropy",
    "interval_attention",
    "interval_mask",
    "linear_argmax",
    "mask_predict_step",
    "pack_linear",
    "packed_layer",
    "packed_linear",
    "padding_intervals",
    "two_stream_intervals",
]
