"""What a run tells: a live display, lines of text, `log.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

__all__ = ["Report"]


class Report:
    """Reports the progress of rank 0; on other ranks it is silent.

    A terminal gets a progress bar under the lines, anything else plain lines only.
    """

    def __init__(self, output: Path, *, active: bool) -> None:
        self._output, self._active = output, active
        self._progress: Progress | None = None
        self._opened = False

    def begin(self, *, total: int, start: int) -> None:
        """Opens the files and the display; before, only `say` works."""
        self._total = total
        if not self._active:
            return
        # Slow to import, and of use to rank 0 alone.
        from torch.utils.tensorboard import SummaryWriter

        self._output.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(self._output / "tensorboard"), purge_step=start + 1)
        path = self._output / "log.jsonl"
        _drop_partial_line(path)
        self._log = path.open("a", encoding="utf-8")
        self._opened = True
        self._timer = Timer(start)
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[figures]}"),
            )
            self._progress = Progress(*columns, console=Console(file=sys.stdout))
            self._task = self._progress.add_task(
                "training", total=total, completed=start, figures=""
            )
            self._progress.start()

    def advance(self, update: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=update)

    def training(self, update: int, *, tokens: float, **figures: Any) -> None:
        """Reports figures of the updates since the last report, the `loss` among them."""
        if not self._active:
            return
        seconds, updates = self._timer.lap(update)
        eta = (self._total - update) * seconds / max(updates, 1)
        speed = tokens / max(seconds, 1e-9)
        self.record("train", update, tokens_per_second=round(speed, 1), **figures)
        shown = [_figure(name, value) for name, value in figures.items() if name != "skipped"]
        if figures.get("skipped"):
            shown.append(f"skipped {figures['skipped']}")
        text = "  ".join([*shown, f"{_short(speed)} tokens/s", f"eta {_clock(eta)}"])
        if self._progress is not None:
            brief = f"loss {figures['loss']:.4g}  {_short(speed)} tokens/s  eta {_clock(eta)}"
            self._progress.update(self._task, completed=update, figures=brief)
        self.say(f"update {update}/{self._total}  {text}")

    def validation(self, update: int, **figures: Any) -> None:
        """Reports figures of a validation."""
        if not self._active:
            return
        self.record("valid", update, **figures)
        shown = "  ".join(_figure(name, value) for name, value in figures.items())
        self.say(f"update {update}/{self._total}  validation  {shown}")

    def record(self, event: str, update: int, **figures: Any) -> None:
        """Writes one line of `log.jsonl`, and the numbers to TensorBoard."""
        if not self._active:
            return
        # JSON has no NaN; a reader of the log gets null.
        plain = {k: v if _is_json(v) else None for k, v in figures.items()}
        line = {"event": event, "update": update, "time": round(time.time(), 3), **plain}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{event}/{name}", value, update)

    def pause(self) -> None:
        """Begins a time that does not count as training: validation, writing a checkpoint."""
        if self._active:
            self._timer.pause()

    def go_on(self) -> None:
        """Ends what `pause` began."""
        if self._active:
            self._timer.go_on()

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self._active:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the display and closes the files."""
        if not self._opened:
            return
        if self._progress is not None:
            self._progress.stop()
        self._board.close()
        self._log.close()


class Timer:
    """Seconds and updates between reports, without the pauses."""

    def __init__(self, update: int) -> None:
        self._update, self._begin, self._paused = update, time.perf_counter(), 0.0

    def lap(self, update: int) -> tuple[float, int]:
        now = time.perf_counter()
        seconds, updates = now - self._begin - self._paused, update - self._update
        self._update, self._begin, self._paused = update, now, 0.0
        return seconds, updates

    def pause(self) -> None:
        self._since = time.perf_counter()

    def go_on(self) -> None:
        self._paused += time.perf_counter() - self._since


def _drop_partial_line(path: Path) -> None:
    """Cuts off what a killed process left of its last line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _figure(name: str, value: Any) -> str:
    if name == "lr":
        return f"lr {value:.2e}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
