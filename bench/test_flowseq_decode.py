"""A whole argmax decode of FlowSeq, base size, 32 tokens to 32, source ids to target ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import plain_flowseq
from bench.conftest import Case
from pynar.models import FlowSeq, build
from pynar.nn.flows import WeightNormLinear
from pynar.recipes import load_recipe

VOCABULARY, LENGTH = 32_000, 32


@cache
def base() -> FlowSeq:
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
    return model


@cache
def frozen(dtype: str) -> FlowSeq:
    return base().freeze(dtype)


def argmax(model: FlowSeq, source: Tensor, source_lengths: Tensor, lengths: Tensor) -> Tensor:
    """What `LatentArgmax` does, for given lengths."""
    memory = model.encode(source, source_lengths)
    noise = torch.zeros(len(source), int(lengths.max()), model.config.dim)
    z, _ = model.sample_prior(noise, lengths, memory)
    live = torch.ones(noise.shape[:2], dtype=torch.bool)
    tokens, _, _ = model.best(model.decode_latent(z, lengths, memory, live))
    return tokens.view(live.shape)


@pytest.mark.parametrize("implementation", ["frozen", "frozen int8", "not frozen", "plain PyTorch"])
@pytest.mark.parametrize("batch", [1, pytest.param(32, marks=pytest.mark.grid)])
def test_flowseq_argmax(
    run_case: Callable[[Case, str, Callable[..., Any]], None], batch: int, implementation: str
) -> None:
    """fp32 but where it says otherwise; tokens equal those of the plain formulation in fp32."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(10, VOCABULARY, (batch, LENGTH), generator=generator)
    lengths = torch.full((batch,), LENGTH)
    models: dict[str, Callable[[], FlowSeq]] = {
        "frozen": lambda: frozen("fp32"),
        "frozen int8": lambda: frozen("int8"),
        "not frozen": base,
    }
    function: Callable[..., Any] = lambda *args: plain_flowseq.argmax(base(), *args)  # noqa: E731
    reference = function
    if implementation in models:
        model = models[implementation]()
        function = lambda *args: argmax(model, *args)  # noqa: E731
        if implementation == "frozen int8":
            reference = function  # other tokens, now and then
    weights = sum(p.numel() for p in base().parameters())
    case = Case(
        operator="FlowSeq argmax decode",
        shape=f"B{batch}-T{LENGTH}",
        dtype=torch.float32,
        device=torch.device("cpu"),
        arguments=(source, lengths, lengths),
        reference=reference,
        bytes_moved=4 * weights,
    )
    run_case(case, implementation, function)
