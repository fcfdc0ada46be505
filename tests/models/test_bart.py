"""BART checkpoints against a slow transcription, and against transformers where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bench.padded_janus import autoregressive_streams, auxiliary_streams, losses
from pynar import checkpoint
from pynar.data.batching import Batch, collate
from pynar.models import JANUS, MODELS, TranslationModel, build
from pynar.models.bart import load_bart
from pynar.nn.two_stream import two_streams
from pynar.symbols import BOS, EOS, MASK, NUM_SPECIAL, PAD, UNK
from pynar.testing import tolerance
from pynar.training.initialise import initialise

CLOSE = tolerance("cpu", torch.float64)
SINGLE = tolerance("cpu", torch.float32)
BASE: dict[str, Any] = {
    "model_type": "bart",
    "vocab_size": 23,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 20,
    "dropout": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale_embedding": True},
    "deep-shallow": {"encoder_layers": 3, "decoder_layers": 1},
    "shallow-deep": {"encoder_layers": 1, "decoder_layers": 2},
    "relu": {"activation_function": "relu", "scale_embedding": True},
    "four-heads": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
# BART's ids: a source ends in </s>, 2; the decoder's first input may be </s> or <s>.
SOURCES = [[0, 7, 9, 22, 4, 2], [0, 2], [5, 3, 3, 21, 8, 10, 11, 12, 2]]
TARGETS = [[2, 0, 9, 7], [0, 4, 5, 6, 7, 22, 3, 20], [2]]


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Names and shapes as `BartForConditionalGeneration` has them."""
    generator = torch.Generator().manual_seed(0)
    dim, hidden = config["d_model"], config["encoder_ffn_dim"]
    weights: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        weights[f"model.{name}"] = 0.5 * torch.randn(shape, generator=generator)

    def affine(name: str, outputs: int, *inputs: int) -> None:
        draw(f"{name}.weight", outputs, *inputs)
        draw(f"{name}.bias", outputs)

    draw("shared.weight", config["vocab_size"], dim)
    for stack in ("encoder", "decoder"):
        draw(f"{stack}.embed_positions.weight", config["max_position_embeddings"] + 2, dim)
        affine(f"{stack}.layernorm_embedding", dim)
        for index in range(config[f"{stack}_layers"]):
            layer = f"{stack}.layers.{index}"
            for name in ("self_attn", "encoder_attn")[: 1 + (stack == "decoder")]:
                for part in "qkv":
                    affine(f"{layer}.{name}.{part}_proj", dim, dim)
                affine(f"{layer}.{name}.out_proj", dim, dim)
                affine(f"{layer}.{name}_layer_norm", dim)
            affine(f"{layer}.fc1", hidden, dim)
            affine(f"{layer}.fc2", dim, hidden)
            affine(f"{layer}.final_layer_norm", dim)
    weights["final_logits_bias"] = torch.zeros(1, config["vocab_size"])
    return weights


def write(
    directory: Path, changes: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """A checkpoint with some entries and weights changed; None takes one out."""
    config = {**BASE, **(changes or {})}
    weights = {**random_weights(config), **(tensors or {})}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, directory / "model.safetensors")
    return weights


