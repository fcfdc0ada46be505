"""The frozen flow against the flow it was made from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pynar.nn import frozen_flow
from pynar.nn.flows import ActNorm, Flow, WeightNormLinear
from pynar.nn.frozen_flow import FrozenFlow

DIM, SOURCE = 32, 12
SOURCE_LENGTHS = torch.tensor([5, 3])
LENGTHS = torch.tensor([8, 4, 12, 8])  # two for each source


def make_flow(**changes: object) -> Flow:
    torch.manual_seed(0)
    options = {"hidden": 24, "heads": 2, "steps": (1, 2, 1)} | changes
    flow = Flow(DIM, SOURCE, **options).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, WeightNormLinear):
                module.gain.uniform_(0.2, 0.4)
                module.bias.normal_(std=0.2)
            elif isinstance(module, ActNorm):
                module.bias.normal_(std=0.2)
    return flow


def run(flow: Flow | FrozenFlow, z: Tensor, source: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return flow(z, LENGTHS, flow.project(source), SOURCE_LENGTHS, inverse=inverse)  # type: ignore[no-any-return]


def make_inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 12, DIM), torch.randn(2, 5, SOURCE)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transform": "nlsq"},
        {"transform": "additive"},
        {"steps": (2,)},
        {"steps": (1, 1)},
        {"position_attention": False},
        {"heads": 4},
    ],
    ids=str,
)
def test_maps_as_the_flow_does(changes: dict[str, object], inverse: bool) -> None:
    flow = make_flow(**changes)
    z, source = make_inputs()
    live = torch.arange(12) < LENGTHS[:, None]
    want, logdet = run(flow, z, source, inverse)
    # What the padding holds does not matter.
    for padding in (0.0, torch.nan):
        dirty = torch.where(live[..., None], z, padding)
        read = torch.where((torch.arange(5) < SOURCE_LENGTHS[:, None])[..., None], source, 1e3)
        found, own = run(FrozenFlow(flow, torch.float32), dirty, read, inverse)
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own, logdet, rtol=1e-4, atol=1e-3)
        assert not found[~live].any()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("steps", "lengths"), [((1,), [1]), ((1,), [1, 0, 1, 1]), ((1, 1), [2]), ((1, 1), [0, 4, 2, 0])]
)
def test_shapes_at_the_edge(steps: tuple[int, ...], lengths: list[int], inverse: bool) -> None:
    """A single step, a single sentence, and rows without steps."""
    flow, (z, source) = make_flow(steps=steps), make_inputs()
    rows, width = torch.tensor(lengths), max(lengths)
    sources = source[: -(-len(lengths) // 2)]
    results = []
    for one in (flow, FrozenFlow(flow, torch.float32)):
        with torch.inference_mode():
            rest = one.project(sources), SOURCE_LENGTHS[: len(sources)]
            results.append(one(z[: len(rows), :width], rows, *rest, inverse=inverse))
    (want, logdet), (found, own) = results
    assert found.shape == (len(rows), width, DIM) and own.shape == rows.shape
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(own, logdet, rtol=1e-4, atol=1e-3)
    assert not found[rows == 0].any() and not own[rows == 0].any()


@pytest.mark.parametrize("transform", ["affine", "additive"])
def test_many_rows_of_the_source_are_projected_for_each_coupling(
    transform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = Flow(128, SOURCE, hidden=24, heads=2, steps=(1, 1), transform=transform).eval()
    for dtype in (torch.float32, torch.int8):
        _compare(FrozenFlow(wide, dtype), monkeypatch)


def _compare(flow: FrozenFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    z, source = torch.randn(4, 12, 128), make_inputs()[1]
    monkeypatch.setattr(frozen_flow, "ROWS_AT_ONCE", 256)
    want, logdet = run(flow, z, source, True)
    assert flow.by_panels
    monkeypatch.setattr(frozen_flow, "ROWS_AT_ONCE", 10)
    found, own = run(flow, z, source, True)
    assert torch.equal(found, want) and torch.equal(own, logdet)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.int8, 0.3)])
def test_fewer_bits_come_close(dtype: torch.dtype, limit: float) -> None:
    flow, (z, source) = make_flow(), make_inputs()
    want, logdet = run(flow, z, source, False)
    found, own = run(FrozenFlow(flow, dtype), z, source, False)
    assert (found - want).std() < limit * want.std()
    assert (own - logdet).abs().max() < limit * logdet.abs().max()


def test_sampling_undoes_encoding() -> None:
    flow, (z, source) = FrozenFlow(make_flow(), torch.float32), make_inputs()
    noise, logdet = run(flow, z, source, False)
    back, negative = run(flow, noise, source, True)
    live = torch.arange(12) < LENGTHS[:, None]
    torch.testing.assert_close(back[live], z[live], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(negative, -logdet, rtol=1e-4, atol=1e-3)


def test_recurrent_networks_have_no_packed_form() -> None:
    with pytest.raises(ValueError, match='`network` "attention", got "rnn"'):
        FrozenFlow(make_flow(network="rnn"), torch.float32)


def test_no_sentences_and_wrong_widths() -> None:
    flow = FrozenFlow(make_flow(), torch.float32)
    nothing = torch.zeros(0, dtype=torch.long)
    keys_values = flow.project(torch.zeros(0, 5, SOURCE))
    x, logdet = flow(torch.zeros(0, 8, DIM), nothing, keys_values, nothing)
    assert x.shape == (0, 8, DIM) and logdet.shape == (0,)
    keys_values = flow.project(torch.zeros(1, 5, SOURCE))
    with pytest.raises(ValueError, match="`z` must have a multiple of 4 steps, got 6"):
        flow(torch.zeros(1, 6, DIM), torch.tensor([4]), keys_values, torch.tensor([5]))
