"""Gradients of our operators have no gradients of their own: asking for one is an error, not 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pynar.ops import (
    actnorm,
    affine_coupling,
    batched_logdet,
    causal_intervals,
    divergence_cross_entropy,
    flow_linear,
    head_linear,
    interval_attention,
    squeeze,
    squeeze_split,
    unsqueeze,
    unsqueeze_join,
)

LENGTHS = torch.tensor([4, 2])
ZEROS, EYE = torch.zeros(4), torch.eye(4)


def attend(x: Tensor) -> Tensor:
    y = interval_attention(x[:, None], x[:, None], x[:, None], causal_intervals(LENGTHS, 4))
    assert isinstance(y, Tensor)
    return y


def diverge(x: Tensor) -> Tensor:
    targets = torch.zeros(4, dtype=torch.int64)
    return divergence_cross_entropy(x, targets, pairs=[(0, 1)])[1]


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "actnorm": lambda x: actnorm(x, LENGTHS, ZEROS, ZEROS)[0],
    "affine_coupling": lambda x: affine_coupling(x, LENGTHS, x, x)[0],
    "batched_logdet": lambda x: batched_logdet(x + EYE)[0],
    "batched_logdet, inverse": lambda x: batched_logdet(x + EYE)[1],
    "divergence_cross_entropy": diverge,
    "flow_linear": lambda x: flow_linear(x, LENGTHS, ZEROS[None], ZEROS[None], EYE[None])[0],
    "head_linear": lambda x: head_linear(x, LENGTHS, EYE)[0],
    "interval_attention": attend,
    "squeeze": lambda x: squeeze(x, LENGTHS)[0],
    "squeeze_split": lambda x: squeeze_split(x, LENGTHS, 2)[1],
    "unsqueeze": lambda x: unsqueeze(x, 2 * LENGTHS),
    "unsqueeze_join": lambda x: unsqueeze_join(x[:, :2], x, LENGTHS),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_gradients_are_refused(operator: str) -> None:
    x = torch.randn(2, 4, 4, requires_grad=True)
    y = OPERATORS[operator](x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
