"""One split of a prepared directory: token ids in a memory-mapped Arrow file."""

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from pynar.data.manifest import CorpusError, Manifest, SplitInfo, check_sizes, verify

__all__ = ["Corpus", "CorpusWriter"]

IDS = pa.large_list(pa.field("item", pa.int32(), nullable=False))
SCHEMA = pa.schema(
    [pa.field("source", IDS, nullable=False), pa.field("target", IDS, nullable=False)]
)
SCHEMA_WITH_TEXT = SCHEMA.append(pa.field("source_text", pa.large_utf8(), nullable=False)).append(
    pa.field("target_text", pa.large_utf8(), nullable=False)
)


def _list_array(rows: Sequence[Sequence[int]]) -> pa.LargeListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=offsets[1:])
    flat = itertools.chain.from_iterable(rows)
    values = np.fromiter(flat, dtype=np.int32, count=int(offsets[-1]))
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), type=IDS)


class CorpusWriter:
    """Writes a split block by block; a context manager.

    The file is an Arrow IPC file with columns ``source`` and ``target``, large_list<int32>, and,
    ``with_text``, the strings ``source_text`` and ``target_text``: any Arrow reader can open it.
    """

    def __init__(self, path: str | os.PathLike[str], *, with_text: bool = False) -> None:
        self.path = Path(path)
        self._schema = SCHEMA_WITH_TEXT if with_text else SCHEMA
        self._sink = open(path, "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)

    def write(
        self,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        source_text: Sequence[str] = (),
        target_text: Sequence[str] = (),
    ) -> None:
        """Appends pairs of token ids, and their text where the file holds it."""
        if not len(source):
            return
        columns = [_list_array(source), _list_array(target)]
        if self._schema is SCHEMA_WITH_TEXT:
            columns += [pa.array(text, pa.large_utf8()) for text in (source_text, target_text)]
        with self._naming_the_file():
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        """Finishes the file."""
        if not self._sink.closed:
            with self._naming_the_file():
                self._writer.close()
                self._sink.close()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk, above all
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"cannot write {self.path}: {reason}") from error

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # of what is buffered; the first error is on its way already
                self._sink.close()


class Corpus:
    """Pairs of token ids, read from the disk as they are asked for.

    ``corpus[i]`` is (source ids, target ids), read-only int32 arrays without BOS and EOS that
    point into the mapped file. ``source_lengths`` and ``target_lengths`` are int32 [N].
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Wraps record batches with the columns of ``CorpusWriter``; see ``open``."""
        batches = [batch for batch in batches if batch.num_rows]
        self._batches = list(batches)
        self._starts = [0, *itertools.accumulate(batch.num_rows for batch in batches)]
        self._columns = [
            (*_numpy_list(batch.column(0)), *_numpy_list(batch.column(1))) for batch in batches
        ]
        self.source_lengths = _lengths([columns[0] for columns in self._columns])
        self.target_lengths = _lengths([columns[2] for columns in self._columns])
        self.info: SplitInfo | None = None
        self.digest: str | None = None

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], split: str, *, verify: bool = False
    ) -> "Corpus":
        """Opens a split ("train", "valid", "test") of a directory that ``prepare`` wrote.

        Sizes and counts are compared with the manifest; ``verify=True`` reads every file and
        compares its SHA-256 too. Raises ``CorpusError`` (a ``ValueError``) for data that is not
        what the manifest says, ``FileNotFoundError`` for a directory without manifest.
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        info = manifest.splits.get(split)
        if info is None:
            raise CorpusError(
                f"{directory} has no split {split!r}, only {', '.join(manifest.splits)}"
            )
        if verify:
            _verify(directory)
        check_sizes(directory, manifest)
        path = directory / info.file
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:  # that no array reaches beyond its part of the file
                batch.validate()
        except pa.ArrowException as error:
            raise CorpusError(f"{path} is damaged: {error}") from error
        if reader.schema not in (SCHEMA, SCHEMA_WITH_TEXT):
            raise CorpusError(f"{path} must have columns {SCHEMA.names}, got {reader.schema.names}")
        corpus = cls(batches)
        corpus._check(path, info)
        corpus.info = info
        corpus.digest = manifest.files[info.file].sha256
        return corpus

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> "Corpus":
        """Makes a corpus in memory from (source ids, target ids)."""
        columns = [_list_array([pair[side] for pair in pairs]) for side in (0, 1)]
        return cls([pa.record_batch(columns, schema=SCHEMA)])

    def _check(self, path: Path, info: SplitInfo) -> None:
        counts = (len(self), int(self.source_lengths.sum()), int(self.target_lengths.sum()))
        wanted = (info.pairs, info.source_tokens, info.target_tokens)
        if counts != wanted:
            raise CorpusError(
                f"{path} must hold {wanted[0]} pairs with {wanted[1]} source and {wanted[2]} "
                f"target tokens by its manifest, got {counts[0]}, {counts[1]} and {counts[2]}"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a corpus with {len(self)}")
        index %= len(self)
        block = bisect_right(self._starts, index) - 1
        return block, index - self._starts[block]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        block, row = self._locate(index)
        source_offsets, source, target_offsets, target = self._columns[block]
        return (
            source[source_offsets[row] : source_offsets[row + 1]],
            target[target_offsets[row] : target_offsets[row + 1]],
        )

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    @property
    def has_text(self) -> bool:
        """Whether the untokenised text is kept beside the ids."""
        return all(batch.num_columns == 4 for batch in self._batches)

    def text(self, index: int) -> tuple[str, str]:
        """Returns the untokenised source and target of a pair (validation and test splits).

        Raises ``ValueError`` where the split holds no text.
        """
        if not self.has_text:
            raise ValueError("this split holds no text: prepare keeps that of valid and test only")
        block, row = self._locate(index)
        batch = self._batches[block]
        return batch.column(2)[row].as_py(), batch.column(3)[row].as_py()


def _numpy_list(column: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    return (
        column.offsets.to_numpy(zero_copy_only=True),
        column.values.to_numpy(zero_copy_only=True),
    )


def _lengths(offsets: list[np.ndarray]) -> np.ndarray:
    parts = [np.diff(part).astype(np.int32) for part in offsets]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


# ``Corpus.open`` has an argument of the same name.
_verify = verify
