"""Trains while being killed again and again: `kill_worker.py DATA OUTPUT`, see test_killed.py.

Every attempt is a forked process that sends itself SIGKILL at some file operation under OUTPUT,
a later or an earlier one each time.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
import torch.utils.tensorboard  # here, so that not every attempt imports it
from standin import StandIn, make_config

from pynar.training import train
from pynar.training.output import RunDirectory

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}


def attempt(data: Path, output: Path, operations: int) -> None:
    left = operations

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in EVENTS and str(output) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(StandIn(), data, output, make_config(max_updates=3, checkpoint_every=1, keep_last=2))


def main(data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    kills, reached, warnings = 0, [], []
    for _ in range(200):
        child = os.fork()
        if child == 0:
            attempt(data, output / "run", operations=rng.randint(10, 90))
            os._exit(0)
        rng.random()  # the next attempt draws another number
        _, status = os.waitpid(child, 0)
        directory = RunDirectory(output / "run")
        directory.newest_good(warnings.append)
        reached.append(max(directory.updates(), default=0))
        if not os.WIFSIGNALED(status):
            break
        kills += 1
    facts = {"kills": kills, "reached": reached, "warnings": warnings, "status": status}
    (output / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
