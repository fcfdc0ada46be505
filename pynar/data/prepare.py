"""Parallel text in, a tokenizer and a memory-mapped corpus out."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pynar import __version__
from pynar.data.atomic import replace_directory, temporary_sibling
from pynar.data.corpus import CorpusWriter
from pynar.data.manifest import MANIFEST_FILE, FileInfo, Manifest, SplitInfo
from pynar.data.text import TextError, read_pairs
from pynar.data.tokenizer import Tokenizer, cpu_count
from pynar.symbols import UNK

__all__ = ["Pairs", "Progress", "prepare"]

PathLike = str | os.PathLike[str]
Pairs = PathLike | tuple[PathLike, PathLike]  # a TSV file, or source and target files
Progress = Callable[[str, int, int | None], None]  # stage, pairs done, pairs in all if known

Item = TypeVar("Item")
Result = TypeVar("Result")

# A block is encoded at once and becomes one record batch; bounded in pairs and in characters,
# so that neither many short nor some enormous lines need much memory.
BLOCK_PAIRS = 16_384
BLOCK_CHARACTERS = 4_000_000
# A line with more characters than this for each of ``max_length`` tokens is not even encoded:
# SentencePiece needs 50 bytes of memory a character, and its pieces have 16 characters at most
# unless it is told otherwise.
CHARACTERS_PER_TOKEN = 32
# The unigram trainer needs about 22 bytes of memory a byte of text: 0.9 GB for this much.
SAMPLE_BYTES = 40_000_000


def prepare(
    output: PathLike,
    *,
    train: Pairs,
    valid: Pairs | None = None,
    test: Pairs | None = None,
    vocab_size: int | None = None,
    tokenizer: PathLike | None = None,
    joint: bool = True,
    model_type: str = "unigram",
    character_coverage: float = 1.0,
    byte_fallback: bool = False,
    split_digits: bool = False,
    normalization: str = "identity",
    max_length: int = 256,
    max_ratio: float | None = None,
    sample_pairs: int = 1_000_000,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Encodes parallel text into the directory ``output`` and returns its manifest.

    A split is a pair of line-aligned files, or one TSV file with two columns; plain or gzipped;
    read as ``iter_lines`` says. ``output`` then holds ``manifest.json``, the tokenizer and one
    Arrow file a split, to be opened with ``Corpus.open``; it appears complete or not at all.

    The tokenizer is taken from ``tokenizer`` (a directory or model file), or trained with
    ``vocab_size`` pieces a model on a random sample of the training pairs, at most
    ``sample_pairs`` and 40 MB of text, that ``seed`` determines; ``joint``, ``model_type``,
    ``character_coverage``, ``byte_fallback``, ``split_digits`` and ``normalization`` are
    described at ``Tokenizer.train``.

    Pairs are left out, and counted by reason in the manifest, where a side is blank ("empty"),
    where a side has more than ``max_length`` tokens or 32 characters for each of them
    ("too_long"), and in training data alone where one side has more than ``max_ratio`` times the
    tokens of the other ("ratio"). The splits for validation and test keep their text beside the
    tokens.

    ``progress(stage, done, total)`` is called after each block of pairs. ``overwrite`` replaces an
    earlier prepared corpus, in one step; any other directory that is not empty is refused.

    Raises ``OSError`` for files that cannot be read or written; ``TextError`` for text that is not
    aligned UTF-8, naming file and line; ``ValueError`` for wrong options, a split without a single
    pair left, or a vocabulary that the text cannot fill.
    """
    output = Path(output)
    report = progress or (lambda stage, done, total: None)
    threads = cpu_count() if threads is None else threads
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError("prepare: give either vocab_size, to train a tokenizer, or tokenizer")
    limits = {"max_length": max_length, "sample_pairs": sample_pairs, "threads": threads}
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"prepare: {name} must be positive, got {value}")
    if max_ratio is not None and max_ratio < 1:
        raise ValueError(f"prepare: max_ratio must be at least 1, got {max_ratio}")
    given = {"train": train, "valid": valid, "test": test}
    splits = {name: _files(name, pairs) for name, pairs in given.items() if pairs is not None}
    _check_output(output, overwrite)
    trained_options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "joint": joint,
        "model_type": model_type,
        "character_coverage": character_coverage,
        "byte_fallback": byte_fallback,
        "split_digits": split_digits,
        "normalization": normalization,
    }

    with temporary_sibling(output) as directory:
        total = None
        if tokenizer is not None:
            model = Tokenizer.load(tokenizer)
        else:
            sources, targets, total = _sample(
                splits["train"], sample_pairs, seed, report, max_length * CHARACTERS_PER_TOKEN
            )
            report("train tokenizer", 0, None)
            model = Tokenizer.train(sources, targets, **trained_options)
            del sources, targets
        model.save(directory)
        infos = {}
        for name, files in splits.items():
            infos[name] = _encode_split(
                directory,
                name,
                files,
                model,
                max_length=max_length,
                max_ratio=max_ratio if name == "train" else None,
                threads=threads,
                progress=report,
                total=total if name == "train" else None,
            )
        names = [*model.files, *(info.file for info in infos.values())]
        manifest = Manifest(
            version=__version__,
            options={
                **(trained_options if tokenizer is None else {"tokenizer": os.fspath(tokenizer)}),
                "max_length": max_length,
                "max_ratio": max_ratio,
                "sample_pairs": sample_pairs,
                "seed": seed,
            },
            tokenizer={
                "joint": model.joint,
                "source_size": model.source_size,
                "target_size": model.target_size,
                "digest": model.digest,
                "files": list(model.files),
            },
            splits=infos,
            files={name: FileInfo.of(directory / name) for name in names},
        )
        manifest.save(directory)
        replace_directory(directory, output)
    return manifest


