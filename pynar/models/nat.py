"""The vanilla non-autoregressive Transformer (Gu et al. 2018): one pass, every token at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pynar.data.batching import Batch
from pynar.models.base import Example, TransformerConfig
from pynar.models.cmlm import CMLM, CMLMConfig
from pynar.nn.attention import padding_mask
from pynar.nn.kept import SMALL, kept
from pynar.nn.packed import PackedRows
from pynar.nn.transformer import Memory

__all__ = ["VanillaNAT", "VanillaNATConfig", "uniform_copy"]


@dataclass(frozen=True, kw_only=True)
class VanillaNATConfig(CMLMConfig):
    """`decoder_input`: "copy" as in the paper; "mask" as in the released recipes."""

    decoder_input: str = "copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_input not in ("copy", "mask"):
            raise ValueError(
                f"`decoder_input` must be one of copy, mask, got {self.decoder_input!r}"
            )


def uniform_copy(source_lengths: Tensor, target_lengths: Tensor, width: int) -> Tensor:
    """The source position each target position copies, int64 `[B, width]`.

    Target t of T takes source round(t (S - 1) / (T - 1)); halves are rounded up, and a target of
    one token takes the first source token.
    """
    twice_t = torch.arange(0, 2 * width, 2, device=source_lengths.device)
    last_source = (source_lengths - 1)[:, None]
    last_target = (target_lengths - 1).clamp(min=1)[:, None]
    index = torch.addcmul(last_target, twice_t, last_source) // (2 * last_target)
    return index.clamp(max=last_source)


def _copied_places(source: Tensor, target: Tensor, span: int, width: int) -> Tensor:
    """Where candidates find what they copy among `[B * span]` positions, `[B * n, width]`."""
    sentences, candidates = len(source), len(target) // max(len(source), 1)
    source_lengths = _copied_lengths(source)
    if candidates != 1:
        source_lengths = source_lengths.repeat_interleave(candidates)
    index = uniform_copy(source_lengths, target, width)
    if sentences > 1:
        first = torch.arange(0, sentences * span, span, device=index.device)
        index = index + first.repeat_interleave(candidates)[:, None]
    return index


@kept
def _kept_places(source: tuple[int, ...], target: tuple[int, ...], span: int, width: int) -> Tensor:
    of_source = torch.tensor(source, dtype=torch.int64, device="cpu")
    of_target = torch.tensor(target, dtype=torch.int64, device="cpu")
    return _copied_places(of_source, of_target, span, width)


def _copied_lengths(source_lengths: Tensor) -> Tensor:
    """The source's EOS has no counterpart in a target without one."""
    return (source_lengths - 1).clamp(min=1)


class VanillaNAT(CMLM):
    """Decodes from uniformly copied source embeddings; no target token is ever an input."""

    Config: ClassVar[type[TransformerConfig]] = VanillaNATConfig
    name = "nat"
    decoding_defaults = {"iterations": 1}

    config: VanillaNATConfig

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Example:
        live = padding_mask(batch.target_lengths, batch.target.shape[1])[:, 0, 0]
        return self._example(batch, live)

    def _embed_inputs(self, batch: Batch, target: PackedRows) -> Tensor:
        if self.config.decoder_input == "mask":
            return super()._embed_inputs(batch, target)
        source_lengths = _copied_lengths(batch.source_lengths)
        index = uniform_copy(source_lengths, batch.target_lengths, target.width)
        copied = batch.source.gather(1, index)[target.sentence, target.positions]
        return self.place_rows(self.target_embedding, self.source_embedding.embed(copied), target)

    def decode(
        self, tokens: Tensor, lengths: Tensor, memory: Memory, wanted: Tensor | None = None
    ) -> Tensor:
        if self.config.decoder_input == "mask":
            return super().decode(tokens, lengths, memory, wanted)
        widths = memory.embedded.shape[1], tokens.shape[1]
        if tokens.is_cpu and tokens.numel() <= SMALL:
            of_source, of_target = memory.lengths.tolist(), lengths.tolist()
            places = _kept_places(tuple(of_source), tuple(of_target), *widths)
        else:
            places = _copied_places(memory.lengths, lengths, *widths)
        copied = F.embedding(places, memory.embedded.flatten(0, 1))
        x = self.target_embedding.norm(copied + self.target_embedding.positions(0, tokens.shape[1]))
        return self.decoder(self.dropout(x), memory, lengths, wanted)
