"""`pynar.nn.flows` alone: the density of sequences whose true density is known.

    python examples/flow_density.py [UPDATES]

Sequences are sinh of a Gaussian process, correlated over steps and channels, with heavy tails. The
flow, which sees nothing but samples, gives an exact log-likelihood; the true one is the best that
any model can reach. It reads a source as in translation, here one state that means nothing.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pynar.nn.flows import Flow

STEPS, DIM, BATCH = 8, 8, 128


def make_truth() -> MultivariateNormal:
    """Correlations that fall with the distance of steps, and of channels."""
    steps, channels = torch.arange(STEPS), torch.arange(DIM)
    over_steps = 0.8 ** (steps[:, None] - steps).abs()
    over_channels = 0.6 ** (channels[:, None] - channels).abs()
    return MultivariateNormal(torch.zeros(STEPS * DIM), torch.kron(over_steps, over_channels))


def draw(truth: MultivariateNormal, count: int) -> tuple[Tensor, Tensor]:
    """Sequences `[count, STEPS, DIM]`, and their true log-densities `[count]`."""
    gaussian = truth.sample((count,))
    log_density = truth.log_prob(gaussian) - gaussian.cosh().log().sum(1)
    return gaussian.sinh().view(count, STEPS, DIM), log_density


def log_likelihood(flow: Flow, x: Tensor) -> Tensor:
    source = flow.project(torch.zeros(len(x), 1, DIM))
    lengths, ones = torch.full((len(x),), STEPS), torch.ones(len(x), dtype=torch.long)
    noise, logdet = flow(x, lengths, source, ones)
    numbers = STEPS * DIM
    return logdet - 0.5 * noise.square().sum((1, 2)) - 0.5 * numbers * math.log(2 * math.pi)


def main(updates: int) -> None:
    torch.manual_seed(0)
    truth = make_truth()
    flow = Flow(DIM, DIM, hidden=64, heads=2, steps=(2, 1), transform="nlsq")
    x, _ = draw(truth, 1024)
    lengths = torch.full((1024,), STEPS)
    source = flow.project(torch.zeros(1024, 1, DIM))
    flow.initialise(x, lengths, source, torch.ones(1024, dtype=torch.long))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    held_out, log_density = draw(truth, 2048)
    marginal = torch.distributions.Normal(0.0, 1.0)
    apart = marginal.log_prob(held_out.asinh()) - held_out.asinh().cosh().log()
    print(f"nats a number: truth {log_density.mean() / STEPS / DIM:.3f}, ", end="")
    print(f"numbers taken one by one {apart.mean():.3f}")
    for update in range(updates + 1):
        if update % max(updates // 5, 1) == 0:
            with torch.no_grad():
                found = log_likelihood(flow, held_out).mean() / STEPS / DIM
            print(f"update {update:5d}  flow {found:.3f}", flush=True)
        loss = -log_likelihood(flow, draw(truth, BATCH)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
