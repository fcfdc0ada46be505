"""BART (Lewis et al. 2020) as the ground of a model: reads what Hugging Face's transformers writes.

BART is a post-norm Transformer with learned positions, GELU and a layer normalisation after the
embeddings, which `TransformerConfig` can say. Its special symbols have other ids than ours.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pynar.models import TranslationModel, build
from pynar.models.base import TransformerConfig
from pynar.strict import from_dict
from pynar.symbols import NAMES
from pynar.verification import CONFIG as OUR_CONFIG
from pynar.verification import CheckpointError

__all__ = ["body_weights", "is_transformers_directory", "load_bart"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLED, _SHARDS = "pytorch_model.bin", "model.safetensors.index.json"
# Rows of the position tables before that of the first token.
_OFFSET = 2
# One matrix under four names, of which a file has at least one.
_TOKENS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)
_BIAS = "final_logits_bias"


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What matters here of `config.json`; the defaults are those of transformers' `BartConfig`."""

    vocab_size: int = 50265
    d_model: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    max_position_embeddings: int = 1024
    scale_embedding: bool = False
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        for name in ("ffn_dim", "attention_heads"):
            sides = getattr(self, f"encoder_{name}"), getattr(self, f"decoder_{name}")
            if sides[0] != sides[1]:
                raise ValueError(
                    f"`encoder_{name}` and `decoder_{name}` must be equal, "
                    f"got {sides[0]} and {sides[1]}"
                )
        if self.activation_function not in ("gelu", "relu"):
            raise ValueError(
                f"`activation_function` must be gelu or relu, got {self.activation_function!r}"
            )

    def sizes(self) -> dict[str, int]:
        return {
            "source_vocabulary": self.vocab_size,
            "target_vocabulary": self.vocab_size,
            "dim": self.d_model,
            "ffn_dim": self.encoder_ffn_dim,
            "encoder_layers": self.encoder_layers,
            "decoder_layers": self.decoder_layers,
            "max_length": self.max_position_embeddings,
        }

    def habits(self) -> dict[str, Any]:
        """Fields of `TransformerConfig` that the shapes of the weights do not tell."""
        return {
            "heads": self.encoder_attention_heads,
            "norm": "post",
            "positions": "learned",
            "embedding_scale": self.scale_embedding,
            "embedding_norm": True,
            "activation": self.activation_function,
        }

    def shapes(self) -> dict[str, list[int]]:
        """Every weight of the body by name, without the token embeddings."""
        dim, hidden = self.d_model, self.encoder_ffn_dim
        found: dict[str, list[int]] = {}
        stacks = {"encoder": self.encoder_layers, "decoder": self.decoder_layers}
        for stack, layers in stacks.items():
            found[f"{stack}.embed_positions.weight"] = [self.max_position_embeddings + _OFFSET, dim]
            norms = [f"{stack}.layernorm_embedding"]
            for layer in (f"{stack}.layers.{index}" for index in range(layers)):
                attentions = ["self_attn"] if stack == "encoder" else ["self_attn", "encoder_attn"]
                norms += [f"{layer}.{name}_layer_norm" for name in (*attentions, "final")]
                for name in attentions:
                    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                        found[f"{layer}.{name}.{part}.weight"] = [dim, dim]
                        found[f"{layer}.{name}.{part}.bias"] = [dim]
                found |= {f"{layer}.fc1.weight": [hidden, dim], f"{layer}.fc1.bias": [hidden]}
                found |= {f"{layer}.fc2.weight": [dim, hidden], f"{layer}.fc2.bias": [dim]}
            for norm in norms:
                found |= {f"{norm}.weight": [dim], f"{norm}.bias": [dim]}
        return found


