"""One update of JANUS, forward and backward, against the usual formulation and against an AR model.

Base size (6 + 6 layers, width 512, vocabulary 32,000), dropout 0, the losses of the released code.
"padded" is `bench.padded_janus`, its masks made beforehand. The AR model has an update of the same
sentences, itself packed; operations of each are counted, so that the rates can be compared.

bfloat16 is autocast, of weights in float32, and agrees with the padded formulation in float32.
`peak_bytes` is what an update allocates at most beside weights and batch: activations, gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import Case, device_or_skip, peak_bytes
from bench.padded_janus import autoregressive_streams, auxiliary_streams, losses
from pynar.data.batching import Batch, collate
from pynar.models import JANUS, AutoregressiveTransformer, build
from pynar.models.janus import JANUSExample
from pynar.nn.packed import PackedRows
from pynar.ops import interval_mask
from pynar.symbols import NUM_SPECIAL, PAD
from pynar.testing import Tolerance

DIM, HIDDEN, LAYERS, VOCABULARY = 512, 2048, 6, 32000
SIZES = {"dim": DIM, "ffn_dim": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
SHAPES = [
    pytest.param(16, 30, id="B16-T30"),
    pytest.param(32, 60, id="B32-T60", marks=pytest.mark.grid),
]
PLACES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16", marks=pytest.mark.grid),
    pytest.param("cuda", torch.float32, id="cuda-float32", marks=pytest.mark.cuda),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.cuda),
]
# Sums of rounding over some thousand rows, in hundredths of the loss and in root mean squares of a
# gradient, of which bfloat16 is off by up to 0.4.
LIMITS: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 2e-3, "atol": 2e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 1.0},
}


def make_batch(sentences: int, longest: int, place: torch.device) -> Batch:
    """Pairs of half to all of `longest` tokens, about as long on both sides."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(NUM_SPECIAL, VOCABULARY, (count,), generator=generator).tolist()

    targets = torch.randint(longest // 2, longest + 1, (sentences,), generator=generator)
    sources = targets + torch.randint(-3, 4, (sentences,), generator=generator)
    lengths = zip(sources.tolist(), targets.tolist(), strict=True)
    return collate([(ids(s), ids(t)) for s, t in lengths], range(sentences)).to(place)


def make_model(name: str, place: torch.device, **changes: Any) -> Any:
    torch.manual_seed(0)
    vocabulary = {"source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
    model = build({"model": name, **vocabulary, **SIZES, "dropout": 0.0, **changes})
    return model.train().to(place)


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


def update(
    model: Any, loss: Callable[[], Tensor], dtype: torch.dtype
) -> Callable[..., tuple[Tensor, ...]]:
    """One update without the optimizer; gives the loss and gradients that depend on all of it."""
    chosen = [
        model.target_embedding.tokens.weight,
        model.encoder.layers[0].self_attention.qkv.weight,
        model.decoder.layers[0].self_attention.qkv.weight,
        model.decoder.layers[0].cross_attention.key_value.weight,
    ]
    device, mixed = chosen[0].device.type, dtype != torch.float32

    def run() -> tuple[Tensor, ...]:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            with torch.autocast(device, dtype if mixed else None, enabled=mixed):
                value = loss()
            value.backward()
        return value.detach(), *(weight.grad[:64] for weight in chosen)

    return run


def run(
    run_case: Callable[..., None],
    benchmark: Any,
    model: Any,
    implementation: str,
    losses: dict[str, Callable[[], Tensor]],
    truth: Callable[[], Tensor],
    place: torch.device,
    dtype: torch.dtype,
    **fields: Any,
) -> None:
    want = update(model, truth, torch.float32)()
    units = [want[0] / 100, *(x.square().mean().sqrt() for x in want[1:])]

    def scale(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x / unit for x, unit in zip(results, units, strict=True))

    want = scale(want)
    steps = {name: update(model, loss, dtype) for name, loss in losses.items()}
    step = steps[implementation]
    case = Case(
        dtype=dtype,
        device=place,
        bytes_moved=1,
        direction="update",
        arguments=(),
        reference=lambda: want,
        limits=LIMITS[dtype],
        graph=False,
        **fields,
    )
    turns = ("padded", steps["padded"]) if implementation == "pynar" else None
    run_case(case, implementation, lambda: scale(step()), turns)
    model.zero_grad(set_to_none=True)
    benchmark.extra_info["peak_bytes"] = peak_bytes(place, step)


def mean(model: JANUS, example: JANUSExample, sums: dict[str, Tensor]) -> Tensor:
    weights = model.loss_weights
    return sum((w * sums[term] / example.counts[term] for term, w in weights.items()))


@pytest.mark.parametrize("implementation", ["pynar", "padded"])
@pytest.mark.parametrize("norm", ["post", pytest.param("pre", marks=pytest.mark.grid)])
@pytest.mark.parametrize(("sentences", "longest"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_janus_step(
    run_case: Any,
    benchmark: Any,
    device: str,
    dtype: torch.dtype,
    sentences: int,
    longest: int,
    norm: str,
    implementation: str,
) -> None:
    place = device_or_skip(device)
    model, batch = make_model("janus", place, norm=norm), make_batch(sentences, longest, place)
    generator = torch.Generator(place)
    example = model.corrupt(batch, generator.manual_seed(0))
    masked = example.labels != 0
    streams = example.streams
    rows = batch.target.tolist(), batch.target_lengths.tolist()
    targets = [row[:n] for row, n in zip(*rows, strict=True)]
    padded = autoregressive_streams(targets), auxiliary_streams(targets, masked.tolist())
    padded = padded[0].to(place), padded[1].to(place)

    def ours() -> Tensor:
        # With the drawing of masks and the lay-out, which are part of an update.
        fresh = model.corrupt(batch, generator.manual_seed(0))
        return mean(model, fresh, model(fresh))

    def usual() -> Tensor:
        return mean(model, example, losses(model, batch, masked, *padded))

    wanted = len(streams.ar) + 2 * len(streams.labels)
    run(
        run_case,
        benchmark,
        model,
        implementation,
        {"pynar": ours, "padded": usual},
        usual,
        place,
        dtype,
        operator="JANUS",
        shape=f"B={sentences},T={longest},{norm}",
        flops=operations(
            example.source,
            streams.rows.intervals,
            streams.source,
            streams.content,
            wanted,
            wanted,
        ),
    )


@pytest.mark.parametrize("norm", ["post", pytest.param("pre", marks=pytest.mark.grid)])
@pytest.mark.parametrize(("sentences", "longest"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_autoregressive_step(
    run_case: Any,
    benchmark: Any,
    device: str,
    dtype: torch.dtype,
    sentences: int,
    longest: int,
    norm: str,
) -> None:
    """The packed AR update: of JANUS's rows the AR contents alone, which also predict."""
    place = device_or_skip(device)
    batch = make_batch(sentences, longest, place)
    model: AutoregressiveTransformer = make_model("autoregressive", place, norm=norm)
    weights = {f"{term}_weight": 0.0 for term in ("nar", "aux", "length")}
    weights |= {f"kl_{pair}_weight": 0.0 for pair in ("ar_nar", "nar_aux", "ar_aux")}
    layout = make_model("janus", place, **weights, encoder_layers=1, decoder_layers=1)
    generator = torch.Generator(place)
    example = layout.corrupt(batch, generator)
    streams, n = example.streams, example.streams.content

    shifted = model.corrupt(batch, generator)

    def ours() -> Tensor:
        return model(shifted)["token"] / n

    def truth() -> Tensor:
        """Padded, through the modules that decode."""
        memory = model.encode(batch.source, batch.source_lengths)
        states = model.decoder(model.target_embedding(shifted.inputs), memory)
        return F.cross_entropy(
            model.logits(states).flatten(0, 1),
            shifted.labels.flatten(),
            ignore_index=PAD,
            label_smoothing=model.config.label_smoothing,
        )

    run(
        run_case,
        benchmark,
        model,
        "packed",
        {"packed": ours},
        truth,
        place,
        dtype,
        operator="autoregressive",
        shape=f"B={sentences},T={longest},{norm}",
        flops=operations(example.source, streams.rows.intervals[:n], streams.source[:n], n, n, n),
    )
