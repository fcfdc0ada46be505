"""The manifest of a prepared directory: what is in it, where it came from, and digests."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pynar.data.text import sha256_file

__all__ = ["CorpusError", "FileInfo", "Manifest", "SplitInfo", "verify"]

MANIFEST_FILE = "manifest.json"
FORMAT = "pynar-corpus"
FORMAT_VERSION = 1


class CorpusError(ValueError):
    """A prepared directory whose data is not what its manifest says."""


@dataclass(frozen=True)
class FileInfo:
    """Size and digest of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "FileInfo":
        """Reads a file and describes it."""
        return cls(bytes=os.path.getsize(path), sha256=sha256_file(path))


@dataclass(frozen=True)
class SplitInfo:
    """What a split holds; ``read`` = ``pairs`` + the sum of ``skipped``."""

    file: str
    read: int  # pairs in the input
    pairs: int  # pairs kept
    skipped: dict[str, int]  # reason -> pairs left out
    source_tokens: int
    target_tokens: int
    source_unknown: int  # tokens outside the vocabulary
    target_unknown: int
    source_lengths: dict[str, int]  # length in tokens -> pairs of that length
    target_lengths: dict[str, int]
    inputs: dict[str, FileInfo]  # path as given -> the input's size and digest


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    version: str  # of pynar
    options: dict[str, Any]
    tokenizer: dict[str, Any]  # joint, source_size, target_size, digest, files
    splits: dict[str, SplitInfo]
    files: dict[str, FileInfo] = field(default_factory=dict)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``manifest.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        with open(Path(directory) / MANIFEST_FILE, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1, ensure_ascii=False)
            stream.write("\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Manifest":
        """Reads ``manifest.json``.

        Raises ``FileNotFoundError`` where there is none and ``CorpusError`` for one that is
        damaged or of another format.
        """
        path = Path(directory) / MANIFEST_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{directory} is no prepared corpus: it has no {MANIFEST_FILE}; make one with "
                f"`pynar prepare`"
            ) from None
        except ValueError as error:
            raise CorpusError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CorpusError(f"{path} is not the manifest of a prepared corpus")
        if content.get("format_version") != FORMAT_VERSION:
            raise CorpusError(
                f"{path} must have format_version {FORMAT_VERSION}, got "
                f"{content.get('format_version')!r}; prepare the corpus again"
            )
        try:
            splits = {name: _split(info) for name, info in content["splits"].items()}
            files = {name: FileInfo(**info) for name, info in content["files"].items()}
            missing = {info.file for info in splits.values()} - set(files)
            if missing:
                raise CorpusError(f"{path} is damaged: it says nothing about {sorted(missing)}")
            return cls(content["version"], content["options"], content["tokenizer"], splits, files)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{path} is damaged: {error!r}") from error


def _split(info: dict[str, Any]) -> SplitInfo:
    inputs = {path: FileInfo(**file) for path, file in info["inputs"].items()}
    return SplitInfo(**{**info, "inputs": inputs})


def check_sizes(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Compares the sizes of all files with the manifest; raises ``CorpusError``."""
    for name, info in manifest.files.items():
        path = Path(directory) / name
        if not path.is_file():
            raise CorpusError(f"{path} is in the manifest but does not exist")
        if path.stat().st_size != info.bytes:
            raise CorpusError(
                f"{path} must have {info.bytes} bytes by its manifest, got {path.stat().st_size}"
            )


def verify(directory: str | os.PathLike[str]) -> Manifest:
    """Compares size and SHA-256 of all files of a prepared directory with its manifest.

    Raises ``CorpusError`` that names the first file which differs.
    """
    manifest = Manifest.load(directory)
    check_sizes(directory, manifest)
    for name, info in manifest.files.items():
        found = sha256_file(Path(directory) / name)
        if found != info.sha256:
            raise CorpusError(
                f"{Path(directory) / name} must have SHA-256 {info.sha256} by its manifest, got "
                f"{found}"
            )
    return manifest
