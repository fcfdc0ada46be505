"""Checkpoints: directories that are written whole or not at all, and verified when read.

    config.yaml          format, version of PyNAR, and the configuration of the model
    model.safetensors    weights; tied ones once
    (tokenizer files)    what `Tokenizer.save` writes
    training/            only where training can resume: optimizer.safetensors, state.json
    manifest.json        size and SHA-256 of every file, SHA-256 of every weight

A checkpoint is written under a temporary name beside its own, synced to the disk and renamed, so
a process killed at any moment leaves the old state or the new one. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from pynar.data.atomic import replace_directory, temporary_sibling

__all__ = [
    "CheckpointError",
    "TrainingState",
    "average",
    "from_pretrained",
    "load_model",
    "load_training_state",
    "load_weights",
    "read_config",
    "restore",
    "save",
    "save_pretrained",
    "unique_tensors",
    "verify",
]

FORMAT = 1
CONFIG, WEIGHTS, MANIFEST = "config.yaml", "model.safetensors", "manifest.json"
TRAINING_TENSORS, TRAINING_VALUES = "training/optimizer.safetensors", "training/state.json"


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or must not be used."""


@dataclass(frozen=True)
class TrainingState:
    """What training needs beyond the weights in order to resume: tensors, and plain values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def save(
    directory: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Any | None,
    *,
    training_state: TrainingState | None = None,
) -> None:
    """Writes a checkpoint, replacing one that is already there.

    Args:
        directory: where; its parent is made if need be.
        model: has a dataclass `config` and a `name`, as every model of `pynar.models`.
        tokenizer: a `Tokenizer`, or None for a model that has none.
        training_state: given where training should be able to resume from here.

    Raises:
        CheckpointError: the disk is full or not writable; an older checkpoint of the name stays.
    """
    with _writing(Path(directory)) as temporary:
        settings = {"model": type(model).name, **dataclasses.asdict(model.config)}
        _write_config(temporary, settings)
        tensors = {name: tensor.contiguous() for name, tensor in unique_tensors(model).items()}
        safetensors.torch.save_file(tensors, temporary / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save(temporary)
        if training_state is not None:
            (temporary / "training").mkdir()
            safetensors.torch.save_file(training_state.tensors, temporary / TRAINING_TENSORS)
            (temporary / TRAINING_VALUES).write_text(json.dumps(training_state.values, indent=1))


def load_model(
    directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any]:
    """Verifies and reads a checkpoint: the model, in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it, and the newest good
            checkpoint beside this one.
    """
    from pynar.data.tokenizer import Tokenizer
    from pynar.models import build

    directory = Path(directory)
    verify(directory, training=False)
    model = build(read_config(directory))
    _copy_into(model, safetensors.torch.load_file(directory / WEIGHTS), directory)
    return model.to(device).eval(), Tokenizer.load(directory)


def load_weights(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Verifies a checkpoint and reads its weights by name, tied ones once."""
    verify(directory, training=False)
    return safetensors.torch.load_file(Path(directory) / WEIGHTS)


def restore(directory: str | os.PathLike[str], model: nn.Module) -> TrainingState:
    """Verifies a checkpoint and continues from it: fills `model`, returns the training state."""
    directory = Path(directory)
    verify(directory)
    state = load_training_state(directory)
    _copy_into(model, safetensors.torch.load_file(directory / WEIGHTS), directory)
    return state


