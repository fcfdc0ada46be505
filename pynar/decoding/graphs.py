"""CUDA graphs of whole decoding calls, captured once a bucket of shapes and replayed.

Of a short batch the GPU computes faster than Python launches. A graph holds all launches from the
encoder to the last pass and starts them as one; nothing in it waits for the host.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pynar.decoding.hypotheses import Hypotheses
from pynar.models import TranslationModel
from pynar.ops._operator import implementation
from pynar.symbols import EOS, PAD

__all__ = ["MOST_POSITIONS", "Graphs", "by_graph", "graphs_of", "row_bucket", "width_bucket"]

# Larger batches keep the GPU busy without graphs, and padding to a bucket would cost them more
# than the launches. Counted on both sides, candidates and padding included.
MOST_POSITIONS = 8192
MOST_GRAPHS = 64

Outputs = tuple[Tensor, ...]
Decode = Callable[..., Outputs]
# Takes a function without arguments; returns one that runs it again, into the same tensors.
Capture = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]


def row_bucket(rows: int) -> int:
    """The power of two that `rows` sentences are padded to."""
    return 1 << (rows - 1).bit_length()


def width_bucket(width: int, longest: int | None, multiple: int = 8) -> int:
    """The multiple that `width` tokens are padded to, if the model has so many positions."""
    padded = -(-width // multiple) * multiple
    return padded if longest is None else max(width, min(padded, longest))


class CudaCapture:
    """`Capture` with `torch.cuda.CUDAGraph`; all graphs share one memory pool.

    That is safe because they run one after the other on one stream, and what one of them wrote
    into the pool is copied out before the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            # Also brings the caller's stream back where the capture fails.
            with torch.cuda.stream(self.stream):
                # Libraries choose and load their kernels in the first calls.
                for _ in range(3):
                    function()
                # What other threads do to the device meanwhile is none of the graph's business.
                with torch.cuda.graph(
                    graph,
                    pool=self.pool,
                    stream=self.stream,
                    capture_error_mode="thread_local",
                ):
                    outputs = function()
            caller.wait_stream(self.stream)

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class _Captured:
    """One graph with the tensors it reads."""

    def __init__(
        self,
        capture: Capture,
        shapes: Sequence[tuple[int, ...]],
        model: TranslationModel,
        decode: Decode,
        inputs: Outputs,
    ) -> None:
        self.inputs = tuple(x.new_empty(s) for x, s in zip(inputs, shapes, strict=True))
        self.fill(inputs)
        self.replay = capture(lambda: decode(*self.inputs))
        # A longer sentence replaces the model's table of positions by a longer one, but the graph
        # goes on reading at the old address.
        self.buffers = list(model.buffers())

    def fill(self, inputs: Outputs) -> None:
        """Rows that are not there are sentences of one EOS with one target token."""
        for number, (static, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if static.shape != given.shape:
                static.fill_(PAD if number == 0 else 1)
                if number == 0:
                    static[:, 0].fill_(EOS)
            static[tuple(map(slice, given.shape))].copy_(given)


class Graphs:
    """The captured graphs of one frozen model; the least recently used ones are dropped.

    Copies, also those that `copy.deepcopy` of the model makes, are empty.
    """

    def __init__(self, capture: Capture | None = None, most: int = MOST_GRAPHS) -> None:
        self._capture, self._most = capture, most
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._lock = threading.Lock()
        self._failed = False

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self,
        key: Hashable,
        shapes: Sequence[tuple[int, ...]],
        model: TranslationModel,
        decode: Decode,
        inputs: Outputs,
    ) -> Outputs | None:
        """`decode(*inputs)` by a graph; None if there is none and none can be captured.

        `inputs` (source `[B, S]`, lengths `[B]`, and perhaps target lengths `[B, n]`) are padded
        to `shapes`; the results, all with rows first, lose the rows that were added. `decode` must
        depend on `key`, `shapes` and the model's weights alone.
        """
        if self._failed:
            return None
        key = key, tuple(shapes)
        with self._lock:
            captured = self._captured.get(key)
            if captured is None:
                captured = self._make(shapes, model, decode, inputs)
                if captured is None:
                    return None
                self._captured[key] = captured
                # Not before the new one was captured: a pool without graphs is given up.
                if len(self._captured) > self._most:
                    self._captured.popitem(last=False)
            else:
                captured.fill(inputs)
            self._captured.move_to_end(key)
            rows = len(inputs[0])
            return tuple(x[:rows].clone() for x in captured.replay())

    def _make(
        self,
        shapes: Sequence[tuple[int, ...]],
        model: TranslationModel,
        decode: Decode,
        inputs: Outputs,
    ) -> _Captured | None:
        try:
            if self._capture is None:
                self._capture = CudaCapture(inputs[0].device)
            return _Captured(self._capture, shapes, model, decode, inputs)
        except RuntimeError as error:  # CUDA's errors, lack of memory among them
            self._failed = True
            warnings.warn(
                f"CUDA graphs are not used for this model, because capturing one failed; decoding "
                f"goes on without (the strategy's `graphs=False` never tries). {error}",
                stacklevel=6,
            )
            return None


