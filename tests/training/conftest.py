import random

import pytest
import torch
from standin import VOCABULARY

from pynar.data import prepare


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared directory with 200 training and 30 validation pairs."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 3))) for _ in range(30)]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(230)]
    paths = {}
    for split, part in (("train", lines[:200]), ("valid", lines[200:])):
        paths[split] = (folder / f"{split}.s", folder / f"{split}.t")
        paths[split][0].write_text("\n".join(part) + "\n")
        paths[split][1].write_text("\n".join(line[::-1] for line in part) + "\n")
    prepare(folder / "prepared", **paths, vocab_size=VOCABULARY)
    return folder / "prepared"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
