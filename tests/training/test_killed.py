import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from standin import StandIn, make_config

from pynar import checkpoint
from pynar.training import train

HERE = Path(__file__).parent


@pytest.mark.slow
def test_killed_at_any_file_operation_it_goes_on_where_it_was(data, tmp_path):
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_worker.py"), str(data), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["status"] == 0 and facts["kills"] >= 4
    assert facts["warnings"] == []  # nothing half-written ever had the name of a checkpoint
    assert facts["reached"] == sorted(facts["reached"])  # and nothing was lost again
    settings = make_config(max_updates=3, checkpoint_every=1, keep_last=2)
    train(StandIn(), data, tmp_path / "whole", settings)
    states, files = [], []
    for name in ("whole", "run"):
        run = tmp_path / name
        last = run / "last"
        states.append((checkpoint.load_weights(last), checkpoint.load_training_state(last).tensors))
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        files.append((kept, last.readlink(), (run / "best").readlink()))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert files[0] == files[1]
