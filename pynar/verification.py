"""The manifest of a checkpoint: writing it, and comparing a directory with it."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "MANIFEST", "find_problem", "good_neighbour", "read_manifest", "seal"]

FORMAT = 1
CONFIG, WEIGHTS, MANIFEST = "config.yaml", "model.safetensors", "manifest.json"


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or must not be used."""


def seal(directory: Path) -> None:
    """Writes the manifest of the files in a directory, and brings all of it to the disk."""
    for path in directory.rglob("*.safetensors"):
        # The library makes its files for their owner alone.
        shutil.copymode(directory / CONFIG, path)
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in names
    }
    tensors = {WEIGHTS: _tensor_digests(directory / WEIGHTS)}
    content = {"format": FORMAT, "files": files, "tensors": tensors}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1))
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads the manifest; a `CheckpointError` says why it cannot."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: is not a checkpoint, it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{directory / MANIFEST}: is damaged ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise CheckpointError(f"{directory / MANIFEST}: is damaged (no list of files)")
    for name in content["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{directory / MANIFEST}: is damaged (it lists {name!r})")
    return content


def find_problem(directory: Path, *, training: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_manifest(directory)
        for needed in (CONFIG, WEIGHTS):
            if needed not in manifest["files"]:
                return f"{directory / MANIFEST}: is damaged (it does not list {needed})"
        for name, facts in manifest["files"].items():
            if name.startswith("training/") and not training:
                continue
            path = directory / name
            if not path.is_file():
                return f"{path}: is missing"
            if (size := path.stat().st_size) != facts["bytes"]:
                return f"{path}: has {size} bytes instead of {facts['bytes']}; it is damaged"
            if _sha256(path) != facts["sha256"]:
                return f"{path}: is damaged{_damaged_tensors(path, manifest)}: its SHA-256 differs"
    except CheckpointError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        return f"{directory}: cannot be verified ({error!r})"
    return None


def good_neighbour(directory: Path) -> Path | None:
    """The newest checkpoint beside this one that is whole, or None."""
    directory = directory.resolve()
    if not directory.parent.is_dir():
        return None
    neighbours = [path.parent for path in directory.parent.glob(f"[!.]*/{MANIFEST}")]
    others = [path for path in neighbours if path != directory and not path.is_symlink()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if find_problem(path, training=True) is None:
            return path
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _tensor_digests(path: Path) -> dict[str, str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # safetensors: the size of the header in 8 bytes, a JSON header, the tensors.
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        digests = {}
        for name, facts in header.items():
            begin, end = facts["data_offsets"]
            digests[name] = hashlib.sha256(data[start + begin : start + end]).hexdigest()
    return digests


def _damaged_tensors(path: Path, manifest: Mapping[str, Any]) -> str:
    wanted = manifest.get("tensors", {}).get(path.name)
    if not wanted:
        return ""
    try:
        found = _tensor_digests(path)
    except (ValueError, KeyError, TypeError):
        return " (in its header)"
    names = [name for name, digest in wanted.items() if found.get(name) != digest]
    return f" (in {', '.join(names[:3])}{' and others' if len(names) > 3 else ''})"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
