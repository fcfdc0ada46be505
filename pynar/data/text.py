"""Reads text by lines, the same way for training, translating and scoring."""

import codecs
import gzip
import hashlib
import io
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

__all__ = ["TextError", "iter_lines", "read_lines", "read_pairs", "sha256_file"]

BLOCK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"


class TextError(ValueError):
    """A text file that cannot be read as the line-aligned UTF-8 it should be."""


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not a text file")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"text file {path} does not exist") from None


def _blocks(stream: Any, name: str) -> Iterator[bytes]:
    """Yields pieces of a plain or gzipped stream as they arrive."""
    # The content decides, not the name: no UTF-8 text begins with these two bytes.
    if stream.peek(2)[:2] == GZIP_MAGIC:
        stream = gzip.GzipFile(fileobj=stream, mode="rb")
    while True:
        try:
            block = stream.read1(BLOCK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TextError(f"{name}: damaged or truncated gzip file ({error})") from error
        if not block:
            return
        yield block


def _decode(block: bytes, name: str, lines_before: int) -> list[str]:
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + block.count(b"\n", 0, error.start) + 1
        column = error.start - (block.rfind(b"\n", 0, error.start) + 1) + 1
        raise TextError(
            f"{name}: line {line} is not valid UTF-8 (byte {column} of the line is "
            f"0x{block[error.start]:02x}: {error.reason})"
        ) from None
    lines = text.split("\n")
    if "\r" in text:
        lines = [line.removesuffix("\r") for line in lines]
    return lines


def iter_lines(source: str | os.PathLike[str] | BinaryIO) -> Iterator[str]:
    r"""Yields the lines of a text one after the other, without their ends.

    A line ends at ``\n`` alone, and one ``\r`` before it is dropped; U+2028, U+0085, a lone
    ``\r`` or NUL are characters like others. A missing ``\n`` at the end of the last line and a
    byte order mark at the start of the file do not matter.

    ``source`` is a path, ``"-"`` for the standard input, or a binary stream; plain or gzipped,
    which the content tells, not the name. Lines of a pipe come as soon as they arrive.

    Raises ``OSError`` for a file that cannot be opened and ``TextError`` (a ``ValueError``),
    which names file and line, for invalid UTF-8 or a damaged gzip file.

    >>> list(iter_lines(io.BytesIO(b"one\r\ntwo \xe2\x80\xa8 still two\n\nfour")))
    ['one', 'two \u2028 still two', '', 'four']
    """
    if isinstance(source, (str, os.PathLike)):
        if os.fspath(source) == "-":
            yield from _lines(sys.stdin.buffer, "standard input")
            return
        with _open(Path(source)) as stream:
            yield from _lines(stream, os.fspath(source))
        return
    name = str(getattr(source, "name", "stream"))
    if hasattr(source, "peek"):
        yield from _lines(source, name)
        return
    buffered = io.BufferedReader(source)  # type: ignore[type-var]
    try:
        yield from _lines(buffered, name)
    finally:
        buffered.detach()  # or the caller's stream would be closed with it


def _lines(stream: Any, name: str) -> Iterator[str]:
    count = 0
    pending: list[bytes] = []  # pieces of an unfinished line, joined once, when its end is seen
    at_start = True
    for block in _blocks(stream, name):
        end = block.rfind(b"\n")
        if end < 0:
            pending.append(block)
            continue
        pending.append(block[:end])
        whole = b"".join(pending)
        if at_start:
            whole = whole.removeprefix(codecs.BOM_UTF8)
            at_start = False
        lines = _decode(whole, name, count)
        yield from lines
        count += len(lines)
        pending = [block[end + 1 :]] if end + 1 < len(block) else []
    last = b"".join(pending)
    if at_start:
        last = last.removeprefix(codecs.BOM_UTF8)
    if last:
        yield from _decode(last, name, count)


def read_lines(source: str | os.PathLike[str] | BinaryIO) -> list[str]:
    """Returns all lines of a text; see ``iter_lines``."""
    return list(iter_lines(source))


def read_pairs(
    source: str | os.PathLike[str], target: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, str]]:
    r"""Yields (source, target) of two line-aligned files, or of one file with two columns.

    With one file, the columns are separated by one tab. Raises ``TextError`` when the files have
    different numbers of lines (both are counted to the end and named) or when a line has not two
    columns, besides the errors of ``iter_lines``.
    """
    if target is None:
        for number, line in enumerate(iter_lines(source), start=1):
            columns = line.split("\t")
            if len(columns) != 2:
                raise TextError(
                    f"{source}: line {number} must have 2 columns separated by a tab, "
                    f"got {len(columns)}"
                )
            yield columns[0], columns[1]
        return
    sources, targets = iter_lines(source), iter_lines(target)
    count = 0
    for source_line in sources:
        target_line = next(targets, None)
        if target_line is None:
            _unequal(source, count + 1 + sum(1 for _ in sources), target, count)
        count += 1
        yield source_line, target_line
    rest = sum(1 for _ in targets)
    if rest:
        _unequal(source, count, target, count + rest)


def _unequal(source: object, source_count: int, target: object, target_count: int) -> NoReturn:
    raise TextError(
        f"source and target must have the same number of lines, got {source_count} in {source} "
        f"and {target_count} in {target}"
    )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