def _files(name: str, pairs: Pairs) -> tuple[str, ...]:
    paths = (pairs,) if isinstance(pairs, (str, os.PathLike)) else tuple(pairs)
    if len(paths) not in (1, 2):
        raise ValueError(
            f"prepare: {name} must be one TSV file or a source and a target file, "
            f"got {len(paths)} files"
        )
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"prepare: {name} file {os.fspath(path)} does not exist")
        if not os.path.isfile(path):
            raise TextError(
                f"prepare: {name} file {os.fspath(path)} must be a regular file, which is read "
                f"more than once"
            )
    return tuple(os.fspath(path) for path in paths)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"prepare: output {output} exists and is not a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"prepare: output {output} is not empty; overwrite=True replaces it")
    # Replacing deletes, so there must be nothing but what prepare itself wrote.
    if not (output / MANIFEST_FILE).is_file():
        raise FileExistsError(
            f"prepare: output {output} is not empty and no prepared corpus; it is not replaced"
        )
    written = {MANIFEST_FILE, *Manifest.load(output).files}
    if others := sorted(file.name for file in output.iterdir() if file.name not in written):
        raise FileExistsError(
            f"prepare: output {output} is not replaced, because it also holds {', '.join(others)}"
        )


def _sample(
    files: tuple[str, ...],
    sample_pairs: int,
    seed: int,
    progress: Progress,
    max_characters: int,
) -> tuple[list[str], list[str], int]:
    """Returns sources and targets of a uniform sample, in order, and the number of pairs read.

    Every pair draws a number and those with the smallest stay, as many as both limits allow.
    """
    rng = np.random.default_rng(seed)
    drawn: list[tuple[float, int, str, str]] = []  # draw, number of the pair, texts
    size = 0
    read = 0
    bound = 1.0  # what draws no less than this belong to is certain not to stay
    for block in _blocks(read_pairs(*files)):
        draws = rng.random(len(block))
        for i in np.flatnonzero(draws < bound).tolist():
            source, target = block[i]
            if _unusable(source, target, max_characters) is None:
                drawn.append((float(draws[i]), read + i, source, target))
                size += len(source.encode()) + len(target.encode())
        read += len(block)
        # Seldom, as it sorts; half as much again as is needed costs little memory.
        if len(drawn) > 1.5 * sample_pairs or size > 1.5 * SAMPLE_BYTES:
            size = _keep_smallest(drawn, sample_pairs)
            bound = drawn[-1][0]
        progress("sample", read, None)
    if not drawn:
        raise TextError(f"prepare: no pair of {' and '.join(files)} has text on both sides")
    _keep_smallest(drawn, sample_pairs)
    drawn.sort(key=lambda item: item[1])
    return [item[2] for item in drawn], [item[3] for item in drawn], read