def graphs_of(model: TranslationModel, source: Tensor) -> Graphs | None:
    """The model's graphs, or None where they cannot be used.

    They are for frozen models on CUDA with kernels of our own (the references copy from the host),
    outside of autocast, which casts weights when it sees them first, and of captures of the
    caller's. All graphs of a model share memory, so only the default stream runs them.
    """
    if not (model.frozen and source.is_cuda) or implementation("cuda").name == "reference":
        return None
    if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return None
    device = source.device
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return None
    if model.graphs is None:
        model.graphs = Graphs()
    graphs: Any = model.graphs
    return graphs


class Limited(Protocol):
    """A strategy that gives a source of S tokens at most `max_ratio` * S + `max_extra` tokens."""

    @property
    def max_ratio(self) -> float: ...
    @property
    def max_extra(self) -> int: ...


def by_graph(
    strategy: Limited,
    search: Callable[..., Hypotheses],
    model: TranslationModel,
    source: Tensor,
    source_lengths: Tensor,
    target_lengths: Tensor | None = None,
    *,
    candidates: int = 1,
    longest: int = 0,
    multiple: int = 8,
) -> Hypotheses | None:
    """`search(source, source_lengths, [target_lengths,] width=...)` by a captured graph.

    All that `search` depends on beside these is the hashable `strategy` and the model's weights; it
    must not wait for the device. Given `target_lengths: [B, ...]` are at most `longest`. The width
    of its results is a multiple of `multiple` where the model has no longest sequence.

    Returns:
        None where graphs cannot be used, or where the batch is too large for them.
    """
    graphs = graphs_of(model, source) if source.numel() else None
    if graphs is None:
        return None
    rows, span = row_bucket(len(source)), width_bucket(source.shape[1], model.longest)
    shapes: list[tuple[int, ...]] = [(rows, span), (rows,)]
    inputs: Outputs = (source, source_lengths)
    if target_lengths is None:
        # What the bucket's longest source may give, so that the width itself limits nothing;
        # one more, because `length_limits` may round otherwise.
        longest = int(span * strategy.max_ratio) + strategy.max_extra + 1
        longest = min(longest, model.longest or longest)
    else:
        shapes.append((rows, *target_lengths.shape[1:]))
        inputs += (target_lengths,)
    width = width_bucket(longest, model.longest, multiple)
    if rows * max(span, candidates * width) > MOST_POSITIONS:
        return None

    def decode(*inputs: Tensor) -> Outputs:
        found = search(*inputs, width=width)
        return found.tokens, found.lengths, found.scores, found.passes

    results = graphs.run((strategy, width), shapes, model, decode, inputs)
    if results is None:
        return None
    tokens, lengths, scores, passes = results
    return Hypotheses(tokens, lengths, scores, passes)
