from __future__ import annotations

import pytest
import torch

from pynar.nn.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9999])
def test_each_element_is_dropped_with_its_probability_or_scaled(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    n = 400_001  # no multiple of the elements that share a random number
    y = Dropout(p)(torch.ones(n, dtype=dtype))
    dropped = y == 0
    assert y[~dropped].unique().numel() == 1
    torch.testing.assert_close(
        y[~dropped][0].item(), 1 / (1 - p), rtol=0.08 if p > 0.99 else 8e-3, atol=0
    )
    # Five standard deviations of a binomial distribution.
    assert abs(dropped.double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-17


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    n = 1 << 18
    kept = (Dropout(0.3)(torch.ones(n)) > 0).double()
    kept = (kept - 0.7) / (0.21**0.5)
    for apart in (1, 2, 3, 4, 8):
        assert abs((kept[apart:] * kept[:-apart]).mean().item()) < 5 / n**0.5


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 3, requires_grad=True)
    y = Dropout(0.4)(x.transpose(0, 1))
    grad = torch.randn_like(y)
    y.backward(grad)
    factor = (y / x.transpose(0, 1)).detach()
    torch.testing.assert_close(x.grad, (grad * factor).transpose(0, 1))


def test_seeds_decide_and_evaluation_changes_nothing() -> None:
    x, dropout = torch.randn(9, 5), Dropout(0.5)
    first, second = (_seeded(dropout, x, seed) for seed in (1, 1))
    assert torch.equal(first, second) and not torch.equal(first, _seeded(dropout, x, 2))
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.5)(torch.empty(0, 4)).shape == (0, 4)


def _seeded(dropout: Dropout, x: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    y: torch.Tensor = dropout(x)
    return y


def test_one_graph() -> None:
    dropout = Dropout(0.5)
    y = torch.compile(dropout, fullgraph=True)(torch.ones(64, 64))
    assert set(y.unique().tolist()) == {0.0, 2.0}