class SlowBart:
    """BART after its paper and the names of its weights: a sentence, a head, a position at a time.

    In float64, with BART's own ids.
    """

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.weights = {n.removeprefix("model."): t.double() for n, t in weights.items()}
        self.config = {**BASE, **config}

    def affine(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean()
        x = x / ((x * x).mean() + 1e-5).sqrt()
        return self.weights[f"{name}.weight"] * x + self.weights[f"{name}.bias"]

    def embed(self, stack: str, tokens: list[int]) -> list[Tensor]:
        table = self.weights["shared.weight"]
        scale = math.sqrt(table.shape[1]) if self.config.get("scale_embedding") else 1.0
        positions = self.weights[f"{stack}.embed_positions.weight"]
        rows = [scale * table[token] + positions[t + 2] for t, token in enumerate(tokens)]
        return [self.norm(f"{stack}.layernorm_embedding", row) for row in rows]

    def attend(self, name: str, x: Tensor, seen: list[Tensor]) -> Tensor:
        heads = self.config["encoder_attention_heads"]
        size = len(x) // heads
        q = self.affine(f"{name}.q_proj", x)
        parts = []
        for head in range(heads):
            here = slice(head * size, (head + 1) * size)
            keys = [self.affine(f"{name}.k_proj", h)[here] for h in seen]
            values = [self.affine(f"{name}.v_proj", h)[here] for h in seen]
            weights = [torch.exp(q[here] @ k / math.sqrt(size)) for k in keys]
            parts.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
        return self.affine(f"{name}.out_proj", torch.cat(parts))

    def feed(self, layer: str, x: Tensor) -> Tensor:
        h = self.affine(f"{layer}.fc1", x)
        if self.config.get("activation_function") == "relu":
            h = h * (h > 0)
        else:
            h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        return self.norm(f"{layer}.final_layer_norm", x + self.affine(f"{layer}.fc2", h))

    def encode(self, source: list[int]) -> list[Tensor]:
        rows = self.embed("encoder", source)
        for index in range(self.config["encoder_layers"]):
            layer = f"encoder.layers.{index}"
            seen = rows
            rows = []
            for x in seen:
                x = x + self.attend(f"{layer}.self_attn", x, seen)
                rows.append(self.feed(layer, self.norm(f"{layer}.self_attn_layer_norm", x)))
        return rows

    def logits(self, source: list[int], target: list[int]) -> Tensor:
        """`[T, V]`, of what follows each input of the decoder."""
        memory, rows = self.encode(source), self.embed("decoder", target)
        for index in range(self.config["decoder_layers"]):
            layer = f"decoder.layers.{index}"
            seen = rows
            rows = []
            for t, x in enumerate(seen):
                x = x + self.attend(f"{layer}.self_attn", x, seen[: t + 1])
                x = self.norm(f"{layer}.self_attn_layer_norm", x)
                x = x + self.attend(f"{layer}.encoder_attn", x, memory)
                rows.append(self.feed(layer, self.norm(f"{layer}.encoder_attn_layer_norm", x)))
        return torch.stack([self.weights["shared.weight"] @ x for x in rows])


def padded(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [value] * (width - len(row)) for row in rows]), lengths


def our_logits(model: TranslationModel, token_ids: Tensor) -> list[Tensor]:
    """Those of `TARGETS` in a padded batch, with BART's ids once more."""
    source, source_lengths = padded([token_ids[row].tolist() for row in SOURCES], PAD)
    target, target_lengths = padded([token_ids[row].tolist() for row in TARGETS], PAD)
    memory = model.encode(source, source_lengths)
    states = model.decoder(model.target_embedding(target), memory)
    logits = model.logits(states)[..., token_ids]
    return [row[:n] for row, n in zip(logits, target_lengths.tolist(), strict=True)]


@every_configuration
@torch.no_grad()
def test_logits_are_those_of_a_slow_transcription(name: str, tmp_path: Path) -> None:
    weights = write(tmp_path, CONFIGURATIONS[name])
    model, token_ids = load_bart(tmp_path)
    slow = SlowBart(weights, CONFIGURATIONS[name])
    found = our_logits(model.double(), token_ids)
    for row, source, target in zip(found, SOURCES, TARGETS, strict=True):
        torch.testing.assert_close(row, slow.logits(source, target), **CLOSE)


@every_configuration
@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str, head: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    torch.manual_seed(0)
    settings = {**BASE, **CONFIGURATIONS[name], "init_std": 0.5}
    config = transformers.BartConfig(**settings, attn_implementation="eager")
    kind = transformers.BartForConditionalGeneration if head else transformers.BartModel
    theirs = kind(config).eval()
    for parameter in theirs.parameters():  # also biases and norms
        parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    source, source_lengths = padded(SOURCES, 1)
    target, target_lengths = padded(TARGETS, 1)
    live = (torch.arange(source.shape[1]) < source_lengths[:, None]).long()
    arguments = {"input_ids": source, "attention_mask": live, "decoder_input_ids": target}
    for dtype, close in ((torch.float32, SINGLE), (torch.float64, CLOSE)):
        output = theirs.to(dtype)(**arguments)
        table = theirs.get_input_embeddings().weight
        logits = output.logits if head else output.last_hidden_state @ table.T
        model, token_ids = load_bart(tmp_path)
        found = our_logits(model.to(dtype), token_ids)
        for row, expected, n in zip(found, logits, target_lengths.tolist(), strict=True):
            torch.testing.assert_close(row, expected[:n], **close)


