"""The definition of every operator in plain PyTorch; `pynar.ops` has the fast ones."""

from pynar.reference.actnorm import actnorm, actnorm_backward
from pynar.reference.affine_coupling import affine_coupling, affine_coupling_backward
from pynar.reference.batched_logdet import batched_logdet
from pynar.reference.divergence_cross_entropy import (
    divergence_cross_entropy,
    divergence_cross_entropy_backward,
)
from pynar.reference.flow_linear import (
    flow_linear,
    flow_linear_map,
    flow_linear_map_backward,
)
from pynar.reference.head_linear import head_linear
from pynar.reference.interval_attention import (
    interval_attention,
    interval_attention_backward,
    interval_mask,
)
from pynar.reference.linear_argmax import linear_argmax
from pynar.reference.mask_predict_step import mask_predict_step
from pynar.reference.packed_flow import packed_coupling
from pynar.reference.packed_layers import packed_layer
from pynar.reference.packed_linear import packed_linear, round_rows, round_weight
from pynar.reference.squeeze import squeeze, unsqueeze

__all__ = [
    "actnorm",
    "actnorm_backward",
    "affine_coupling",
    "affine_coupling_backward",
    "batched_logdet",
    "divergence_cross_entropy",
    "divergence_cross_entropy_backward",
    "flow_linear",
    "flow_linear_map",
    "flow_linear_map_backward",
    "head_linear",
    "interval_attention",
    "interval_attention_backward",
    "interval_mask",
    "linear_argmax",
    "mask_predict_step",
    "packed_coupling",
    "packed_layer",
    "packed_linear",
    "round_rows",
    "round_weight",
    "squeeze",
    "unsqueeze",
]
