"""Operators: functions of tensors, on the CPU, on CUDA, and under `torch.compile`."""

from pynar.ops.actnorm import actnorm
from pynar.ops.affine_coupling import affine_coupling
from pynar.ops.batched_logdet import batched_logdet
from pynar.ops.divergence_cross_entropy import divergence_cross_entropy
from pynar.ops.flow_linear import flow_linear
from pynar.ops.head_linear import head_linear
from pynar.ops.interval_attention import interval_attention
from pynar.ops.intervals import (
    causal_intervals,
    interval_mask,
    packed_intervals,
    padding_intervals,
    two_stream_intervals,
)
from pynar.ops.linear_argmax import linear_argmax
from pynar.ops.mask_predict_step import mask_predict_step
from pynar.ops.packed_flow import (
    PackedActNorm,
    PackedCoupling,
    PackedFlowLinear,
    PackedPositions,
    packed_flow,
)
from pynar.ops.packed_layers import PackedLayer, packed_layers, packed_step
from pynar.ops.packed_linear import PackedWeight, pack_linear, packed_linear
from pynar.ops.squeeze import squeeze, squeeze_split, unsqueeze, unsqueeze_join

__all__ = [
    "PackedActNorm",
    "PackedCoupling",
    "PackedFlowLinear",
    "PackedLayer",
    "PackedPositions",
    "PackedWeight",
    "actnorm",
    "affine_coupling",
    "batched_logdet",
    "causal_intervals",
    "divergence_cross_entropy",
    "flow_linear",
    "head_linear",
    "interval_attention",
    "interval_mask",
    "linear_argmax",
    "mask_predict_step",
    "pack_linear",
    "packed_flow",
    "packed_intervals",
    "packed_layers",
    "packed_linear",
    "packed_step",
    "padding_intervals",
    "squeeze",
    "squeeze_split",
    "two_stream_intervals",
    "unsqueeze",
    "unsqueeze_join",
]
