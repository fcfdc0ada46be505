import pytest
import torch
from standin import StandIn, StandInConfig, make_batch, make_config, weights_of

from pynar.data import Batch, collate
from pynar.training.devices import make_fabric
from pynar.training.seeds import TRAINING, seeds
from pynar.training.update import Updater

QUIET = StandInConfig(noise=0.0, dropout=0.0)
LENGTHS = [[3, 9], [7], [1, 1, 2], [12]]


def make_updater(model=None, **changes):
    config = make_config(**{"schedule": "constant", "warmup_updates": 0, **changes})
    return Updater(make_fabric(config), model or StandIn(QUIET).double(), config)


def make_batches():
    return [make_batch(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def join(batches):
    pairs = [
        (b.source[i, : b.source_lengths[i] - 1].numpy(), b.target[i, : b.target_lengths[i]].numpy())
        for b in batches
        for i in range(len(b))
    ]
    return collate(pairs, list(range(len(pairs))))


def objective(model, batch):
    example = model.corrupt(batch, torch.Generator())
    losses = model(example)
    return sum(w * losses[k] / example.counts[k] for k, w in model.loss_weights.items())


def test_accumulated_batches_equal_one_big_batch():
    several, one = make_updater(), make_updater()
    for number in (1, 2, 3):
        several.update(number, make_batches())
        one.update(number, [join(make_batches())])
    torch.testing.assert_close(weights_of(several.model), weights_of(one.model))
    ours, theirs = several.summary(), one.summary()
    assert ours.losses == pytest.approx(theirs.losses)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm)
    assert ours.target_tokens == theirs.target_tokens == 3 * 35


def test_gradient_is_that_of_the_weighted_token_means():
    updater = make_updater(clip_norm=None)
    model = StandIn(QUIET).double()
    objective(model, join(make_batches())).backward()
    updater.update(1, make_batches())
    moments, _ = updater.state()
    for name, parameter in model.named_parameters():
        # The first moment of Adam after one update.
        want = (1 - 0.9) * parameter.grad
        torch.testing.assert_close(moments[f"exp_avg/{name}"], want)


def test_clipping_is_by_the_norm_of_the_whole_gradient():
    updater, model = make_updater(clip_norm=0.01), StandIn(QUIET).double()
    objective(model, join(make_batches())).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    updater.update(1, make_batches())
    moments, _ = updater.state()
    want = (1 - 0.9) * model.hidden.weight.grad * 0.01 / norm
    torch.testing.assert_close(moments["exp_avg/hidden.weight"], want, rtol=1e-4, atol=0)
    assert updater.summary().grad_norm == pytest.approx(norm.item())


def test_an_empty_batch_changes_nothing():
    empty: Batch = collate([], [])
    with_empty, without = make_updater(), make_updater()
    with_empty.update(1, [empty, *make_batches()])
    without.update(1, make_batches())
    torch.testing.assert_close(weights_of(with_empty.model), weights_of(without.model))


def test_an_update_does_not_depend_on_what_was_drawn_before():
    results = []
    for disturb in (False, True):
        updater = make_updater(StandIn(StandInConfig(noise=0.5, dropout=0.5)))
        if disturb:
            torch.rand(17)
        updater.update(4, make_batches())
        results.append(weights_of(updater.model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_noise_differs_between_updates_ranks_and_batches():
    keys = [(s, TRAINING, u, r, b) for s in (1, 2) for u in (1, 2) for r in (0, 1) for b in (0, 1)]
    drawn = [seed for key in keys for seed in seeds(*key)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**63 for seed in drawn)
    assert seeds(1, TRAINING, 2, 3, 4) == seeds(1, TRAINING, 2, 3, 4)


class Broken(StandIn):
    """Gives infinite losses with finite gradients, or finite losses with NaN gradients."""

    broken = None

    def forward(self, example):
        losses = super().forward(example)
        if self.broken == "loss":
            losses["length"] = losses["length"] + torch.inf
        elif self.broken == "gradient":
            losses["token"] = losses["token"] + (self.hidden.bias.sum() * 0).sqrt()
        return losses


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_non_finite_update_is_skipped_and_counted(broken, precision):
    updater = make_updater(Broken(QUIET), precision=precision)
    updater.update(1, make_batches())
    weights, (state, _) = weights_of(updater.model), updater.state()
    state = {name: tensor.clone() for name, tensor in state.items()}
    updater.model.broken = broken
    updater.update(2, make_batches())
    updater.update(3, make_batches())
    torch.testing.assert_close(weights_of(updater.model), weights, rtol=0, atol=0)
    torch.testing.assert_close(updater.state()[0], state, rtol=0, atol=0)
    assert updater.streak() == 2
    summary = updater.summary()
    assert (summary.skipped, summary.streak) == (2, 2)
    assert summary.non_finite == ({"length": 8} if broken == "loss" else {})
    # The figures are those of the updates that were made.
    assert summary.counts == {"token": 35, "length": 7}
    assert all(abs(loss) < 100 for loss in summary.losses.values())
    updater.model.broken = None
    updater.update(4, make_batches())
    summary = updater.summary()
    assert (summary.skipped, summary.streak, summary.non_finite) == (2, 0, {})
    assert not torch.equal(weights["hidden.weight"], updater.model.hidden.weight)


def test_mixed_precision_keeps_weights_in_fp32_and_is_close():
    exact = make_updater(StandIn(QUIET))
    for precision in ("bf16", "fp16"):
        mixed = make_updater(StandIn(QUIET), precision=precision)
        mixed.update(1, make_batches())
        exact.update(1, make_batches())
        assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
        assert mixed.summary().loss == pytest.approx(exact.summary().loss, rel=0.02)
        exact = make_updater(StandIn(QUIET))


def test_loss_scale_is_part_of_the_state():
    updater = make_updater(Broken(QUIET), precision="fp16")
    updater.model.broken = "gradient"
    updater.update(1, make_batches())
    tensors, values = updater.state()
    other = make_updater(Broken(QUIET), precision="fp16")
    other.load_state(tensors, values)
    assert values["scale"] == other.state()[1]["scale"] == 2.0**15
    assert other.streak() == 1


def test_terms_must_agree():
    class Wrong(StandIn):
        def forward(self, example):
            return {"token": super().forward(example)["token"]}

    with pytest.raises(ValueError, match="Wrong: the losses must have the terms .* length, token"):
        make_updater(Wrong(QUIET)).update(1, make_batches())


def test_amsgrad_and_decay_reach_the_optimizer():
    updater = make_updater(amsgrad=True, weight_decay=0.1)
    updater.update(1, make_batches())
    assert any(name.startswith("max_exp_avg_sq/") for name in updater.state()[0])
    assert updater.optimizer.defaults["weight_decay"] == 0.1


def test_an_update_on_the_cpu_leaves_other_devices_alone(monkeypatch):
    # Of a device that is not in use, `torch.manual_seed` keeps every call for later.
    updater = make_updater()
    monkeypatch.setattr(torch, "manual_seed", None)
    updater.update(1, make_batches())
    assert updater.streak() == 0
