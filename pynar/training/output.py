"""The output directory of a run: checkpoints, the links `last` and `best`, and what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from pynar import checkpoint
from pynar.checkpoint import CheckpointError
from pynar.verification import MANIFEST

__all__ = ["RunDirectory"]


class RunDirectory:
    """The layout of a run on the disk.

    - `checkpoints/update-0000500/`: every kept checkpoint;
    - `last`, `best`: links to two of them;
    - `averaged/`: the mean of some, made at the end;
    - `tensorboard/`, `log.jsonl`: the figures.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def checkpoint(self, update: int) -> Path:
        return self.checkpoints / f"update-{update:07d}"

    def updates(self) -> list[int]:
        """The updates that have a checkpoint, in order."""
        found = self.checkpoints.glob("update-*/" + MANIFEST)
        names = (path.parent.name.removeprefix("update-") for path in found)
        return sorted(int(name) for name in names if name.isdigit())

    def tidy(self) -> None:
        """Removes what a killed process left half-written."""
        ours = [*self.path.glob(".*.tmp"), *self.path.glob(".*.old")]
        for path in [*self.checkpoints.glob(".*"), *ours]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def newest_good(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies; damaged newer ones are renamed, with a warning.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        updates = self.updates()
        problems = []
        for update in reversed(updates):
            path = self.checkpoint(update)
            try:
                checkpoint.verify(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for newer in updates[updates.index(update) + 1 :]:
                self._set_aside(self.checkpoint(newer))
            for problem in problems:
                warn(f"WARNING: {problem}")
            if problems:
                warn(f"WARNING: going back to {path}")
            return path
        if problems:
            raise CheckpointError(
                f"{self.checkpoints}: no checkpoint is good: {'; '.join(problems)}. Remove the "
                "directory to begin anew"
            )
        return None

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)

    def link(self, name: str, update: int) -> None:
        """Points `last` or `best` to a checkpoint, in one step."""
        temporary = self.path / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        # Relative, so that the run can be moved.
        temporary.symlink_to(self.checkpoint(update).relative_to(self.path))
        temporary.rename(self.path / name)

    def prune(self, keep: Iterable[int]) -> None:
        """Removes all checkpoints but those of the updates in `keep`."""
        keep = set(keep)
        for update in self.updates():
            if update not in keep:
                path = self.checkpoint(update)
                # Renamed first: what a killed process leaves of it must not look like a checkpoint.
                hidden = path.with_name(f".{path.name}.old")
                path.rename(hidden)
                shutil.rmtree(hidden)