def load_bart(
    directory: str | os.PathLike[str], model: str = "janus", **changes: Any
) -> tuple[TranslationModel, Tensor]:
    """Makes a model with the weights of a BART checkpoint, in evaluation mode, in fp32.

    Every state of encoder and causal decoder is BART's for the same inputs, those of `JANUS` in
    its content stream. What BART has no weights for, the length predictor, starts afresh. BART's
    dropout of attention weights and activations and its layer dropout are not taken over.

    The special symbols get the ids of `pynar.symbols`, all others follow in BART's order. Which
    ids BART gave to `<unk>` and `<mask>` is read from the directory's `tokenizer.json` or
    `vocab.json`; without such a file they are 3 and the last.

    Args:
        directory: `config.json` and `model.safetensors`, as written by `save_pretrained` of
            `BartModel` or `BartForConditionalGeneration`.
        model: a name in `pynar.models.MODELS`.
        changes: fields of the model's configuration, such as `dropout` and the weights of
            losses; not those that the checkpoint determines.

    Returns:
        The model, and `token_ids: [V]`, int64: our id of each of BART's symbols. Its `argsort()`
        leads back.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other weights than its
            configuration says; the message names the file and the weight.
        ValueError: another kind of model, or a BART with something that ours lacks; a field
            that is unknown or not to be changed.

    Example:
        model, token_ids = load_bart("bart-base", dropout=0.1, length_weight=0.0)
        source = token_ids[tokenizer("A sentence.", return_tensors="pt").input_ids]
    """
    directory = Path(directory)
    settings, tensors = _read(directory)
    fixed = {**settings.sizes(), **settings.habits(), "share_embeddings": True}
    for name in changes:
        if name in fixed:
            raise ValueError(
                f"load_bart: `{name}` is determined by {directory}, {fixed[name]!r}, "
                "and cannot be changed"
            )
    order = _order(directory, settings)
    defaults = {"dropout": settings.dropout, "init": "bert"}
    made = build({"model": model, **defaults, **fixed, **changes})
    tokens = _token_embeddings(tensors, directory)[order]
    weights = _converted(tensors, settings)
    for side in ("source", "target"):
        weights[f"{side}_embedding.tokens.weight"] = tokens
    left = made.load_state_dict(weights, strict=False)
    theirs = ("encoder.", "decoder.", "source_embedding.", "target_embedding.")
    assert not left.unexpected_keys and not any(k.startswith(theirs) for k in left.missing_keys)
    return made.eval(), order.argsort()


def body_weights(directory: str | os.PathLike[str], config: TransformerConfig) -> dict[str, Tensor]:
    """The weights of a BART checkpoint by our names, for a model with another vocabulary.

    That is all but the token embeddings. The model may have fewer layers.

    Raises:
        CheckpointError, ValueError: as `load_bart`; and where `config` makes something else of
            weights of the same shapes.
    """
    directory = Path(directory)
    settings, tensors = _read(directory)
    for name, value in settings.habits().items():
        if (found := getattr(config, name)) != value:
            raise ValueError(
                f"`init_from`: {directory} needs a model with `{name}` {value!r}, got {found!r}"
            )
    return _converted(tensors, settings)


def is_transformers_directory(directory: str | os.PathLike[str]) -> bool:
    """Whether transformers wrote this directory, and not PyNAR."""
    directory = Path(directory)
    return (directory / CONFIG).is_file() and not (directory / OUR_CONFIG).is_file()