@torch.no_grad()
def test_the_content_stream_of_two_stream_training_is_barts_decoder(tmp_path: Path) -> None:
    slow = SlowBart(write(tmp_path), {})
    model, token_ids = load_bart(tmp_path)
    model = model.double()
    targets = [[9, 7, 4], [], [4, 5, 22, 6, 3, 20]]
    pairs = [
        (token_ids[s[:-1]].tolist(), token_ids[t].tolist())
        for s, t in zip(SOURCES, targets, strict=True)
    ]
    batch = collate(pairs, range(3))
    example = model.example(batch, torch.zeros_like(batch.target, dtype=torch.bool))
    streams = two_streams(
        batch.target,
        batch.target_lengths,
        torch.zeros_like(batch.target, dtype=torch.bool),
        batch.source_lengths,
        tokens=9,
        num_masked=0,
        streams=("ar",),
    )
    states = model.decoder.rows(
        model.embed_rows(model.target_embedding, streams.rows),
        model.decoder.project_rows(model.encode_rows(example.source)),
        sees=streams.rows.intervals,
        reads=streams.source,
        content=streams.content,
    )
    found = model.logits(states[: streams.content])[:, token_ids]
    expected = [slow.logits(s, [0, *t]) for s, t in zip(SOURCES, targets, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), **CLOSE)