def load_training_state(directory: str | os.PathLike[str]) -> TrainingState:
    """Reads `training/`; call `verify` first."""
    directory = Path(directory)
    if not (directory / TRAINING_VALUES).exists():
        raise CheckpointError(
            f"{directory}: holds a model, but nothing to resume training from (`training/`); "
            "use it to initialise a new run"
        )
    return TrainingState(
        safetensors.torch.load_file(directory / TRAINING_TENSORS),
        json.loads((directory / TRAINING_VALUES).read_text()),
    )


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of the model in a checkpoint, as `pynar.models.build` takes it."""
    path = Path(directory) / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: is not a checkpoint, it has no {CONFIG}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None
    if not isinstance(content, dict) or not {"format", "model"} <= content.keys():
        raise CheckpointError(f"{path}: is not the configuration of a checkpoint")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {content['format']}, this version of PyNAR reads {FORMAT}"
        )
    return content["model"]


def verify(directory: str | os.PathLike[str], *, training: bool = True) -> None:
    """Checks every file of a checkpoint against its manifest (with or without `training/`).

    Raises:
        CheckpointError: a file is missing, truncated or changed. The message names it, and the
            newest good checkpoint beside this one.
    """
    directory = Path(directory)
    problem = _problem(directory, training=training)
    if problem is not None:
        good = _good_neighbour(directory)
        hint = f"; the newest good checkpoint beside it is {good}" if good else ""
        raise CheckpointError(f"{problem}{hint}")


def average(directories: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Writes the checkpoint whose weights are the arithmetic means of those given.

    Means are taken in fp64 and rounded once. Configuration and tokenizer are those of the
    first; weights that are no floating-point numbers must agree.

    Raises:
        ValueError: no checkpoints, or checkpoints of different models.
        CheckpointError: one of them is damaged.
    """
    paths = [Path(directory) for directory in directories]
    if not paths:
        raise ValueError("average: `directories` must name at least one checkpoint, got none")
    for path in paths:
        verify(path, training=False)
    config = read_config(paths[0])
    for path in paths[1:]:
        if (other := read_config(path)) != config:
            keys = sorted(k for k in config.keys() | other.keys() if config.get(k) != other.get(k))
            raise ValueError(f"average: {path} differs from {paths[0]} in {', '.join(keys)}")
    with _writing(Path(output)) as temporary:
        _write_config(temporary, config, average_of=[path.resolve().name for path in paths])
        safetensors.torch.save_file(_means(paths), temporary / WEIGHTS)
        for name in _read_manifest(paths[0])["files"]:
            if name not in (CONFIG, WEIGHTS) and not name.startswith("training/"):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(paths[0] / name, temporary / name)


def save_pretrained(directory: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> None:
    """`save` under the name that users of the Hugging Face hub look for."""
    save(directory, model, tokenizer)


def from_pretrained(directory: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """`load_model` under the name that users of the Hugging Face hub look for."""
    return load_model(directory)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model, each under its first name only."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _copy_into(model: nn.Module, weights: Mapping[str, Tensor], directory: Path) -> None:
    wanted = unique_tensors(model)
    for name in sorted(wanted.keys() | weights.keys()):
        ours, theirs = wanted.get(name), weights.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = ["nothing" if t is None else str(list(t.shape)) for t in (ours, theirs)]
            raise ValueError(
                f"{directory}: does not fit the model: `{name}` must be {shapes[0]}, "
                f"the checkpoint has {shapes[1]}"
            )
    for name, tensor in wanted.items():
        tensor.copy_(weights[name])


def _means(paths: Sequence[Path]) -> dict[str, Tensor]:
    files = [safetensors.safe_open(path / WEIGHTS, framework="pt") for path in paths]
    means = {}
    for name in files[0].keys():
        first = files[0].get_tensor(name)
        others = [file.get_tensor(name) for file in files[1:]]
        if first.is_floating_point():
            total = sum((other.double() for other in others), first.double())
            means[name] = (total / len(files)).to(first.dtype)
        elif all(torch.equal(first, other) for other in others):
            means[name] = first
        else:
            raise ValueError(f"average: `{name}` is no floating-point weight, and differs")
    return means


def _write_config(directory: Path, model: Mapping[str, Any], **notes: Any) -> None:
    try:
        version = importlib.metadata.version("pynar")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    # Through JSON, which turns tuples into the lists that YAML knows.
    content = json.loads(json.dumps({"format": FORMAT, "pynar": version, **notes, "model": model}))
    (directory / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@contextmanager
def _writing(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory`, with a manifest, when the block ends."""
    try:
        with temporary_sibling(directory) as temporary:
            yield temporary
            _write_manifest(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            replace_directory(temporary, directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot write the checkpoint: {error}") from error


def _write_manifest(directory: Path) -> None:
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in names
    }
    tensors = {WEIGHTS: _tensor_digests(directory / WEIGHTS)}
    content = {"format": FORMAT, "files": files, "tensors": tensors}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1))


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: is not a checkpoint, it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{directory / MANIFEST}: is damaged ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise CheckpointError(f"{directory / MANIFEST}: is damaged (no list of files)")
    return content


def _problem(directory: Path, *, training: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = _read_manifest(directory)
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


def _good_neighbour(directory: Path) -> Path | None:
    directory = directory.resolve()
    if not directory.parent.is_dir():
        return None
    neighbours = [path.parent for path in directory.parent.glob(f"[!.]*/{MANIFEST}")]
    for path in sorted(neighbours, key=lambda path: path.stat().st_mtime, reverse=True):
        if path != directory and not path.is_symlink() and _problem(path, training=True) is None:
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