def _read(directory: Path) -> tuple[_Settings, dict[str, Tensor]]:
    """Settings and weights, checked against each other; names without `model.` before them."""
    content = _json(directory / CONFIG)
    if content.get("model_type") != "bart":
        raise ValueError(
            f"{directory / CONFIG}: `model_type` must be 'bart', got {content.get('model_type')!r}"
        )
    known = {field.name for field in fields(_Settings)}
    content = {name: value for name, value in content.items() if name in known}
    try:
        settings = from_dict(_Settings, content, where=CONFIG)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    tensors = _tensors(directory)
    _check(tensors, settings, directory / WEIGHTS)
    return settings, tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: is no BART checkpoint, it has no {path.name}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is damaged (no mapping)")
    return content


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.is_file():
        hint = ""
        for other, problem in ((_PICKLED, "is pickled"), (_SHARDS, "is in several parts")):
            if (directory / other).is_file():
                hint = (
                    f"; {other} {problem}, which is not read: write the model anew with "
                    "`save_pretrained` of a current transformers"
                )
        raise CheckpointError(f"{directory}: has no {WEIGHTS}{hint}")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from None
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _check(tensors: dict[str, Tensor], settings: _Settings, path: Path) -> None:
    wanted = settings.shapes()
    tokens = {name: [settings.vocab_size, settings.d_model] for name in _TOKENS if name in tensors}
    wanted |= tokens or {_TOKENS[0]: [settings.vocab_size, settings.d_model]}
    if _BIAS in tensors:
        wanted[_BIAS] = [1, settings.vocab_size]
    for words, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("has weights that BART does not have:", tensors.keys() - wanted.keys()),
    ):
        if names:
            some = ", ".join(f"`{name}`" for name in sorted(names)[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(f"{path}: {words} {some}{more}")
    for name, shape in wanted.items():
        if (found := list(tensors[name].shape)) != shape:
            raise CheckpointError(
                f"{path}: `{name}` must have shape {shape} after {CONFIG}, got {found}"
            )
    if _BIAS in tensors and tensors[_BIAS].any():
        raise ValueError(
            f"{path}: `{_BIAS}` must be zero, as ours is a projection without a bias; "
            f"got values up to {tensors[_BIAS].abs().max().item():.3g}"
        )


def _token_embeddings(tensors: dict[str, Tensor], directory: Path) -> Tensor:
    """`[V, C]`; one matrix for both inputs and the output, as in BART itself."""
    names = [name for name in _TOKENS if name in tensors]
    for name in names[1:]:
        if not torch.equal(tensors[name], tensors[names[0]]):
            raise ValueError(
                f"{directory / WEIGHTS}: `{name}` must equal `{names[0]}`, as ours are one matrix"
            )
    return tensors[names[0]]


def _order(directory: Path, settings: _Settings) -> Tensor:
    """BART's id of each of our symbols, `[V]`."""
    size = settings.vocab_size
    unk, mask, where = 3, size - 1, CONFIG
    for name in ("tokenizer.json", "vocab.json"):
        if (directory / name).is_file():
            content = _json(directory / name)
            pieces = _pieces(content) if name == "tokenizer.json" else content
            for piece in ("<unk>", "<mask>"):
                if piece not in pieces:
                    raise ValueError(f"{directory / name}: has no {piece}, which BART's have")
            unk, mask, where = pieces["<unk>"], pieces["<mask>"], f"{CONFIG}, {name}"
            break
    special = [settings.pad_token_id, settings.bos_token_id, settings.eos_token_id, unk, mask]
    if len(set(special)) < len(special) or not all(0 <= i < size for i in special):
        ids = ", ".join(f"{name} {i}" for name, i in zip(NAMES, special, strict=True))
        raise ValueError(
            f"{directory}: the special symbols must have different ids below `vocab_size` {size}, "
            f"got {ids} ({where})"
        )
    return torch.tensor([*special, *(i for i in range(size) if i not in set(special))])


def _pieces(content: dict[str, Any]) -> dict[str, int]:
    """The ids in `tokenizer.json`, which has two places for them."""
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**content["model"].get("vocab", {}), **added}


def _converted(tensors: dict[str, Tensor], settings: _Settings) -> dict[str, Tensor]:
    """The body under our names: merged projections, positions without the rows before them."""
    found: dict[str, Tensor] = {}

    def take(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            parts = [tensors[f"{name}.{kind}"] for name in theirs]
            found[f"{ours}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]

    for stack, layers, side in (
        ("encoder", settings.encoder_layers, "source"),
        ("decoder", settings.decoder_layers, "target"),
    ):
        positions = tensors[f"{stack}.embed_positions.weight"]
        found[f"{side}_embedding.learned.weight"] = positions[_OFFSET:]
        take(f"{side}_embedding.norm", f"{stack}.layernorm_embedding")
        for layer in (f"{stack}.layers.{index}" for index in range(layers)):
            theirs, ours = f"{layer}.self_attn", f"{layer}.self_attention"
            take(f"{ours}.qkv", *(f"{theirs}.{part}_proj" for part in "qkv"))
            take(f"{ours}.output", f"{theirs}.out_proj")
            norms = ["self_attn", "final"]
            if stack == "decoder":
                theirs, ours = f"{layer}.encoder_attn", f"{layer}.cross_attention"
                take(f"{ours}.query", f"{theirs}.q_proj")
                take(f"{ours}.key_value", f"{theirs}.k_proj", f"{theirs}.v_proj")
                take(f"{ours}.output", f"{theirs}.out_proj")
                norms.insert(1, "encoder_attn")
            take(f"{layer}.feed_forward.inner", f"{layer}.fc1")
            take(f"{layer}.feed_forward.outer", f"{layer}.fc2")
            for index, norm in enumerate(norms):
                take(f"{layer}.residual.{index}.norm", f"{layer}.{norm}_layer_norm")
    return found