def make_batch(vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(NUM_SPECIAL, vocabulary, (count,), generator=generator).tolist()

    return collate([(ids(s), ids(t)) for s, t in ((5, 7), (0, 3), (9, 12))], range(3))


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_two_stream_losses_are_those_of_padded_passes(name: str, tmp_path: Path) -> None:
    # The padded passes look up positions by the number of their rows.
    write(tmp_path, {**CONFIGURATIONS[name], "max_position_embeddings": 40})
    model = load_bart(tmp_path, dropout=0.0)[0].double().train()
    assert isinstance(model, JANUS)
    batch = make_batch(model.config.target_vocabulary)
    example = model.corrupt(batch, torch.Generator().manual_seed(0))
    masked, lengths = example.inputs == MASK, batch.target_lengths.tolist()
    targets = [row[:n] for row, n in zip(batch.target.tolist(), lengths, strict=True)]
    streams = autoregressive_streams(targets), auxiliary_streams(targets, masked.tolist())
    expected, found = losses(model, batch, masked, *streams), model(example)
    for term in model.loss_weights:
        close = SINGLE if term == "length" else CLOSE
        torch.testing.assert_close(found[term].double(), expected[term].double(), **close)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_from_it(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    model = load_bart(tmp_path, model=name, dropout=0.0)[0].train()
    batch = make_batch(model.config.target_vocabulary)
    example = model.corrupt(batch, torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        found = model(example)
        return sum(w * found[k] / example.counts[k] for k, w in model.loss_weights.items())

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            parameter.sub_(1e-3 * parameter.grad)
    assert loss() < before


def test_symbols_keep_their_embeddings_under_our_ids(tmp_path: Path) -> None:
    weights = write(tmp_path)
    model, token_ids = load_bart(tmp_path)
    assert token_ids.dtype == torch.int64
    assert token_ids[[1, 0, 2, 3, 22]].tolist() == [PAD, BOS, EOS, UNK, MASK]
    assert token_ids[4:22].tolist() == list(range(NUM_SPECIAL, 23))
    table = model.target_embedding.tokens.weight
    assert torch.equal(table[token_ids], weights["model.shared.weight"])
    assert model.source_embedding.tokens.weight is table


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_the_tokenizer_says_where_mask_and_unk_are(name: str, tmp_path: Path) -> None:
    """As in a vocabulary with rows of padding; a word may have any name."""
    write(tmp_path)
    ids = {"<s>": 0, "<unk>": 7, "model": 4, "<mask>": 19}
    content: dict[str, Any] = dict(ids)
    if name == "tokenizer.json":
        added = [{"id": 19, "content": "<mask>"}]
        content = {"added_tokens": added, "model": {"vocab": {"<unk>": 7, "model": 4}}}
    (tmp_path / name).write_text(json.dumps(content))
    token_ids = load_bart(tmp_path)[1]
    assert token_ids[[1, 0, 2, 7, 19]].tolist() == [PAD, BOS, EOS, UNK, MASK]
    assert sorted(token_ids.tolist()) == list(range(23))
    rest = [i for i in range(23) if i not in (0, 1, 2, 7, 19)]
    assert token_ids[rest].tolist() == list(range(NUM_SPECIAL, 23))


def test_configuration_follows_the_checkpoint_and_the_changes(tmp_path: Path) -> None:
    write(tmp_path, {"dropout": 0.25, "encoder_layers": 1})
    model, _ = load_bart(tmp_path, length_weight=0.0, mask_ratio=0.5)
    config = model.config
    assert (config.dropout, config.encoder_layers, config.decoder_layers) == (0.25, 1, 2)
    assert (config.dim, config.ffn_dim, config.heads, config.max_length) == (8, 12, 2, 20)
    assert (config.embedding_norm, config.embedding_scale, config.norm) == (True, False, "post")
    assert config.mask_ratio == 0.5 and model.strategies == ("beam", "greedy", "sampling")
    assert not model.training and load_bart(tmp_path, dropout=0.5)[0].config.dropout == 0.5


def test_weights_in_half_precision_and_names_of_the_bare_model_are_read(tmp_path: Path) -> None:
    weights = write(tmp_path)
    bare = {n.removeprefix("model."): t.bfloat16() for n, t in weights.items() if "bias" not in n}
    bare |= {n.removeprefix("model."): t for n, t in weights.items() if n.endswith(".bias")}
    bare["encoder.embed_tokens.weight"] = bare.pop("shared.weight")  # one of its other names
    safetensors.torch.save_file(bare, tmp_path / "model.safetensors")
    model, token_ids = load_bart(tmp_path)
    table = model.target_embedding.tokens.weight
    assert table.dtype == torch.float32
    assert torch.equal(table[token_ids], weights["model.shared.weight"].bfloat16().float())


def test_a_saved_model_is_the_loaded_one(tmp_path: Path) -> None:
    write(tmp_path)
    model, token_ids = load_bart(tmp_path)
    checkpoint.save(tmp_path / "ours", model, None)
    other = build(checkpoint.read_config(tmp_path / "ours")).eval()
    assert not initialise(other, tmp_path / "ours").kept
    with torch.no_grad():
        for one, two in zip(
            our_logits(model, token_ids), our_logits(other, token_ids), strict=True
        ):
            assert torch.equal(one, two)


FITTING = {
    "source_vocabulary": 31,
    "target_vocabulary": 31,
    "dim": 8,
    "ffn_dim": 12,
    "heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_length": 20,
    "norm": "post",
    "positions": "learned",
    "activation": "gelu",
    "embedding_norm": True,
    "embedding_scale": False,
}


@pytest.mark.parametrize("vocabulary", [31, 23])
def test_training_with_another_vocabulary_begins_with_the_body(
    vocabulary: int, tmp_path: Path
) -> None:
    """Also where the other one is of the same size: its words are others."""
    write(tmp_path)
    sizes = {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary}
    model = build({"model": "janus", **FITTING, **sizes, "decoder_layers": 1})
    before = model.source_embedding.tokens.weight.clone()
    found = initialise(model, tmp_path)
    ours, _ = load_bart(tmp_path)
    expected = ours.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith("length.") and ".tokens." not in name:
            assert torch.equal(tensor, expected[name]), name
    assert torch.equal(model.source_embedding.tokens.weight, before)
    assert found.kept["source_embedding.tokens.weight"] == "of another vocabulary"
    assert "decoder.layers.1.feed_forward.inner.weight" in found.unused
    assert "source_embedding.tokens.weight (of another vocabulary)" in str(found)
    assert "20 of decoder" in str(found)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"heads": 4}, "needs a model with `heads` 2, got 4"),
        ({"norm": "pre"}, "needs a model with `norm` 'post', got 'pre'"),
        ({"positions": "sinusoidal"}, "`positions` 'learned', got 'sinusoidal'"),
        ({"activation": "relu"}, "`activation` 'gelu', got 'relu'"),
        ({"embedding_norm": False}, "`embedding_norm` True, got False"),
        ({"embedding_scale": True}, "`embedding_scale` False, got True"),
    ],
)
def test_a_model_that_means_something_else_by_the_weights_is_refused(
    changes: dict, words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=words):
        initialise(build({"model": "cmlm", **FITTING, **changes}), tmp_path)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"model_type": "mbart"}, "config.json: `model_type` must be 'bart', got 'mbart'"),
        ({"model_type": None}, "`model_type` must be 'bart', got None"),
        ({"activation_function": "gelu_new"}, "must be gelu or relu, got 'gelu_new'"),
        ({"decoder_ffn_dim": 16}, "`encoder_ffn_dim` and `decoder_ffn_dim` must be equal, got 12"),
        ({"decoder_attention_heads": 4}, "`decoder_attention_heads` must be equal, got 2 and 4"),
        ({"d_model": "8"}, "config.json: `d_model` must be an integer, got '8'"),
        ({"pad_token_id": None, "vocab_size": 23, "bos_token_id": 1}, "different ids.*<s> 1"),
        ({"eos_token_id": 23}, "ids below `vocab_size` 23, got <pad> 1, <s> 0, </s> 23, <unk> 3"),
    ],
)
def test_another_model_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    write(tmp_path)
    content = {**BASE, **changes}
    content = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        load_bart(tmp_path)


