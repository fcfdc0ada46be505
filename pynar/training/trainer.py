"""The training loop."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from pynar import checkpoint
from pynar.checkpoint import TrainingState
from pynar.data import Batch, Batches, Corpus, Manifest, Tokenizer
from pynar.training.config import TrainingConfig
from pynar.training.devices import determinism, keep_freed_memory, make_fabric
from pynar.training.initialise import initialise
from pynar.training.non_finite import NonFiniteError, explain
from pynar.training.output import RunDirectory
from pynar.training.report import Report
from pynar.training.schedule import learning_rate
from pynar.training.update import Summary, Updater
from pynar.training.validation import Translate, Validator

__all__ = ["TrainingResult", "train"]
# Settings that may change when a run resumes without a word about it: the weights do not depend
# on them.
NEUTRAL = frozenset(
    "device validate_every validation_max_tokens validation_sentences checkpoint_every "
    "checkpoint_minutes keep_last keep_best average log_every non_finite_limit".split()
)


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended and what it left."""

    update: int
    skipped: int
    best_update: int | None
    best_score: float | None  # of `metric`: BLEU, or the negative loss
    last: Path
    best: Path | None
    averaged: Path | None


@dataclass
class Progress:
    """The part of the training state that is neither weights nor optimizer."""

    update: int = 0
    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    best: list[tuple[float, int]] = field(default_factory=list)  # (score, update), best first
    since_best: int = 0  # validations


def train(
    model: nn.Module,
    data_directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: TrainingConfig,
    *,
    init_from: str | os.PathLike[str] | None = None,
    resume: Literal["auto", "never", "always"] = "auto",
    translate: Translate | None = None,
) -> TrainingResult:
    """Trains `model` in place and writes checkpoints and figures to `output`.

    Runs on one device, or data-parallel in the processes that `torchrun` started. The same
    configuration and seed give the same weights bit for bit, however often the run was
    interrupted and resumed (on one machine, with the same number of processes). On a CPU the
    process keeps the memory it has freed (see `pynar.training.devices.keep_freed_memory`).

    Args:
        model: a model of `pynar.models`, or any module with `config`, `name`, `corrupt`,
            `loss_weights` and a `forward` from an example to loss sums; one that trains in phases
            may have `weights_at`, `begin_update` and `fits` as well, and one that has more to log
            at a validation `diagnose` (see `pynar.models.FlowSeq`).
        data_directory: what `pynar prepare` wrote; its split "valid" is used if there is one.
        output: see `pynar.training.output.RunDirectory` for the layout.
        init_from: a checkpoint whose weights a new run begins with, where name and shape agree.
        resume: "auto" continues the run in `output` if there is one, "always" insists on it,
            "never" insists on an empty `output`.
        translate: see `pynar.training.validation.Validator`; None leaves BLEU out.

    Raises:
        ValueError: options that do not fit each other, the data or the run to resume.
        CheckpointError: no checkpoint of the run to resume is good, or one cannot be written.
        NonFiniteError: `non_finite_limit` updates in a row had no finite loss or gradient.
    """
    if resume not in (modes := ("auto", "never", "always")):
        raise ValueError(f"`resume` must be one of {', '.join(modes)}, got {resume!r}")
    if config.metric == "bleu" and translate is None:
        raise ValueError("`metric: bleu` needs a `translate` function, got None")
    with determinism(config.deterministic):
        trainer = _Trainer(model, Path(data_directory), Path(output), config, translate)
        try:
            trainer.begin(resume, init_from)
            return trainer.run()
        finally:
            trainer.report.close()


