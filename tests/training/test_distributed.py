import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import QUIET, UPDATES, Replayed, batches_of
from standin import StandIn, make_config, weights_of

from pynar import checkpoint
from pynar.training.devices import make_fabric
from pynar.training.update import Updater

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def output(request, data, tmp_path_factory):
    """What three gloo processes left; see distributed_worker.py."""
    output = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(data), str(output), request.param],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (output / "text.txt").write_text(done.stdout + done.stderr)
    return output


def test_three_processes_make_the_updates_of_one(output):
    config = make_config(schedule="constant", warmup_updates=0)
    updater = Updater(make_fabric(config), StandIn(QUIET).double(), config)
    for number in range(len(UPDATES)):
        updater.update(number + 1, [b for rank in range(3) for b in batches_of(rank, number)])
    found = json.loads((output / "updates.json").read_text())
    summary = updater.summary()
    assert found["losses"] == pytest.approx(summary.losses)
    assert found["tokens"] == summary.target_tokens
    for name, weight in weights_of(updater.model).items():
        theirs = torch.tensor(found["weights"][name], dtype=weight.dtype)
        torch.testing.assert_close(theirs, weight)


def test_the_prior_that_one_process_fits_is_that_of_all(output):
    """In update 3; the losses of update 4 are those of one process with all batches."""
    found = [json.loads((output / f"flowseq-{rank}.json").read_text()) for rank in range(3)]
    assert found[0]["digests"] == found[1]["digests"] == found[2]["digests"]
    config = make_config(schedule="constant", warmup_updates=0)
    updater = Updater(make_fabric(config), Replayed.make(), config)
    for number in range(2):
        updater.update(number + 3, [b for rank in range(3) for b in batches_of(rank, number)])
        summary = updater.summary()
    for one in found:
        assert one["losses"] == pytest.approx(summary.losses)
        assert one["norm"] == pytest.approx(summary.grad_norm)


@pytest.mark.parametrize("run", ["", "flowseq-"])
def test_three_processes_resume_bit_for_bit(output, run):
    whole, parts = output / f"{run}whole/last", output / f"{run}parts/last"
    torch.testing.assert_close(
        checkpoint.load_weights(parts), checkpoint.load_weights(whole), rtol=0, atol=0
    )
    states = [checkpoint.load_training_state(path) for path in (whole, parts)]
    torch.testing.assert_close(states[0].tensors, states[1].tensors, rtol=0, atol=0)
    assert states[0].values["settings"]["processes"] == 3
    assert states[0].values["progress"] == states[1].values["progress"]


def test_infinite_loss_of_one_process_stops_all_alike(output):
    errors = [(output / f"error-{rank}.txt").read_text() for rank in range(3)]
    assert errors[0] == errors[1] == errors[2]
    assert "stopped at update 6: 2 updates in a row" in errors[0]
    assert "`length` in 4 batches" in errors[0]


def test_odd_parameters(output):
    for rank in range(3):
        found = json.loads((output / f"odd-{rank}.json").read_text())
        # The model is whole again after training.
        assert found["tied"] == ["Parameter"] * 3
        assert found["same"]
        assert "every parameter must take part" in found["idle"]
        assert found["idle"].endswith("got no gradient for idle")
    weights = checkpoint.load_weights(output / "alias/last")
    assert weights["shift"].shape == (1, 8)
    assert torch.equal(weights["shift"], weights["same"])
    assert torch.equal(weights["fixed"], torch.ones(2, 3))


def test_only_one_process_talks(output):
    lines = (output / "text.txt").read_text().splitlines()
    assert sum(line.startswith("update 9/9  validation") for line in lines) == 2  # two runs
    assert not any("Warning" in line for line in lines)
