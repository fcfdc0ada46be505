"""One update of JANUS, forward and backward, against the usual formulation and against an AR model.

Base size (6 + 6 layers, width 512, vocabulary 32,000), dropout 0, the losses of the released code.
"padded" is `bench.padded_janus`, its masks made beforehand. The AR model has an update of the same
sentences, itself packed; operations of each are counted, so that the rates can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import Case
from bench.padded_janus import autoregressive_streams, auxiliary_streams, losses
from pynar.data.batching import Batch, collate
from pynar.models import JANUS, AutoregressiveTransformer, build
from pynar.models.janus import JANUSExample
from pynar.nn.packed import PackedRows
from pynar.ops import interval_mask
from pynar.symbols import NUM_SPECIAL, PAD

DIM, HIDDEN, LAYERS, VOCABULARY = 512, 2048, 6, 32000
SIZES = {"dim": DIM, "ffn_dim": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
SHAPES = [
    pytest.param(16, 30, id="B16-T30"),
    pytest.param(32, 60, id="B32-T60", marks=pytest.mark.grid),
]
# Sums of rounding over some thousand rows.
LIMITS = {"rtol": 2e-3, "atol": 2e-3}


def make_batch(sentences: int, longest: int) -> Batch:
    """Pairs of half to all of `longest` tokens, about as long on both sides."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(NUM_SPECIAL, VOCABULARY, (count,), generator=generator).tolist()

    targets = torch.randint(longest // 2, longest + 1, (sentences,), generator=generator)
    sources = targets + torch.randint(-3, 4, (sentences,), generator=generator)
    lengths = zip(sources.tolist(), targets.tolist(), strict=True)
    return collate([(ids(s), ids(t)) for s, t in lengths], range(sentences))


def make_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    vocabulary = {"source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
    return build({"model": name, **vocabulary, **SIZES, "dropout": 0.0, **changes}).train()


def keys_seen(intervals: Tensor, keys: int) -> int:
    return int(interval_mask(intervals, keys).sum())


def operations(
    source: PackedRows, sees: Tensor, reads: Tensor, content: int, read: int, logits: int
) -> int:
    """Of one update: of all matrix products, two for a product of numbers.

    Backward is twice forward, but two and a half times for attention, whose scores are computed
    again. `content` rows have keys, and the last layer is computed for `read` rows.
    """
    s, n = len(source.tokens), len(sees)
    square, feed = DIM * DIM, 2 * DIM * HIDDEN
    linear = LAYERS * s * (4 * square + feed) + LAYERS * s * 2 * square
    linear += LAYERS * content * 2 * square
    linear += ((LAYERS - 1) * n + read) * (4 * square + feed)
    linear += logits * DIM * VOCABULARY
    pairs = LAYERS * keys_seen(source.intervals, s)
    share = (LAYERS - 1) + read / n  # of the last layer, about
    pairs += share * (keys_seen(sees, content) + keys_seen(reads, s))
    return int(2 * (3 * linear + 3.5 * 2 * pairs * DIM))


def gradients(model: Any, loss: Tensor) -> tuple[Tensor, ...]:
    """Of a few weights, which depend on all that is computed."""
    chosen = [
        model.target_embedding.tokens.weight,
        model.encoder.layers[0].self_attention.qkv.weight,
        model.decoder.layers[0].self_attention.qkv.weight,
        model.decoder.layers[0].cross_attention.key_value.weight,
    ]
    model.zero_grad(set_to_none=True)
    loss.backward()
    return tuple(weight.grad[:64] for weight in chosen)


def run(case: Callable[..., None], implementation: str, step: Callable, **fields: Any) -> None:
    def update(*_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return step()

    case(
        Case(
            dtype=torch.float32,
            device=torch.device("cpu"),
            bytes_moved=1,
            direction="update",
            arguments=(),
            limits=LIMITS,
            **fields,
        ),
        implementation,
        update,
    )


def mean(model: JANUS, example: JANUSExample, sums: dict[str, Tensor]) -> Tensor:
    weights = model.loss_weights
    return sum((w * sums[term] / example.counts[term] for term, w in weights.items()))


@pytest.mark.parametrize("implementation", ["pynar", "padded"])
@pytest.mark.parametrize("norm", ["post", pytest.param("pre", marks=pytest.mark.grid)])
@pytest.mark.parametrize(("sentences", "longest"), SHAPES)
def test_janus_step(
    run_case: Any, sentences: int, longest: int, norm: str, implementation: str
) -> None:
    model, batch = make_model("janus", norm=norm), make_batch(sentences, longest)
    example = model.corrupt(batch, torch.Generator().manual_seed(0))
    masked = example.labels != 0
    streams = example.streams
    rows = batch.target.tolist(), batch.target_lengths.tolist()
    targets = [row[:n] for row, n in zip(*rows, strict=True)]
    padded = autoregressive_streams(targets), auxiliary_streams(targets, masked.tolist())

    def ours() -> tuple[Tensor, ...]:
        # With the drawing of masks and the lay-out, which are part of an update.
        fresh = model.corrupt(batch, torch.Generator().manual_seed(0))
        loss = mean(model, fresh, model(fresh))
        return loss.detach(), *gradients(model, loss)

    def usual() -> tuple[Tensor, ...]:
        loss = mean(model, example, losses(model, batch, masked, *padded))
        return loss.detach(), *gradients(model, loss)

    def truth(*_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return usual()

    b = len(streams.labels)
    ar = len(streams.ar)
    count = operations(
        example.source,
        streams.rows.intervals,
        streams.source,
        streams.content,
        ar + 2 * b,
        ar + 2 * b,
    )
    run(
        run_case,
        implementation,
        {"pynar": ours, "padded": usual}[implementation],
        operator="JANUS",
        shape=f"B={sentences},T={longest},{norm}",
        reference=truth,
        flops=count,
    )


@pytest.mark.parametrize("norm", ["post", pytest.param("pre", marks=pytest.mark.grid)])
@pytest.mark.parametrize(("sentences", "longest"), SHAPES)
def test_autoregressive_step(run_case: Any, sentences: int, longest: int, norm: str) -> None:
    """The packed AR update: of JANUS's rows the AR contents alone, which also predict."""
    batch = make_batch(sentences, longest)
    model: AutoregressiveTransformer = make_model("autoregressive", norm=norm)
    weights = {f"{term}_weight": 0.0 for term in ("nar", "aux", "length")}
    weights |= {f"kl_{pair}_weight": 0.0 for pair in ("ar_nar", "nar_aux", "ar_aux")}
    layout = make_model("janus", **weights, encoder_layers=1, decoder_layers=1)
    example = layout.corrupt(batch, torch.Generator())
    streams, n = example.streams, example.streams.content

    shifted = model.corrupt(batch, torch.Generator())

    def ours() -> tuple[Tensor, ...]:
        loss = model(shifted)["token"] / n
        return loss.detach(), *gradients(model, loss)

    def truth(*_: Tensor) -> tuple[Tensor, ...]:
        """Padded, through the modules that decode."""
        with torch.enable_grad():
            memory = model.encode(batch.source, batch.source_lengths)
            states = model.decoder(model.target_embedding(shifted.inputs), memory)
            loss = F.cross_entropy(
                model.logits(states).flatten(0, 1),
                shifted.labels.flatten(),
                ignore_index=PAD,
                label_smoothing=model.config.label_smoothing,
            )
            return loss.detach(), *gradients(model, loss)

    run(
        run_case,
        "packed",
        ours,
        operator="autoregressive",
        shape=f"B={sentences},T={longest},{norm}",
        reference=truth,
        flops=operations(example.source, streams.rows.intervals[:n], streams.source[:n], n, n, n),
    )