def _keep_smallest(drawn: list[tuple[float, int, str, str]], sample_pairs: int) -> int:
    """Sorts pairs by their draws, cuts at the limits but for one pair, returns the bytes left."""
    drawn.sort()
    size = 0
    for count, (_, _, source, target) in enumerate(drawn):
        more = len(source.encode()) + len(target.encode())
        if count == sample_pairs or (count and size + more > SAMPLE_BYTES):
            del drawn[count:]
            break
        size += more
    return size


def _blocks(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups pairs into lists within BLOCK_PAIRS and, by a pair at most over, BLOCK_CHARACTERS."""
    block: list[tuple[str, str]] = []
    characters = 0
    for pair in pairs:
        block.append(pair)
        characters += len(pair[0]) + len(pair[1])
        if len(block) == BLOCK_PAIRS or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _encode_split(
    directory: Path,
    name: str,
    files: tuple[str, ...],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_ratio: float | None,
    threads: int,
    progress: Progress,
    total: int | None,
) -> SplitInfo:
    with_text = name != "train"
    skipped = Counter(empty=0, too_long=0, ratio=0)
    lengths: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    unknown = [0, 0]
    read = 0

    def usable(blocks: Iterable[list[tuple[str, str]]]) -> Iterator[list[tuple[str, str]]]:
        nonlocal read
        for block in blocks:
            read += len(block)
            texts = []
            for pair in block:
                reason = _unusable(*pair, max_length * CHARACTERS_PER_TOKEN)
                if reason is None:
                    texts.append(pair)
                else:
                    skipped[reason] += 1
            yield texts

    def encode(texts: list[tuple[str, str]]) -> list[list[list[int]]]:
        return [
            tokenizer.encode_source([source for source, _ in texts], threads=threads),
            tokenizer.encode_target([target for _, target in texts], threads=threads),
        ]

    with CorpusWriter(directory / f"{name}.arrow", with_text=with_text) as writer:
        for texts, ids in _one_ahead(encode, usable(_blocks(read_pairs(*files)))):
            sizes = np.array([[len(row) for row in side] for side in ids])
            reasons = _reasons(sizes, max_length, max_ratio)
            skipped.update(reason for reason in reasons.tolist() if reason)
            kept = np.flatnonzero(reasons == "")
            if len(kept) < len(texts):
                ids = [[side[i] for i in kept] for side in ids]
                texts = [texts[i] for i in kept]
            for side in (0, 1):
                lengths[side].update(sizes[side, kept].tolist())
                unknown[side] += sum(row.count(UNK) for row in ids[side])
            columns = tuple(zip(*texts, strict=True)) if with_text and texts else ((), ())
            writer.write(ids[0], ids[1], *columns)
            progress(f"encode {name}", read, total)
    pairs = lengths[0].total()
    if not pairs:
        raise TextError(
            f"prepare: no pair of {' and '.join(files)} is left for {name}: {read} read, "
            f"{skipped['empty']} empty, {skipped['too_long']} too long, {skipped['ratio']} by ratio"
        )
    return SplitInfo(
        file=f"{name}.arrow",
        read=read,
        pairs=pairs,
        skipped=dict(skipped),
        source_tokens=sum(length * count for length, count in lengths[0].items()),
        target_tokens=sum(length * count for length, count in lengths[1].items()),
        source_unknown=unknown[0],
        target_unknown=unknown[1],
        source_lengths={str(length): lengths[0][length] for length in sorted(lengths[0])},
        target_lengths={str(length): lengths[1][length] for length in sorted(lengths[1])},
        inputs={path: FileInfo.of(path) for path in files},
    )


def _one_ahead(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with its result; the next one's is worked out in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Item, Future[Result]] | None = None
        for item in items:
            future = pool.submit(function, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = item, future
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _unusable(source: str, target: str, max_characters: int) -> str | None:
    """Returns why a pair is left out before it is encoded, or None."""
    if len(source) > max_characters or len(target) > max_characters:
        return "too_long"
    return None if source.strip() and target.strip() else "empty"


def _reasons(sizes: np.ndarray, max_length: int, max_ratio: float | None) -> np.ndarray:
    """Returns why each pair is left out, or "", from the numbers of tokens [2, N]."""
    short, long = sizes.min(axis=0), sizes.max(axis=0)
    # Text can have no tokens at all: a line of U+2581, which SentencePiece takes for spaces.
    conditions = [short == 0, long > max_length]
    if max_ratio is not None:
        conditions.append(long > max_ratio * short)
    return np.select(conditions, ["empty", "too_long", "ratio"][: len(conditions)], default="")
