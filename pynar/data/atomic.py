"""Files and directories that appear whole or not at all."""

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["replace_directory", "temporary_sibling", "written"]


def _fsync(path: Path) -> None:
    """Brings a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    # Not ``absolute()``: the parent of "." or "x/.." has a name only when resolved.
    path = path.resolve()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """Opens a text file to be written, which takes the place of ``path`` when it is whole.

    What is no file, such as a pipe, is written into.
    """
    if path.exists() and not path.is_file():
        with open(path, "w", encoding="utf-8", newline="\n") as stream:
            yield stream
        return
    temporary = _beside(path)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            yield stream
        os.replace(temporary, path.resolve())
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Makes a hidden directory beside ``path``, and removes it if it is still there at the end.

    A sibling, so that renaming it does not cross file systems. Raises the ``OSError`` that makes
    ``path`` unwritable before any work is done.
    """
    temporary = _beside(path)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write {path.resolve()}: {error.strerror}"
        ) from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(temporary: Path, path: Path) -> None:
    """Syncs a directory and renames it to ``path``, where it may replace another.

    On Linux the two exchange their names in one step, so that ``path`` always is a whole
    directory, the old or the new one. Elsewhere the old one is moved aside first, and back if the
    second step fails.
    """
    path = path.resolve()
    for file in temporary.rglob("*"):
        _fsync(file)
    _fsync(temporary)
    if not path.exists():
        os.rename(temporary, path)
    elif _exchange(temporary, path):
        shutil.rmtree(temporary)
    else:
        old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old)
    _fsync(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two directory entries with ``renameat2``; False where there is no such call."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    at_cwd, rename_exchange = -100, 2
    failed = library.renameat2(
        at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange
    )
    return failed == 0
