import json
import re

import pytest
import safetensors.torch
import torch
import yaml
from standin import StandIn, StandInConfig, weights_of

from pynar import checkpoint
from pynar.checkpoint import CheckpointError, TrainingState
from pynar.data import Tokenizer

STATE = TrainingState({"exp_avg/hidden.bias": torch.ones(8)}, {"update": 7})


@pytest.fixture
def tokenizer(data):
    return Tokenizer.load(data)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Two checkpoints side by side; returns the newer one."""
    for number in (1, 2):
        path = tmp_path / f"update-{number}"
        checkpoint.save(path, StandIn(seed=number), tokenizer, training_state=STATE)
    return path


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_weights_and_state_come_back(saved, tokenizer):
    model = StandIn(seed=5)
    state = checkpoint.restore(saved, model)
    assert state.values == STATE.values
    torch.testing.assert_close(state.tensors, STATE.tensors, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(model), weights_of(StandIn(seed=2)), rtol=0, atol=0)
    assert Tokenizer.load(saved).digest == tokenizer.digest
    assert checkpoint.read_config(saved)["sizes"] == [1, 2]


def test_tied_weights_are_written_once_and_have_both_names_again(saved):
    stored = safetensors.torch.load_file(saved / "model.safetensors")
    assert "embedding.weight" in stored and "readout.weight" not in stored
    weights = checkpoint.load_weights(saved)
    assert weights["readout.weight"] is weights["embedding.weight"]
    assert weights.keys() == StandIn().state_dict().keys()


def test_nothing_is_pickled_and_everybody_may_read(saved):
    names = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    training = {"training/optimizer.safetensors", "training/state.json"}
    assert names - training == {
        "config.yaml", "manifest.json", "model.safetensors", "tokenizer.model"
    }  # fmt: skip
    assert len({(saved / name).stat().st_mode for name in names}) == 1
    config = yaml.safe_load((saved / "config.yaml").read_text())
    assert config["format"] == 1 and config["model"]["model"] == "stand-in"


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "model.safetensors", "tokenizer.model", "training/optimizer.safetensors",
     "training/state.json"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_refused_with_the_file_and_the_previous_one(saved, name, damage):
    path = saved / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flipped":
        flip_a_bit(path, len(path.read_bytes()) // 2)
    else:
        path.unlink()
    previous = re.escape(str(saved.with_name("update-1")))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.*good.*{previous}"):
        checkpoint.restore(saved, StandIn())


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": {"../x": {}}}', b'{"files": {}}'])
def test_damaged_manifest_is_refused(saved, damage):
    (saved / "manifest.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
        checkpoint.verify(saved)


def test_every_flipped_bit_of_the_manifest_is_harmless_or_refused(saved):
    manifest = saved / "manifest.json"
    whole = manifest.read_bytes()
    weights = weights_of(StandIn(seed=2))
    for position in range(0, len(whole), 41):
        flip_a_bit(manifest, position)
        model = StandIn(seed=9)
        try:
            checkpoint.restore(saved, model)
        except CheckpointError:
            pass
        else:
            torch.testing.assert_close(weights_of(model), weights, rtol=0, atol=0)
        manifest.write_bytes(whole)


def test_damaged_tensor_is_named(saved):
    path = saved / "model.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    start = path.stat().st_size - max(
        v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"
    )
    flip_a_bit(path, start + header["hidden.bias"]["data_offsets"][0])
    with pytest.raises(CheckpointError, match=r"is damaged \(in hidden\.bias\)"):
        checkpoint.verify(saved)


def test_a_damaged_optimizer_leaves_the_model_usable(saved):
    flip_a_bit(saved / "training/optimizer.safetensors", 100)
    checkpoint.verify(saved, training=False)
    checkpoint.load_weights(saved)


def test_what_is_no_checkpoint_is_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="nowhere: is not a checkpoint, it has no manifest"):
        checkpoint.load_weights(tmp_path / "nowhere")
    checkpoint.save(tmp_path / "model", StandIn(), None)
    with pytest.raises(CheckpointError, match="nothing to resume training from"):
        checkpoint.restore(tmp_path / "model", StandIn())


def test_checkpoint_of_another_size_is_refused(saved):
    before = StandIn(StandInConfig(dim=4))
    with pytest.raises(ValueError, match=r"`embedding.weight` must be \[60, 4\], .* has \[60, 8\]"):
        checkpoint.restore(saved, before)


def test_failing_to_write_leaves_the_old_checkpoint_and_no_rubbish(saved, tokenizer):
    class Failing:
        def save(self, directory):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="cannot write the checkpoint.*No space left"):
        checkpoint.save(saved, StandIn(seed=3), Failing())
    model = StandIn()
    checkpoint.restore(saved, model)
    torch.testing.assert_close(weights_of(model), weights_of(StandIn(seed=2)), rtol=0, atol=0)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["update-1", "update-2"]


def test_saving_again_replaces(saved, tokenizer):
    checkpoint.save(saved, StandIn(seed=3), tokenizer)
    stored = checkpoint.load_weights(saved)
    torch.testing.assert_close(stored, weights_of(StandIn(seed=3)), rtol=0, atol=0)
    assert not (saved / "training").exists()


def test_average_is_the_arithmetic_mean(tmp_path, tokenizer):
    models = [StandIn(seed=seed) for seed in range(3)]
    paths = [tmp_path / f"c{i}" for i in range(3)]
    for model, path in zip(models, paths, strict=True):
        checkpoint.save(path, model, tokenizer, training_state=STATE)
    checkpoint.average(paths, tmp_path / "mean")
    checkpoint.verify(tmp_path / "mean")
    got = checkpoint.load_weights(tmp_path / "mean")
    for name, weight in got.items():
        stack = torch.stack([model.state_dict()[name].double() for model in models])
        torch.testing.assert_close(weight, stack.mean(0).to(weight.dtype), rtol=0, atol=0)
    assert got["readout.weight"] is got["embedding.weight"]
    assert Tokenizer.load(tmp_path / "mean").digest == tokenizer.digest
    assert checkpoint.read_config(tmp_path / "mean") == checkpoint.read_config(paths[0])
    assert not (tmp_path / "mean" / "training").exists()


def test_average_rejects_different_models_and_nothing(tmp_path):
    checkpoint.save(tmp_path / "a", StandIn(), None)
    checkpoint.save(tmp_path / "b", StandIn(StandInConfig(dropout=0.5)), None)
    with pytest.raises(ValueError, match="b differs from .*a in dropout"):
        checkpoint.average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        checkpoint.average([], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
