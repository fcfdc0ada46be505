"""The parent's side of a worker process: starting it, asking it, ending it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Worker", "WorkerError", "available_memory"]

# Not by `-m`, since the package itself imports the module.
_MODULE = "pynar.evaluation.benchmark.worker"
_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """A request failed; `dead` tells whether the process went with it."""

    def __init__(self, message: str, *, dead: bool = False) -> None:
        super().__init__(message)
        self.dead = dead


class Worker:
    """A process with its own number of threads; a context manager that leaves none behind."""

    def __init__(self, threads: int) -> None:
        self._log = tempfile.TemporaryFile()
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {_MODULE} import main; main()", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **dict.fromkeys(_POOLS, str(threads)), "PYTHONPATH": path},
            # Ctrl-C is for the parent, which then ends its workers.
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            WorkerError: the request failed, the process died, or `timeout` seconds went by, after
                which it is killed.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or self._process.poll() is not None:
            raise WorkerError(self._obituary(), dead=True)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._obituary(), dead=True) from None
        if not select.select([stdout], [], [], timeout)[0]:
            self.close()
            raise WorkerError(f"no answer within {timeout:.0f} s", dead=True)
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._obituary(), dead=True)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _obituary(self) -> str:
        if self._log.closed:
            return "the worker was ended"
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "the worker does not listen any more"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"status {code}"
        # Nobody but the kernel kills a worker that has not been asked to go.
        hint = ", as when memory runs out" if code == -9 else ""
        return f"the worker died with {how}{hint}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # what it was never to read


def available_memory() -> int | None:
    """Bytes that new processes can use without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return None
