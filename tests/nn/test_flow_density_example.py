"""examples/flow_density.py: its likelihood against autograd, and that it learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.distributions import Normal

EXAMPLE = Path(__file__).parents[2] / "examples" / "flow_density.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flow_density", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_likelihood_is_that_of_the_jacobian(example: ModuleType) -> None:
    flow = example.make_flow(example.make_truth()).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # Each of 16 equal rows gives the gradient of one of their 16 numbers.
    x = torch.randn(1, 2, 8).double().repeat(16, 1, 1).requires_grad_()
    noise, _ = flow(x, *example.conditions(flow, x))
    (jacobian,) = torch.autograd.grad(noise, x, torch.eye(16).double().view_as(x))
    logdet = torch.linalg.slogdet(jacobian.view(16, 16))[1]
    expected = Normal(0.0, 1.0).log_prob(flow(x, *example.conditions(flow, x))[0]).sum((1, 2))
    torch.testing.assert_close(example.log_likelihood(flow, x), expected + logdet)


def test_a_few_updates_find_correlations(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "BATCH", 32)
    truth = example.make_truth()
    flow = example.make_flow(truth)
    held_out, log_density = example.draw(truth, 128)
    found = []
    for update in example.train(flow, truth, 8):
        if update in (0, 8):
            with torch.no_grad():
                found.append(example.log_likelihood(flow, held_out).mean())
    assert found[0] < found[1] < log_density.mean()


def test_the_truth_is_a_density_of_what_it_draws(example: ModuleType) -> None:
    """Of the numbers one by one: p(x) = N(asinh x) / sqrt(1 + x^2)."""
    independent = torch.distributions.MultivariateNormal(
        torch.zeros(example.STEPS * example.DIM), torch.eye(example.STEPS * example.DIM)
    )
    x, log_density = example.draw(independent, 5)
    expected = Normal(0.0, 1.0).log_prob(x.asinh()) - 0.5 * (1 + x.square()).log()
    torch.testing.assert_close(log_density, expected.sum((1, 2)), rtol=1e-4, atol=1e-3)
