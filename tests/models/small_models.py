from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pynar.data.batching import Batch, collate
from pynar.models import TranslationModel, build
from pynar.models.base import Example
from pynar.symbols import NUM_SPECIAL

VOCABULARY = 13
SIZES = {
    "source_vocabulary": VOCABULARY,
    "target_vocabulary": VOCABULARY,
    "dim": 8,
    "ffn_dim": 12,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dropout": 0.0,
}
# Every family and input, with habits spread over them.
MODELS: dict[str, dict[str, Any]] = {
    "autoregressive": {"model": "autoregressive", "norm": "pre", "positions": "learned"},
    "autoregressive-separate": {"model": "autoregressive", "share_embeddings": False},
    "cmlm": {"model": "cmlm", "norm": "pre", "activation": "gelu"},
    "cmlm-difference": {"model": "cmlm", "length_kind": "difference", "length_classes": 6},
    "nat-copy": {"model": "nat", "positions": "learned", "init": "bert"},
    "nat-copy-separate": {"model": "nat", "share_embeddings": False, "norm": "pre"},
    "nat-mask": {"model": "nat", "decoder_input": "mask"},
}


def make_model(kind: str, **changes: Any) -> TranslationModel:
    """A tiny model whose every parameter matters: none is left at zero or one."""
    torch.manual_seed(0)
    fields = {**SIZES, **MODELS[kind], **changes}
    if fields.get("share_embeddings") is False:
        fields.setdefault("source_vocabulary", VOCABULARY)
        fields["source_vocabulary"] += 2
    model = build({"max_length": 64, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def make_batch(
    lengths: tuple[tuple[int, int], ...] = ((3, 4), (0, 1), (7, 2), (2, 9), (1, 0)),
) -> Batch:
    """Random pairs of so many source and target tokens."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(NUM_SPECIAL, VOCABULARY, (count,), generator=generator).tolist()

    return collate([(ids(s), ids(t)) for s, t in lengths], range(len(lengths)))


def make_example(model: TranslationModel, batch: Batch) -> Example:
    return model.corrupt(batch, torch.Generator().manual_seed(2))


def alone(example: Example, row: int) -> Example:
    """One sentence of an example, with the same noise and no padding."""
    batch = example.batch
    source, target = int(batch.source_lengths[row]), int(batch.target_lengths[row])
    more = example.inputs.shape[1] - batch.target.shape[1]  # autoregressive: one position more
    part = Batch(
        batch.source[row : row + 1, :source],
        batch.source_lengths[row : row + 1],
        batch.target[row : row + 1, :target],
        batch.target_lengths[row : row + 1],
        batch.indices[row : row + 1],
    )
    width = slice(0, target + more)
    rows = slice(row, row + 1)
    return Example(part, example.inputs[rows, width], example.labels[rows, width], {})


def widened(example: Example, source_id: int, target_id: int) -> Example:
    """The same example with three more columns on each side, filled with the given symbols."""
    batch = example.batch

    def filled(ids: torch.Tensor, lengths: torch.Tensor, value: int) -> torch.Tensor:
        wide = F.pad(ids, (0, 3), value=value)
        live = torch.arange(wide.shape[1]) < lengths[:, None]
        return torch.where(live, wide, value)

    more = example.inputs.shape[1] - batch.target.shape[1]
    return Example(
        Batch(
            filled(batch.source, batch.source_lengths, source_id),
            batch.source_lengths,
            filled(batch.target, batch.target_lengths, target_id),
            batch.target_lengths,
            batch.indices,
        ),
        filled(example.inputs, batch.target_lengths + more, target_id),
        F.pad(example.labels, (0, 3)),
        example.counts,
    )


def states_of(model: TranslationModel, example: Example) -> torch.Tensor:
    """The decoder's states of an example, whatever the family."""
    batch = example.batch
    memory = model.encode(batch.source, batch.source_lengths)
    if model.name == "autoregressive":
        return model.decoder(model.target_embedding(example.inputs), memory)
    return model.decode(example.inputs, batch.target_lengths, memory)


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}
