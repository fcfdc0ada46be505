"""What couplings do to a number, against their formulas and their Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pynar.nn.transforms import TRANSFORMS, nlsq

LENGTHS = torch.tensor([3, 1, 0])
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def make(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(3, 3, 4, dtype=torch.float64)
    return z, torch.randn(3, 3, TRANSFORMS[name].parameters * 4, dtype=torch.float64)


@every_transform
def test_back_and_forth_and_padding(name: str) -> None:
    z, parameters = make(name)
    live = (torch.arange(3) < LENGTHS[:, None])[..., None]
    dirty = z.masked_fill(~live, math.inf)
    y, logdet = TRANSFORMS[name].apply(dirty, LENGTHS, parameters)
    back, negative = TRANSFORMS[name].apply(y, LENGTHS, parameters, inverse=True)
    torch.testing.assert_close(back, z * live)
    torch.testing.assert_close(negative, -logdet)
    assert not y.masked_select(~live).any() and logdet[2] == 0
    assert not torch.equal(y[0], z[0])


@every_transform
@pytest.mark.parametrize("inverse", [False, True])
def test_log_determinants_and_gradients(name: str, inverse: bool) -> None:
    z, parameters = (x[:1].requires_grad_() for x in make(name))
    apply, length = TRANSFORMS[name].apply, LENGTHS[:1]
    jacobian = torch.autograd.functional.jacobian(
        lambda z: apply(z, length, parameters, inverse)[0], z
    )
    want = torch.linalg.slogdet(jacobian.view(12, 12))[1]
    torch.testing.assert_close(apply(z, length, parameters, inverse)[1][0], want)
    assert torch.autograd.gradcheck(lambda *x: apply(x[0], length, x[1], inverse), (z, parameters))


def test_nlsq_is_its_formula() -> None:
    z, parameters = make("nlsq")
    a, b, c, d, g = (float(part) for part in parameters[0, 0, ::4])
    b, d = math.exp(0.4 * b), math.exp(0.4 * d)
    c = (8 * math.sqrt(3) / 9 - 0.05) * b / d * math.tanh(0.3 * c)
    x = float(z[0, 0, 0])
    want = b * x + a + c / (1 + (d * x + g) ** 2)
    assert float(nlsq(z, LENGTHS, parameters)[0][0, 0, 0]) == pytest.approx(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_of_the_cubic_is_found_everywhere(dtype: torch.dtype) -> None:
    """Also where p or q of its reduced form is 0, and where the bump is steepest."""
    line = torch.cat([torch.linspace(-4, 4, 801), torch.tensor([3**0.5, 3e3, -3e3, 1e-4, 0.0])])
    for bump in (-1e9, -2.0, -1e-3, 0.0, 0.7, 1e9):
        z = line.to(dtype).view(1, -1, 1)
        zero = torch.zeros_like(z)
        parameters = torch.cat([zero, zero, zero + bump, zero, zero], -1)
        lengths = torch.tensor([z.shape[1]])
        y, _ = nlsq(z, lengths, parameters)
        assert (y.diff(dim=1)[:, :800] > 0).all()
        back, _ = nlsq(y, lengths, parameters, inverse=True)
        limit = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(back, z, rtol=limit, atol=limit)