ENCODER = "model.encoder.layers.1"


@pytest.mark.parametrize(
    "tensors,words",
    [
        ({f"{ENCODER}.fc1.bias": None}, r"lacks `encoder\.layers\.1\.fc1\.bias`$"),
        ({"model.shared.weight": None}, r"lacks `shared\.weight`$"),
        (
            {"model.encoder.layer_norm.weight": torch.ones(8)},
            r"BART does not have: `encoder\.layer",
        ),
        ({"classification_head.dense.bias": torch.ones(8)}, "does not have: `classification_head"),
        (
            {f"{ENCODER}.fc1.weight": torch.ones(16, 8)},
            r"`encoder\.layers\.1\.fc1\.weight` must have shape \[12, 8\] after config.*\[16, 8\]",
        ),
        ({"model.shared.weight": torch.ones(24, 8)}, r"must have shape \[23, 8\].*got \[24, 8\]"),
        ({"final_logits_bias": torch.ones(1, 23)}, "`final_logits_bias` must be zero.*up to 1"),
        ({"lm_head.weight": torch.ones(23, 8)}, "`lm_head.weight` must equal `shared.weight`"),
    ],
)
def test_other_weights_are_refused_by_name(tensors: dict, words: str, tmp_path: Path) -> None:
    write(tmp_path, tensors=tensors)
    with pytest.raises((ValueError, checkpoint.CheckpointError), match=words):
        load_bart(tmp_path)


def test_many_missing_weights_are_counted(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "encoder_layers": 3}))
    with pytest.raises(checkpoint.CheckpointError, match=r"`encoder\.layers\.2.* and 12 more"):
        load_bart(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            load_bart(tmp_path)
        return str(caught.value)

    assert "is no BART checkpoint, it has no config.json" in refusal()
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert refusal().endswith("has no model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin is pickled, which is not read: write the model anew" in refusal()
    write(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:100])
    assert "model.safetensors: is damaged" in refusal()
    (tmp_path / "config.json").write_text("{")
    assert "config.json: is damaged" in refusal()


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 3}))
    with pytest.raises(ValueError, match="vocab.json: has no <mask>"):
        load_bart(tmp_path)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"dim": 16}, "load_bart: `dim` is determined by .*, 8, and cannot be changed"),
        ({"share_embeddings": False}, "`share_embeddings` is determined by .*, True"),
        ({"drop_out": 0.1}, "unknown key `drop_out`.*did you mean `dropout`"),
        ({"model": "bert"}, "`model` must be one of autoregressive, cmlm, flowseq, janus, nat"),
    ],
)
def test_wrong_changes_are_refused(changes: dict, words: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_bart(tmp_path, **changes)
