from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from pynar.data.batching import Batch, collate
from pynar.decoding import (
    BeamSearch,
    DraftAndVerify,
    Greedy,
    Hypotheses,
    MaskPredict,
    Sampling,
    Strategy,
)
from pynar.models import AutoregressiveTransformer, FlowSeq, TranslationModel, build
from pynar.symbols import BOS, EOS, MASK, NUM_SPECIAL, PAD

SIZES = {"dim": 16, "ffn_dim": 24, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}


def make_model(name: str, vocabulary: int = 11, **changes: Any) -> TranslationModel:
    """A tiny model, half trained to reverse a sentence and say every third word twice.

    So its sentences differ in words and length, and it is seldom sure: all that decoding meets.
    """
    return copy.deepcopy(_trained(name, vocabulary, tuple(changes.items())))


def make_flowseq(**changes: Any) -> FlowSeq:
    """A tiny FlowSeq of random weights: what it says means nothing, and differs by sentence."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"source_vocabulary": 13, "target_vocabulary": 13, **SIZES, "ffn_dim": 12}
        layers = {"posterior_layers": 1, "decoder_layers": 1, "max_length": 64}
        flow = {"flow_steps": [1, 1, 1], "flow_ffn_dim": 8}
        made = build({"model": "flowseq", **sizes, **layers, **flow, **changes})
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    assert isinstance(made, FlowSeq)
    return made.eval()


@functools.cache
@torch.enable_grad()
@torch.random.fork_rng()
def _trained(name: str, vocabulary: int, changes: tuple[tuple[str, Any], ...]) -> TranslationModel:
    torch.manual_seed(0)
    sizes = {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary, **SIZES}
    fields = {"model": name, **sizes, "norm": "pre", "dropout": 0.0, "max_length": 64}
    if name in ("cmlm", "janus", "nat"):
        fields["length_classes"] = 12
    model = build({**fields, **dict(changes)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        example = model.corrupt(_pairs(vocabulary, generator), generator)
        losses = model(example)
        loss = sum(losses[k] / example.counts[k] for k in losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _pairs(vocabulary: int, generator: torch.Generator) -> Batch:
    pairs = []
    for _ in range(16):
        size = int(torch.randint(7, (), generator=generator))
        words = torch.randint(NUM_SPECIAL, vocabulary, (size,), generator=generator).tolist()
        target = [w for w in reversed(words) for _ in range(1 + (w % 3 == 0))]
        pairs.append((words, target))
    return collate(pairs, range(len(pairs)))


def make_source(lengths: list[int], vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    """Random sentences; a length counts the EOS."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(lengths), max(lengths, default=0))
    source = torch.randint(NUM_SPECIAL, vocabulary, shape, generator=generator)
    place, counts = torch.arange(shape[1]), torch.tensor(lengths, dtype=torch.long)
    source = source.masked_fill(place == counts[:, None] - 1, EOS)
    return source.masked_fill(place >= counts[:, None], PAD), counts


def next_log_probs(model: AutoregressiveTransformer, source: Tensor, prefix: tuple) -> list[float]:
    """Of the token after `prefix`, from a whole pass over it, for one sentence `[S]`."""
    memory = model.encode(source[None], torch.tensor([len(source)]))
    states = model.decoder(model.target_embedding(torch.tensor([[BOS, *prefix]])), memory)
    logits = model.logits(states[0, -1]).double()
    logits[[PAD, BOS, MASK]] = -torch.inf
    return logits.log_softmax(0).tolist()


BART = {
    "norm": "post",
    "positions": "learned",
    "activation": "gelu",
    "embedding_norm": True,
    "embedding_scale": False,
}
# Everything that decodes, by name: the model, its changes, and the strategy.
SYSTEMS: dict[str, tuple[str, dict[str, Any], Strategy]] = {
    "greedy": ("autoregressive", {}, Greedy(max_ratio=1.0, max_extra=1)),
    "greedy-learned": ("autoregressive", {"positions": "learned", "max_length": 13}, Greedy()),
    "beam-1": ("autoregressive", {}, BeamSearch(beam=1, max_extra=2)),
    "beam-4": ("autoregressive", {}, BeamSearch(beam=4, n_best=4, max_extra=2)),
    "beam-late": (
        "autoregressive",
        {"norm": "post"},
        BeamSearch(beam=3, n_best=2, length_penalty=0.6, early_stop=False, max_extra=2),
    ),
    "beam-bart": ("autoregressive", BART, BeamSearch(beam=3, n_best=2, max_extra=2)),
    "sampling": ("autoregressive", {}, Sampling(seed=3, max_extra=2)),
    "sampling-3": ("autoregressive", {}, Sampling(samples=3, top_k=4, temperature=1.5)),
    "cmlm": ("cmlm", {}, MaskPredict(iterations=4, length_candidates=3, n_best=2)),
    "cmlm-blocks": ("cmlm", {}, MaskPredict(block=2, length_candidates=3)),
    "cmlm-difference": (
        "cmlm",
        {"length_kind": "difference", "norm": "post"},
        MaskPredict(iterations=3, length_candidates=7, n_best=7),
    ),
    "nat-copy": ("nat", {}, MaskPredict(iterations=1, length_candidates=2)),
    "nat-copy-bart": ("nat", BART, MaskPredict(iterations=1, length_candidates=2)),
    "nat-mask": ("nat", {"decoder_input": "mask"}, MaskPredict(iterations=1)),
    "janus-greedy": ("janus", {}, Greedy(max_extra=2)),
    "janus-beam": (
        "janus",
        {"norm": "post", "positions": "learned"},
        BeamSearch(beam=3, n_best=2, max_extra=2),
    ),
    "janus-sampling": ("janus", {}, Sampling(samples=2, top_k=4)),
    "janus-cmlm": ("janus", {}, MaskPredict(iterations=4, length_candidates=3, n_best=2)),
    "janus-blocks": ("janus", {}, MaskPredict(block=3, length_candidates=2)),
    "janus-draft": ("janus", {}, DraftAndVerify(max_extra=2)),
    "janus-cmlm-learned": (
        "janus",
        {"norm": "post", "positions": "learned"},
        MaskPredict(iterations=3, length_candidates=3),
    ),
    "janus-greedy-bart": ("janus", BART, Greedy(max_extra=2)),
    "janus-cmlm-bart": ("janus", BART, MaskPredict(iterations=3, length_candidates=3)),
}
LENGTHS = [4, 1, 9, 2, 4, 7]


def take(hypotheses: Hypotheses, rows: list[int]) -> Hypotheses:
    return Hypotheses(
        hypotheses.tokens[rows],
        hypotheses.lengths[rows],
        hypotheses.scores[rows],
        hypotheses.passes[rows],
    )


def assert_same(actual: Hypotheses, expected: Hypotheses) -> None:
    assert actual.lists() == expected.lists()
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(actual.passes, expected.passes)
