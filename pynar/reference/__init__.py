"""The definition of every operator in plain PyTorch; `pynar.ops` has the fast ones."""

from pynar.reference.divergence_cross_entropy import (
    divergence_cross_entropy,
    divergence_cross_entropy_backward,
)
from pynar.reference.interval_attention import (
    interval_attention,
    interval_attention_backward,
    interval_mask,
)
from pynar.reference.linear_argmax import linear_argmax
from pynar.reference.mask_predict_step import mask_predict_step
from pynar.reference.packed_layer import packed_layer
from pynar.reference.packed_linear import packed_linear, round_rows, round_weight

__all__ = [
    "divergence_cross_entropy",
    "divergence_cross_entropy_backward",
    "interval_attention",
    "interval_attention_backward",
    "interval_mask",
    "linear_argmax",
    "mask_predict_step",
    "packed_layer",
    "packed_linear",
    "round_rows",
    "round_weight",
]
