"""What each process of `torchrun` does in test_distributed.py.

`distributed_worker.py DATA OUTPUT PARALLEL`, where the last is how they share the work.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from standin import VOCABULARY, StandIn, StandInConfig, make_batch
from standin import make_config as make_standin_config

from pynar.data import collate
from pynar.decoding.translator import weights_digest
from pynar.models import FlowSeq, build
from pynar.training import NonFiniteError, train
from pynar.training.devices import make_fabric
from pynar.training.update import Updater

# The batches of every rank in two updates; an empty list is an empty batch.
UPDATES = [
    [[[3, 9], [7]], [[1, 1, 2], []], [[4], [2, 2]]],
    [[[1]], [[12, 2, 2, 5, 5]], [[]]],
]
QUIET = StandInConfig(noise=0.0, dropout=0.0)


def batches_of(rank: int, update: int) -> list:
    made = []
    for i, lengths in enumerate(UPDATES[update][rank]):
        made.append(make_batch(lengths, 10 * rank + i) if lengths else collate([], []))
    return made


def make_flowseq() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY, "dim": 16}
    layers = {"encoder_layers": 1, "posterior_layers": 1, "decoder_layers": 1, "heads": 2}
    flow = {"ffn_dim": 16, "flow_ffn_dim": 8, "flow_steps": [1, 1]}
    phases = {"posterior_updates": 2, "kl_warmup_updates": 2}
    return build({"model": "flowseq", **sizes, **layers, **flow, **phases})


class Replayed(FlowSeq):
    """Draws the same noise for a batch on whichever rank it is; without dropout, in fp64."""

    @staticmethod
    def make() -> torch.nn.Module:
        config = dataclasses.replace(make_flowseq().config, dropout=0.0)
        torch.manual_seed(0)
        return Replayed(config).double()

    def corrupt(self, batch, generator):
        example = super().corrupt(batch, generator.manual_seed(int(batch.source.sum())))
        return dataclasses.replace(example, noise=example.noise.double())


class OneSided(StandIn):
    """From its tenth batch on, on the last rank alone, has an infinite loss."""

    passes = 0

    def forward(self, example):
        losses = super().forward(example)
        self.passes += self.training
        if torch.distributed.get_rank() == 2 and self.passes > 9:
            losses["length"] = losses["length"] + torch.inf
        return losses


class Idle(StandIn):
    """Has a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = torch.nn.Parameter(torch.zeros(5))


class Alias(StandIn):
    """Has the same parameter under two names of one module, with fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1, 8))
        self.same = self.shift
        self.fixed = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)

    def forward(self, example):
        losses = super().forward(example)
        return losses | {"length": losses["length"] + (self.shift + self.same).square().sum()}


def echo(model, tokenizer, sentences):
    """A translation that only works with the whole model."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if type(parameter) is not torch.nn.Parameter:
                raise TypeError(f"a parameter is a {type(parameter).__name__}")
    return sentences


def main(data: Path, output: Path, parallel: str) -> None:
    torch.set_num_threads(1)

    def make_config(**changes):
        return make_standin_config(parallel=parallel, **changes)

    config = make_config(schedule="constant", warmup_updates=0)
    fabric = make_fabric(config)
    updater = Updater(fabric, StandIn(QUIET).double(), config)
    for number in range(2):
        updater.update(number + 1, batches_of(fabric.global_rank, number))
    summary = updater.summary()
    with updater.whole():
        weights = {k: v.tolist() for k, v in updater.model.state_dict().items()}
    if fabric.is_global_zero:
        facts = {"losses": summary.losses, "tokens": summary.target_tokens, "weights": weights}
        (output / "updates.json").write_text(json.dumps(facts))

    # Update 3 begins by fitting the prior, to another batch on every rank.
    updater, digests = Updater(fabric, Replayed.make(), config), []
    for number in range(2):
        updater.update(number + 3, batches_of(fabric.global_rank, number))
        with updater.whole():
            digests.append(weights_digest(updater.model))
        summary = updater.summary()
    facts = {"digests": digests, "losses": summary.losses, "norm": summary.grad_norm}
    (output / f"flowseq-{fabric.global_rank}.json").write_text(json.dumps(facts))

    alias = Alias()
    train(alias, data, output / "alias", make_config(max_updates=2))
    tied = [type(parameter).__name__ for parameter in (alias.shift, alias.same, alias.fixed)]
    try:
        train(Idle(), data, output / "idle", make_config(max_updates=2))
    except ValueError as error:
        facts = {"tied": tied, "same": alias.shift is alias.same, "idle": str(error)}
        (output / f"odd-{fabric.global_rank}.json").write_text(json.dumps(facts))

    # Wide enough for the grouping of the gradients to matter.
    wide = StandInConfig(dim=64)
    train(StandIn(wide), data, output / "whole", make_config(max_updates=9))
    for end in (4, 9):
        train(StandIn(wide), data, output / "parts", make_config(max_updates=end))
    # The prior takes part from the third update on, and is fitted to a batch there.
    by_bleu = {"translate": echo}
    train(make_flowseq(), data, output / "flowseq-whole", make_config(max_updates=5), **by_bleu)
    for end in (2, 5):
        config = make_config(max_updates=end)
        train(make_flowseq(), data, output / "flowseq-parts", config, **by_bleu)
    try:
        train(OneSided(), data, output / "stops", make_config(max_updates=30, non_finite_limit=2))
    except NonFiniteError as error:
        (output / f"error-{fabric.global_rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
