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
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from pynar import __version__
from pynar.data.atomic import replace_directory, temporary_sibling
from pynar.verification import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    CheckpointError,
    find_problem,
    good_neighbour,
    read_manifest,
    seal,
)

if TYPE_CHECKING:
    from pynar.data import Tokenizer
    from pynar.models import TranslationModel

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

TRAINING_TENSORS, TRAINING_VALUES = "training/optimizer.safetensors", "training/state.json"


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
        known = cast(Any, model)
        settings = {"model": known.name, **dataclasses.asdict(known.config)}
        _write_config(temporary, settings)
        tied = {"tied": json.dumps(_tied_names(model))}
        _write_tensors(unique_tensors(model), temporary / WEIGHTS, tied)
        if tokenizer is not None:
            tokenizer.save(temporary)
        if training_state is not None:
            (temporary / "training").mkdir()
            _write_tensors(training_state.tensors, temporary / TRAINING_TENSORS)
            (temporary / TRAINING_VALUES).write_text(json.dumps(training_state.values, indent=1))


def load_model(
    directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[TranslationModel, Tokenizer]:
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
    """Verifies a checkpoint and reads its weights by name; tied ones have several."""
    verify(directory, training=False)
    path = Path(directory) / WEIGHTS
    weights = safetensors.torch.load_file(path)
    tied = json.loads(_metadata(path).get("tied", "{}"))
    return weights | {alias: weights[name] for alias, name in tied.items()}


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
    problem = find_problem(directory, training=training)
    if problem is not None:
        good = good_neighbour(directory)
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
        _write_tensors(_means(paths), temporary / WEIGHTS, _metadata(paths[0] / WEIGHTS))
        for name in read_manifest(paths[0])["files"]:
            if name not in (CONFIG, WEIGHTS) and not name.startswith("training/"):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(paths[0] / name, temporary / name)


def save_pretrained(directory: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> None:
    """`save` under the name that users of the Hugging Face hub look for."""
    save(directory, model, tokenizer)


def from_pretrained(directory: str | os.PathLike[str]) -> tuple[TranslationModel, Tokenizer]:
    """`load_model` under the name that users of the Hugging Face hub look for."""
    return load_model(directory)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model, each under its first name only."""
    tied = _tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _tied_names(model: nn.Module) -> dict[str, str]:
    """The first name of every tensor that has several, by its other names."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(tensor), name)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return {alias: name for alias, name in names.items() if alias != name}


def _metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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


def _write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # The format is what readers of the Hugging Face hub ask for.
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})


def _write_config(directory: Path, model: Mapping[str, Any], **notes: Any) -> None:
    # Through JSON, which turns tuples into the lists that YAML knows.
    content = {"format": FORMAT, "pynar": __version__, **notes, "model": model}
    content = json.loads(json.dumps(content))
    (directory / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@contextmanager
def _writing(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory`, with a manifest, when the block ends."""
    try:
        with temporary_sibling(directory) as temporary:
            yield temporary
            seal(temporary)
            replace_directory(temporary, directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot write the checkpoint: {error}") from error
