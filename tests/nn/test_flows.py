"""The flow against its autograd Jacobian, its own inverse, and itself in other batches."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from pynar.nn.flows import ActNorm, ActNormLinear, Coupling, Flow, WeightNormLinear

DIM, SOURCE = 16, 12
every_network = pytest.mark.parametrize("network", ["attention", "rnn"])
LENGTHS = torch.tensor([8, 4])
SOURCE_LENGTHS = torch.tensor([5, 3])


def make_flow(**changes: object) -> Flow:
    torch.manual_seed(0)
    options = {"hidden": 8, "heads": 2, "steps": (1, 1, 1)} | changes
    flow = Flow(DIM, SOURCE, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, WeightNormLinear):
                module.gain.uniform_(0.2, 0.6)
                module.bias.normal_(std=0.3)
    return flow


def make_inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 8, DIM).double(), torch.randn(2, 5, SOURCE).double()


def run(
    flow: Flow, z: Tensor, lengths: Tensor, source: Tensor, **options: bool
) -> tuple[Tensor, Tensor]:
    return flow(z, lengths, flow.project(source), SOURCE_LENGTHS[: len(source)], **options)


def live(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width) < lengths[:, None]


@pytest.mark.parametrize("steps", [(1,), (2, 1), (1, 1, 1)])
@pytest.mark.parametrize("position_attention", [True, False])
@every_network
def test_sampling_undoes_encoding_and_pads_are_zero(
    steps: tuple[int, ...], position_attention: bool, network: str
) -> None:
    options = {"steps": steps, "position_attention": position_attention, "network": network}
    flow, (z, source) = make_flow(**options), make_inputs()
    noise, logdet = run(flow, z, LENGTHS, source)
    assert noise.shape == z.shape
    assert not noise[~live(LENGTHS, 8)].any() and (noise[live(LENGTHS, 8)] != 0).all()
    back, negative = run(flow, noise, LENGTHS, source, inverse=True)
    torch.testing.assert_close(back, z * live(LENGTHS, 8)[..., None])
    torch.testing.assert_close(negative, -logdet)


@pytest.mark.parametrize("transform", ["affine", "additive", "nlsq"])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_log_determinant_is_that_of_the_jacobian(inverse: bool, transform: str) -> None:
    compare_with_jacobian(make_flow(transform=transform), inverse)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"steps": (1,)}, 1),
        ({"steps": (1,)}, 3),
        ({"steps": (2, 1)}, 2),
        ({"steps": (1, 1), "position_attention": False}, 4),
    ],
    ids=str,
)
def test_the_log_determinant_of_other_shapes(changes: dict, length: int, inverse: bool) -> None:
    compare_with_jacobian(make_flow(**changes), inverse, length)


def test_the_log_determinant_of_recurrent_couplings() -> None:
    flow = make_flow(network="rnn", steps=(1, 1), position_attention=False)
    assert all(hasattr(m.net, "lstm") for m in flow.modules() if isinstance(m, Coupling))
    compare_with_jacobian(flow, inverse=False)


def compare_with_jacobian(flow: Flow, inverse: bool, length: int = int(LENGTHS[1])) -> None:
    z, source = make_inputs()
    keys_values = flow.project(source[1:])
    one = flow(z[1:, :length], torch.tensor([length]), keys_values, SOURCE_LENGTHS[1:])
    assert one[0].shape == (1, length, DIM) and one[1].shape == (1,)
    x = copies(z[1:, :length])
    lengths = torch.full((len(x),), length)
    y, logdet = flow(x, lengths, keys_values, SOURCE_LENGTHS[1:], inverse=inverse)
    torch.testing.assert_close(logdet, log_det_of_jacobian(y, x).expand_as(logdet))


def copies(x: Tensor) -> Tensor:
    """`x: [1, T, C]` as often as it has numbers."""
    return x.repeat(x.numel(), 1, 1).requires_grad_()


def log_det_of_jacobian(y: Tensor, x: Tensor) -> Tensor:
    """That of each row of `x`, copies of one, which give the gradient of one number of `y` each.

    So rows must not know of each other: `test_batch_mates_padding_and_nan_change_nothing`.
    """
    count = y[0].numel()
    asked = torch.eye(len(x), count).to(y).view_as(y)
    (jacobian,) = torch.autograd.grad(y, x, asked)
    return torch.linalg.slogdet(jacobian[:count].flatten(1))[1]


def inputs_of(flow: Flow, modules: Iterable[nn.Module]) -> tuple[list[tuple], Tensor]:
    """What the modules are given for copies of a sentence of 4, and log-dets `[N, levels]`."""
    z, source = make_inputs()
    seen: list[tuple] = []
    for module in modules:
        module.register_forward_hook(lambda module, arguments, output: seen.append(arguments))
    x = copies(z[1:, :4])
    rest = torch.full((len(x),), 4), flow.project(source[1:]), SOURCE_LENGTHS[1:]
    with torch.no_grad():
        noise, logdets = flow(x, *rest, by_level=True)
        _, negative = flow(noise, *rest, inverse=True, by_level=True)
    torch.testing.assert_close(negative, -logdets)
    return [(x.requires_grad_(), context) for x, context, *_ in seen[: len(seen) // 2]], logdets


@pytest.mark.parametrize("steps", [(1, 1), (1, 1, 1)])
def test_each_levels_log_determinant_is_that_of_its_own_jacobian(steps: tuple[int, ...]) -> None:
    flow = make_flow(steps=steps)
    seen, logdets = inputs_of(flow, [level[0] for level in flow.levels])
    assert len(seen) == logdets.shape[1] == len(steps)
    for level, (x, context), logdet in zip(flow.levels, seen, logdets.T, strict=True):
        first, *others = level  # type: ignore[misc]
        y, _ = first(x, context, squeeze=DIM // x.shape[2])
        for one in others:
            y, _ = one(y, context)
        torch.testing.assert_close(logdet, log_det_of_jacobian(y, x).expand_as(logdet))


@pytest.mark.parametrize("split", ["features", "alternate", "steps"])
@pytest.mark.parametrize("up", [True, False])
@every_network
def test_a_coupling_changes_one_half_by_the_other(network: str, up: bool, split: str) -> None:
    flow = make_flow(network=network, steps=(1, 1), position_attention=False)
    all_couplings = [m for m in flow.modules() if isinstance(m, Coupling)]
    one = next(m for m in all_couplings if (m.split, m.up) == (split, up))
    x, context = inputs_of(flow, [one])[0][0]
    y, logdet = one(x, context)
    torch.testing.assert_close(logdet, log_det_of_jacobian(y, x).expand_as(logdet))
    numbers = torch.arange(x[0].numel()).view(x.shape[1:])
    second = {
        "features": numbers % DIM >= DIM // 2,
        "alternate": numbers % 2 == 1,
        "steps": numbers // DIM % 2 == 1,
    }[split]
    assert torch.equal((y != x)[0], second if up else ~second)


@every_network
def test_a_row_without_steps_is_left_out(network: str) -> None:
    flow, (z, source) = make_flow(network=network), make_inputs()
    alone = LENGTHS[1:], flow.project(source[1:]), SOURCE_LENGTHS[1:]
    both = torch.tensor([0, 4]), flow.project(source), SOURCE_LENGTHS
    for inverse in (False, True):
        found, logdet = flow(z[:, :4], *both, inverse=inverse)
        wanted, own = flow(z[1:, :4], *alone, inverse=inverse)
        assert not found[0].any() and logdet[0] == 0
        torch.testing.assert_close(found[1:], wanted)
        torch.testing.assert_close(logdet[1:], own)


@every_network
def test_batch_mates_padding_and_nan_change_nothing(network: str) -> None:
    flow, (z, source) = make_flow(network=network), make_inputs()
    noise, logdet = run(flow, z, LENGTHS, source)
    dirty, dirty_source = z.clone(), source.clone()
    dirty[1, 4:] = math.nan
    dirty_source[1, 3:] = math.nan
    again, logdet_again = run(flow, dirty, LENGTHS, dirty_source)
    torch.testing.assert_close(again, noise, rtol=0, atol=0)
    back, _ = run(flow, dirty, LENGTHS, dirty_source, inverse=True)
    torch.testing.assert_close(back, run(flow, z, LENGTHS, source, inverse=True)[0])
    torch.testing.assert_close(logdet_again, logdet, rtol=0, atol=0)
    keys_values = flow.project(source[1:, :3])
    alone, logdet_alone = flow(z[1:, :4], LENGTHS[1:], keys_values, SOURCE_LENGTHS[1:])
    torch.testing.assert_close(alone[0], noise[1, :4])
    torch.testing.assert_close(logdet_alone[0], logdet[1])


@every_network
def test_candidates_share_their_source(network: str) -> None:
    flow, (_, source) = make_flow(network=network), make_inputs()
    torch.manual_seed(2)
    noise = torch.randn(6, 8, DIM).double()
    lengths = torch.tensor([8, 4, 8, 4, 8, 8])
    shared, logdet = run(flow, noise, lengths, source, inverse=True)
    repeated = flow.project(source.repeat_interleave(3, 0))
    each, logdet_each = flow(
        noise, lengths, repeated, SOURCE_LENGTHS.repeat_interleave(3), inverse=True
    )
    torch.testing.assert_close(shared, each)
    torch.testing.assert_close(logdet, logdet_each)


@every_network
def test_the_source_matters_and_every_parameter_has_a_gradient(network: str) -> None:
    flow, (z, source) = make_flow(network=network), make_inputs()
    noise, logdet = run(flow, z, LENGTHS, source)
    assert not torch.allclose(noise, run(flow, z, LENGTHS, source + 1)[0])
    (noise.square().sum() - logdet.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_network
def test_gradients_in_float64(network: str) -> None:
    flow, (z, source) = make_flow(steps=(1, 1), network=network), make_inputs()

    inputs = z[1:, :4].requires_grad_(), source[1:, :3].requires_grad_()
    short = torch.tensor([3])
    flow_source = flow.project(inputs[1])
    assert len(flow_source) == sum(isinstance(m, Coupling) for m in flow.modules())
    assert torch.autograd.gradcheck(
        lambda x, y: flow(x, LENGTHS[1:], flow.project(y), short), inputs, fast_mode=True
    )


@every_network
def test_initialisation_gives_live_steps_mean_0_and_variance_1(network: str) -> None:
    flow, (z, source) = make_flow(network=network), make_inputs()
    torch.manual_seed(3)
    lengths = torch.tensor([8, 4] * 32)
    z = 3 + 2 * torch.randn(64, 8, DIM).double()
    keys_values = flow.project(source)
    flow.initialise(z, lengths, keys_values, SOURCE_LENGTHS)
    seen = []

    def check(module: ActNorm, arguments: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, context = arguments
        y = output[0]
        if isinstance(module, ActNormLinear):  # without its matrix
            y = x * module.log_scale.exp() + module.bias
        rows = y[live(context.whole.lengths, y.shape[1])]
        torch.testing.assert_close(rows.mean(0), torch.zeros(DIM).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(rows.std(0, correction=0), torch.ones(DIM).double())
        seen.append(module)

    handles = [m.register_forward_hook(check) for m in flow.modules() if isinstance(m, ActNorm)]
    flow(z, lengths, keys_values, SOURCE_LENGTHS)
    assert len(seen) == len(handles) > 10
    # Networks are silent, so what is left are the affine maps and sigmoid(2) for each coupling.
    one = next(m for m in flow.modules() if isinstance(m, Coupling))
    assert not one.net.output.weight.any()


def test_initialisation_with_a_single_step_of_a_single_sentence() -> None:
    flow, (z, source) = make_flow(), make_inputs()
    keys_values = flow.project(source[:1])
    flow.initialise(z[:1, :4], torch.tensor([4]), keys_values, SOURCE_LENGTHS[:1])
    noise, logdet = flow(z[:1, :4], torch.tensor([4]), keys_values, SOURCE_LENGTHS[:1])
    assert noise.isfinite().all() and logdet.isfinite().all()


def test_the_shape_of_the_published_flow() -> None:
    """The 48 + 48 + 16 couplings of section 4, and the other kinds beside (facts of the code)."""
    flow = Flow(256, 256, hidden=512, heads=8)
    counts = [sum(isinstance(m, Coupling) for m in level) for level in flow.levels]
    assert counts == [48 + 2 + 1, 48 + 2 + 1, 16 + 2]
    matrices = [m for m in flow.modules() if isinstance(m, ActNormLinear)]
    assert len(matrices) == 20 and matrices[0].weight.shape == (32, 32)


def test_a_recurrent_coupling_by_hand() -> None:
    """The second half by what an LSTM and attention make of the first, section 3.2."""
    flow = make_flow(network="rnn", steps=(1,), position_attention=False)
    z, source = make_inputs()
    one = next(m for m in flow.modules() if isinstance(m, Coupling))
    seen: list[tuple] = []
    one.register_forward_hook(lambda *call: seen.append(call[1:]))
    keys_values = flow.project(source)
    flow(z, LENGTHS, keys_values, SOURCE_LENGTHS)
    (x, _), (found, logdet) = seen[0]
    shown = torch.arange(5) < SOURCE_LENGTHS[:, None, None]
    k, v = (part[:, 0] for part in keys_values[one.number])
    h = one.net.lstm(x[..., :8], LENGTHS)
    weights = (h @ k.transpose(1, 2)).masked_fill(~shown, -math.inf).softmax(-1)
    net = one.net.output(torch.cat([h, weights @ v], -1))
    scale = (net[..., 8:] + 2).sigmoid()
    here = live(LENGTHS, 8)
    torch.testing.assert_close(found[here][:, 8:], (scale * x[..., 8:] + net[..., :8])[here])
    torch.testing.assert_close(found[..., :8], x[..., :8])
    total = (scale.log() * here[..., None]).sum((1, 2))
    torch.testing.assert_close(logdet, total)


def test_the_positional_unit_attends_in_any_flow() -> None:
    flow = make_flow(network="rnn")
    for level in flow.levels:
        nets = [hasattr(m.net, "lstm") for m in level if isinstance(m, Coupling)]
        assert nets[:2] == [False, False] and len(nets) > 2 and all(nets[2:])


def test_weight_norm_fits_its_outputs() -> None:
    torch.manual_seed(0)
    linear, x = WeightNormLinear(6, 4), 5 + 3 * torch.randn(500, 6)
    linear.fit(x, 0.05)
    y = linear(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(0, correction=0), torch.full((4,), 0.05))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": ()}, "`steps` must be positive"),
        ({"heads": 3}, "multiple of `heads`"),
        ({"network": "cnn"}, "`network` must be one of attention, rnn, got 'cnn'"),
        ({"network": "rnn", "hidden": 7}, "`hidden` must be even"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow(DIM, SOURCE, **({"hidden": 8, "heads": 2} | change))


def test_a_width_that_cannot_be_squeezed() -> None:
    flow, (z, source) = make_flow(), make_inputs()
    with pytest.raises(ValueError, match=r"multiple of 4 steps, got 6"):
        run(flow, z[:, :6], torch.tensor([4, 4]), source)
