"""A whole argmax decode of FlowSeq, base size, 32 tokens to 32, source ids to target ids.

On a GPU our decodes are captured graphs and the plain formulation is launched call by call, as its
authors do; in bfloat16 it is autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import plain_flowseq
from bench.conftest import Case, device_or_skip
from pynar.models import FlowSeq, build
from pynar.nn.flows import WeightNormLinear
from pynar.recipes import load_recipe

VOCABULARY, LENGTH = 32_000, 32


@cache
def base(place: torch.device) -> FlowSeq:
    torch.manual_seed(0)
    sizes = {"source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
    model = build({**load_recipe("flowseq_base").model, **sizes})
    assert isinstance(model, FlowSeq)
    model.eval()
    # Fitted to a batch, as when training begins: 120 couplings of random weights would magnify
    # the last bit of fp32 until tokens are left to chance, in every formulation.
    with torch.no_grad():
        source, lengths = torch.randint(10, VOCABULARY, (8, LENGTH)), torch.full((8,), LENGTH)
        memory = model.encode(source, lengths)
        z = torch.randn(8, LENGTH, model.config.dim)
        model.prior.initialise(z, lengths, model.prior.project(memory.states), lengths)
        for module in model.prior.modules():
            if isinstance(module, WeightNormLinear):
                module.gain.uniform_(0.02, 0.05)
    return model.to(place)


@cache
def frozen(place: torch.device, dtype: str) -> FlowSeq:
    return base(place).freeze(dtype)


def argmax(model: FlowSeq, source: Tensor, source_lengths: Tensor, lengths: Tensor) -> Tensor:
    """What `LatentArgmax` does, for given lengths of at most `LENGTH`."""
    memory = model.encode(source, source_lengths)
    noise = memory.states.new_zeros(len(source), LENGTH, model.config.dim)
    z, _ = model.sample_prior(noise, lengths, memory)
    live = lengths.new_ones(noise.shape[:2], dtype=torch.bool)
    tokens, _, _ = model.best(model.decode_latent(z, lengths, memory, live))
    return tokens.view(live.shape)


IMPLEMENTATIONS = {
    "cpu": ["frozen", "frozen int8", "not frozen", "plain PyTorch"],
    "cuda": ["frozen", "frozen bf16", "plain PyTorch", "plain PyTorch bf16"],
}
CASES = [
    pytest.param(device, name, marks=pytest.mark.cuda if device == "cuda" else ())
    for device, names in IMPLEMENTATIONS.items()
    for name in names
]
FEWER_BITS = ("int8", "bf16")


@pytest.mark.parametrize(("device", "implementation"), CASES)
@pytest.mark.parametrize("batch", [1, pytest.param(32, marks=pytest.mark.grid)])
def test_flowseq_argmax(
    run_case: Callable[..., None],
    device: str,
    batch: int,
    implementation: str,
) -> None:
    """fp32 but where it says otherwise; tokens equal those of the plain formulation in fp32."""
    place = device_or_skip(device)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(10, VOCABULARY, (batch, LENGTH), generator=generator).to(place)
    lengths = torch.full((batch,), LENGTH, device=place)
    plain = implementation.startswith("plain")
    bits = implementation.rpartition(" ")[2]

    def by_calls(*arguments: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=plain and bits == "bf16"):
            return plain_flowseq.argmax(base(place), *arguments)

    function: Callable[..., Any] = by_calls
    if not plain:
        model = base(place)
        if implementation != "not frozen":
            model = frozen(place, bits if bits in FEWER_BITS else "fp32")
        function = lambda *args: argmax(model, *args)  # noqa: E731
    case = Case(
        operator="FlowSeq argmax decode",
        shape=f"B{batch}-T{LENGTH}",
        dtype=torch.float32,
        device=place,
        arguments=(source, lengths, lengths),
        # With fewer bits other tokens, now and then.
        reference=function if bits in FEWER_BITS else by_calls,
        bytes_moved=4 * sum(p.numel() for p in base(place).parameters()),
        graph=not plain,
    )
    # A shared machine's speed drifts by more than what is asked for.
    turns = None if plain or implementation == "not frozen" else ("plain PyTorch", by_calls)
    run_case(case, implementation, function, turns)
