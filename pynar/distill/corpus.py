"""Sequence-level knowledge distillation: a corpus whose targets a teacher wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pynar.data import Corpus, CorpusWriter, FileInfo, Manifest, SplitInfo
from pynar.data.atomic import replace_directory, temporary_sibling, written
from pynar.decoding import LineTranslator, Strategy
from pynar.symbols import UNK

__all__ = ["distill"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Work:
    """The shards of one distillation; every process takes each `world_size`-th."""

    folder: Path
    pairs: int
    shard_size: int

    @property
    def count(self) -> int:
        return -(-self.pairs // self.shard_size)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.arrow"

    def rows(self, shard: int) -> range:
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.pairs))

    def done(self) -> int:
        return sum(self.path(shard).exists() for shard in range(self.count))


def distill(
    teacher: LineTranslator,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    strategy: Strategy,
    *,
    shard_size: int = 2000,
    max_tokens: int = 4096,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> Manifest | None:
    """Writes `output`, the prepared corpus `data` with the teacher's translations as targets.

    (Kim and Rush 2016; Zhou et al. 2020.) Only the split "train" is translated: validation and
    test data stay what they are. Shards are kept in `output` + ".partial" until all are there, so
    a killed run goes on where it was; several processes share the shards by `rank` and
    `world_size`, and the one that finds all of them done writes `output` and returns its
    manifest. The others return None.

    Pairs whose translation is empty are left out, and counted as "empty" in the manifest, which
    also holds the teacher's digest, the engine that ran it and the decoding options.

    Raises:
        ValueError: the teacher has another tokenizer than the data, or the shards that are there
            come from another teacher, other data or other options.
        FileExistsError: `output` exists.
    """
    data, output = Path(data), Path(output)
    if shard_size < 1:
        raise ValueError(f"distill: `shard_size` must be positive, got {shard_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"distill: `rank` must be in [0, {world_size}), got {rank}")
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it, or choose another output")
    corpus, source_manifest = Corpus.open(data, "train"), Manifest.load(data)
    if teacher.tokenizer.digest != source_manifest.tokenizer["digest"]:
        raise ValueError(
            f"distill: the teacher must have the tokenizer of {data}; prepare the data with "
            "`--tokenizer` of the teacher's checkpoint"
        )
    facts = {
        "teacher": teacher.digest,
        "engine": teacher.engine,
        "strategy": type(strategy).__name__,
        "options": dataclasses.asdict(strategy),  # type: ignore[call-overload]
        "data": corpus.digest,
        "shard_size": shard_size,
    }
    work = _Work(output.with_name(output.name + ".partial"), len(corpus), shard_size)
    _begin(work.folder, facts)
    for shard in range(rank, work.count, world_size):
        if not work.path(shard).exists():
            _translate_shard(teacher, strategy, corpus, work, shard, max_tokens)
        if progress is not None:
            progress(work.done(), work.count)
    if work.done() < work.count:
        return None
    manifest = _assemble(teacher, data, output, source_manifest, work, facts)
    shutil.rmtree(work.folder, ignore_errors=True)
    return manifest


def _begin(folder: Path, facts: dict[str, Any]) -> None:
    """Makes the folder of the shards, or checks that those in it belong to this distillation."""
    path = folder / "options.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with written(path) as stream:
            json.dump(facts, stream, indent=1)
    found = json.loads(path.read_text())
    different = [key for key in facts if found.get(key) != facts[key]]
    if different:
        raise ValueError(
            f"{folder} holds shards made with another {', '.join(different)}; remove it to begin "
            "anew"
        )


def _translate_shard(
    teacher: LineTranslator,
    strategy: Strategy,
    corpus: Corpus,
    work: _Work,
    shard: int,
    max_tokens: int,
) -> None:
    rows = work.rows(shard)
    sources = [corpus[i][0].tolist() for i in rows]
    results = teacher.decode_ids(sources, strategy, names=rows, max_tokens=max_tokens)
    targets = teacher.tokenizer.encode_target([result.text for result in results])
    temporary = work.folder / f".{work.path(shard).name}.{os.getpid()}"
    with CorpusWriter(temporary) as writer:
        writer.write(sources, targets)
    os.replace(temporary, work.path(shard))


def _assemble(
    teacher: LineTranslator,
    data: Path,
    output: Path,
    source: Manifest,
    work: _Work,
    facts: dict[str, Any],
) -> Manifest:
    lengths: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    unknown = [0, 0]
    train = source.splits["train"]
    with temporary_sibling(output) as directory:
        kept_files = [name for name in source.files if name != train.file]
        for name in kept_files:
            shutil.copyfile(data / name, directory / name)
        with CorpusWriter(directory / train.file) as writer:
            for shard in range(work.count):
                pairs = [(s.tolist(), t.tolist()) for s, t in _read(work.path(shard)) if len(t)]
                for side in (0, 1):
                    lengths[side].update(len(pair[side]) for pair in pairs)
                    unknown[side] += sum(pair[side].count(UNK) for pair in pairs)
                writer.write([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        pairs_kept = lengths[0].total()
        if not pairs_kept:
            raise ValueError("distill: every translation of the teacher is empty")
        split = SplitInfo(
            file=train.file,
            read=work.pairs,
            pairs=pairs_kept,
            skipped={"empty": work.pairs - pairs_kept},
            source_tokens=sum(length * n for length, n in lengths[0].items()),
            target_tokens=sum(length * n for length, n in lengths[1].items()),
            source_unknown=unknown[0],
            target_unknown=unknown[1],
            source_lengths={str(length): lengths[0][length] for length in sorted(lengths[0])},
            target_lengths={str(length): lengths[1][length] for length in sorted(lengths[1])},
            inputs={os.fspath(data / train.file): source.files[train.file]},
        )
        manifest = dataclasses.replace(
            source,
            options={**source.options, "distilled": facts},
            splits={**source.splits, "train": split},
            files={
                **{name: source.files[name] for name in kept_files},
                train.file: FileInfo.of(directory / train.file),
            },
        )
        manifest.save(directory)
        replace_directory(directory, output)
    return manifest


def _read(path: Path) -> Corpus:
    reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
    return Corpus([reader.get_batch(i) for i in range(reader.num_record_batches)])