class _Trainer:
    def __init__(
        self,
        model: nn.Module,
        data: Path,
        output: Path,
        config: TrainingConfig,
        translate: Translate | None,
    ) -> None:
        self.model, self.config, self.directory = model, config, RunDirectory(output)
        self.fabric = make_fabric(config)
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        self.tokenizer = Tokenizer.load(data)
        _check_vocabulary(model, self.tokenizer)
        self.batches = Batches(
            Corpus.open(data, "train"),
            max_tokens=config.max_tokens,
            seed=config.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )
        if not self.batches.batches_in_epoch(0):
            raise ValueError(f"{data}: the split `train` is empty")
        self.validator: Validator | None = None
        if "valid" in Manifest.load(data).splits:
            valid = Corpus.open(data, "valid")
            self.validator = Validator(self.fabric, config, valid, self.tokenizer, translate)
        self.progress = Progress()
        self.report = Report(output, active=self.fabric.is_global_zero)

    def begin(self, resume: str, init_from: str | os.PathLike[str] | None) -> None:
        """Finds the state to start from, and sets up what trains."""
        found: Path | None = None
        if self.fabric.is_global_zero:
            self.directory.tidy()
            found = self.directory.newest_good(self.report.say)
        found = self.fabric.broadcast(found)
        if resume == "always" and found is None:
            raise ValueError(f"`resume: always`: {self.directory.checkpoints} holds no checkpoint")
        if resume == "never" and found is not None:
            raise ValueError(
                f"`resume: never`: {self.directory.path} holds a run already; remove it, choose "
                "another output, or resume it"
            )
        state = checkpoint.restore(found, self.model) if found is not None else None
        if state is None and init_from is not None:
            taken = initialise(self.model, init_from)
            self.report.say(f"initialised from {init_from}: {taken}")
        # After the weights are loaded: DDP sends those of rank 0 to the others here.
        self.updater = Updater(self.fabric, self.model, self.config)
        if state is not None:
            self.report.say(f"resuming from {found}")
            self._resume(state)
            if self.fabric.is_global_zero:
                self._arrange()  # in case the process was killed before it came to that
        self.report.begin(total=self.config.max_updates, start=self.progress.update)
        self.report.record("begin", self.progress.update, config=dataclasses.asdict(self.config))

    def _resume(self, state: TrainingState) -> None:
        values = state.values
        self.updater.load_state(state.tensors, values["optimizer"])
        self.progress = Progress(**values["progress"])
        kept = self.directory.updates()
        best = [(score, u) for score, u in self.progress.best if u in kept]
        # The first process sees what it wrote; all of them go by it.
        self.progress.best = self.fabric.broadcast(best)
        now, then = self._settings(), {"parallel": "ddp", **values["settings"]}
        neutral = NEUTRAL
        if self.config.schedule not in ("linear", "cosine"):
            neutral = neutral | {"max_updates"}
        changed = [k for k, value in now.items() if then.get(k) != value and k not in neutral]
        if changed:
            self.report.say(
                "WARNING: not the settings that the run began with: "
                + ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in changed)
            )
        # The batches of an epoch are others now, so a place among them means nothing.
        if {"max_tokens", "seed", "processes", "corpus"} & set(changed):
            self.progress.epoch += 1
            self.progress.batch = 0
            self.report.say(
                f"the batches are others now: going on with epoch {self.progress.epoch}"
            )

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.config)
        settings["betas"] = list(settings["betas"])
        settings["processes"] = self.fabric.world_size
        settings["corpus"] = self.batches.corpus.digest
        return settings

    def run(self) -> TrainingResult:
        """Trains to the end."""
        config, progress, report = self.config, self.progress, self.report
        stream = self._stream()
        saved = progress.update
        self._checkpoint_time = time.monotonic()
        self.updater.module.train()
        self.updater.settle(next(self.batches.epoch(0)))
        while progress.update < config.max_updates and not self._out_of_patience():
            batches = []
            for _ in range(config.accumulate):
                progress.epoch, progress.batch, batch = next(stream)
                batches.append(batch)
            progress.update += 1
            self.updater.update(progress.update, batches)
            report.advance(progress.update)
            last = progress.update == config.max_updates
            self._log(last)
            entered = False
            if self.validator and (last or progress.update % config.validate_every == 0):
                entered = self._validate(self.validator)
            if entered or last or self._checkpoint_due():
                self._save()
                saved = progress.update
        # What the first process has written others may not see yet; all of them save together.
        if saved != progress.update or self.fabric.broadcast(not self.directory.updates()):
            self._save()
        return self._finish()

    def _stream(self) -> Iterator[tuple[int, int, Batch]]:
        """This process's batches from the present place on, each with the place after it."""
        epoch, start = self.progress.epoch, self.progress.batch
        while True:
            for i, batch in enumerate(self.batches.epoch(epoch, start=start), start + 1):
                yield epoch, i, batch
            epoch, start = epoch + 1, 0

    def _log(self, last: bool) -> None:
        update, config = self.progress.update, self.config
        # Reading the streak makes the host wait, which only a GPU minds.
        often = 1 if self.fabric.device.type == "cpu" else config.non_finite_limit
        if update % often == 0 and self.updater.streak() >= config.non_finite_limit:
            self._give_up(self.updater.summary())
        if last or update % config.log_every == 0:
            summary = self.updater.summary()
            if summary.streak >= config.non_finite_limit:
                self._give_up(summary)
            self.report.training(
                update,
                tokens=summary.target_tokens,
                epoch=self.progress.epoch,
                loss=summary.loss,
                **summary.losses,
                lr=learning_rate(config, update),
                grad_norm=summary.grad_norm,
                skipped=summary.skipped,
            )

    def _give_up(self, summary: Summary) -> NoReturn:
        update, updates = self.progress.update, self.directory.updates()
        last = self.directory.checkpoint(updates[-1]) if updates else None
        lr = learning_rate(self.config, update)
        raise NonFiniteError(explain(summary, self.config, update=update, lr=lr, last=last))

    def _validate(self, validator: Validator) -> bool:
        """Validates; returns whether this is one of the best so far."""
        config, progress, report = self.config, self.progress, self.report
        report.pause()
        figures = validator(self.updater)
        report.go_on()
        more = figures.more if figures.bleu is None else {**figures.more, "bleu": figures.bleu}
        report.validation(progress.update, loss=figures.loss, **figures.losses, **more)
        entry = (figures.score(config.metric), progress.update)
        better = not progress.best or entry[0] > progress.best[0][0]
        progress.since_best = 0 if better else progress.since_best + 1
        # A tie goes to the earlier one.
        ranked = sorted([*progress.best, entry], key=lambda item: (-item[0], item[1]))
        progress.best = ranked[: config.keep_best]
        return entry in progress.best

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.since_best >= patience

    def _checkpoint_due(self) -> bool:
        config, update = self.config, self.progress.update
        if update % config.checkpoint_every == 0:
            return True
        if config.checkpoint_minutes is None or update % config.log_every:
            return False
        # Clocks differ: rank 0 decides for all.
        minutes = (time.monotonic() - self._checkpoint_time) / 60
        return self.fabric.broadcast(minutes >= config.checkpoint_minutes)

    def _save(self) -> None:
        self._checkpoint_time = time.monotonic()
        state = self.updater.state()
        with self.updater.whole(only_first=True):
            if self.fabric.is_global_zero:
                self._write(*state)

    def _write(self, tensors: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        progress = self.progress
        self.report.pause()
        values = {
            "progress": dataclasses.asdict(progress),
            "optimizer": optimizer,
            "settings": self._settings(),
        }
        state = TrainingState(tensors, values)
        path = self.directory.checkpoint(progress.update)
        checkpoint.save(path, self.model, self.tokenizer, training_state=state)
        self._arrange()
        self.report.go_on()

    def _arrange(self) -> None:
        """Brings links, and what is kept, in line with the newest checkpoint."""
        directory, best = self.directory, [update for _, update in self.progress.best]
        directory.link("last", self.progress.update)
        if best:
            directory.link("best", best[0])
        directory.prune([*directory.updates()[-self.config.keep_last :], *best])

    def _finish(self) -> TrainingResult:
        config, progress, directory = self.config, self.progress, self.directory
        best = [update for _, update in progress.best]
        averaged = None
        if config.average != "none":
            averaged = directory.path / "averaged"
            chosen = best if config.average == "best" else directory.updates()[-config.keep_last :]
            if self.fabric.is_global_zero:
                checkpoint.average([directory.checkpoint(u) for u in sorted(chosen)], averaged)
                self.report.say(f"averaged updates {', '.join(map(str, sorted(chosen)))}")
        self.fabric.barrier()
        self.updater.end()
        return TrainingResult(
            update=progress.update,
            skipped=self.updater.skipped(),
            best_update=best[0] if best else None,
            best_score=progress.best[0][0] if best else None,
            last=directory.path / "last",
            best=directory.path / "best" if best else None,
            averaged=averaged,
        )


def _check_vocabulary(model: nn.Module, tokenizer: Tokenizer) -> None:
    for side in ("source", "target"):
        size, wanted = getattr(tokenizer, f"{side}_size"), f"{side}_vocabulary"
        if getattr(model.config, wanted, size) != size:
            raise ValueError(
                f"`{wanted}` of the model must be {size}, the size of the tokenizer of the data, "
                f"got {getattr(model.config, wanted)}"
            )
