"""`pynar.nn.flows` alone: the density of sequences whose true density is known.

    python examples/flow_density.py [UPDATES]

Sequences are sinh of a Gaussian process, correlated over steps and channels, with heavy tails. The
flow, which sees nothing but samples, gives an exact log-likelihood; the true one is the best that
any model can reach. It reads a source as in translation, here one state that means nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pynar.nn.flows import Flow

STEPS, DIM, BATCH, HELD_OUT = 8, 8, 128, 1024


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


def conditions(flow: Flow, x: Tensor) -> tuple:
    """What a flow takes beside `x: [B, T, C]`: its lengths, and a source of one state."""
    ones = torch.ones(len(x), dtype=torch.long)
    return x.shape[1] * ones, flow.project(x.new_zeros(len(x), 1, DIM)), ones


def log_likelihood(flow: Flow, x: Tensor) -> Tensor:
    """log p(x) of `x: [B, T, C]`, `[B]`: that of its noise, and the log-determinant."""
    noise, logdet = flow(x, *conditions(flow, x))
    return logdet - 0.5 * (noise.square() + math.log(2 * math.pi)).sum((1, 2))


def make_flow(truth: MultivariateNormal) -> Flow:
    """A small flow, fitted to a batch."""
    flow = Flow(DIM, DIM, hidden=32, heads=2, steps=(1, 1), transform="nlsq")
    x, _ = draw(truth, 512)
    flow.initialise(x, *conditions(flow, x))
    return flow


def train(flow: Flow, truth: MultivariateNormal, updates: int) -> Iterator[int]:
    """Gives the number of updates before each one, and after the last."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in range(updates):
        yield update
        loss = -log_likelihood(flow, draw(truth, BATCH)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    yield updates


def main(updates: int) -> None:
    torch.manual_seed(0)
    truth = make_truth()
    flow = make_flow(truth)
    held_out, log_density = draw(truth, HELD_OUT)
    gaussian = held_out.asinh()
    apart = Normal(0.0, 1.0).log_prob(gaussian) - gaussian.cosh().log()
    print(f"nats a number: truth {log_density.mean() / STEPS / DIM:.3f}, ", end="")
    print(f"numbers taken one by one {apart.mean():.3f}")
    for update in train(flow, truth, updates):
        if update % max(updates // 5, 1) == 0:
            with torch.no_grad():
                found = log_likelihood(flow, held_out).mean() / STEPS / DIM
            print(f"update {update:5d}  flow {found:.3f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
