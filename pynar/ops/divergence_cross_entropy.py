from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pynar import reference
from pynar.ops import _nvrtc
from pynar.ops._checks import Check
from pynar.ops._operator import Operator

__all__ = ["divergence_cross_entropy"]

MAX_HEADS = 4
_NAME = "divergence_cross_entropy"


def divergence_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    pairs: Sequence[tuple[int, int]] = (),
    *,
    label_smoothing: float = 0.0,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns the cross-entropies of several heads for the same targets, and how far they differ.

    With :math:`p^h` the softmax of a row :math:`x^h` of head :math:`h`, :math:`y` its target and
    :math:`\varepsilon` the label smoothing,

    .. math:: \mathrm{CE}_h = -(1 - \varepsilon) \log p^h_y
                  - \frac{\varepsilon}{V} \sum_v \log p^h_v, \qquad
              K_{pq} = \tfrac12 [\mathrm{KL}(p \| q) + \mathrm{KL}(q \| p)]
                     = \tfrac12 \sum_v (p_v - q_v)(\log p_v - \log q_v),

    the losses of JANUS (Liang et al., 2022) and of R-Drop and mutual learning alike. Both carry
    gradients into every head; detach one to have it teach the other. The logits are read once here
    and once for the gradients, which are written in the logits' type; nothing else of size `[N, V]`
    is allocated. Sums are in float32, or in float64 for float64 logits.

    The cross-entropy is that of :func:`torch.nn.functional.cross_entropy` with
    ``reduction="none"``, for logits of -inf too. A symbol whose logit is -inf in both heads of a
    pair adds nothing to their divergence; in one of them alone, it makes the divergence inf,
    however improbable the other finds it. A row of a head that has no distribution (a NaN or +inf
    in it, or -inf throughout) makes NaN of what depends on it in that row, and of nothing else. In
    the gradient of a row a term with factor 0 has no part, even where it is not finite; an infinite
    divergence with another factor gives NaN.

    Args:
        logits: one to four heads, each `[N, V]`, float32, bfloat16, float16 or float64; or all
            heads in one tensor, `[C, N, V]`. Of each, only the last dimension must be contiguous.
            Where one matrix product makes the rows of all heads, `[C N, V]`, pass its
            ``view(C, N, V)``: its gradient then comes in one piece, while slices or ``unbind()``
            would cost another pass to join theirs. With `sizes`, one tensor `[R, V]`.
        targets: `[N]`, int64, each in `[0, V)`. A target outside raises an error on the CPU and
            gives NaN on a GPU.
        pairs: the pairs of heads whose divergence is wanted, by index; each at most once.
        label_smoothing: :math:`\varepsilon`, from 0 to 1.
        sizes: how many rows each head has, where they differ: the rows of `logits: [R, V]` are
            those of the first head, then those of the next. A head predicts as many of the N
            targets as it has rows, the first ones, and the longest head all of them; pairs are
            compared in the first M rows, as many as the shortest head has.

    Returns:
        The cross-entropies, `[C, N]`, and the divergences, `[P, N]`, in nats a row; both float32
        (float64 for float64 logits). With `sizes`, `[R]` and `[P, M]`.

    Example:
        >>> ar = torch.zeros(1, 2)
        >>> nar = torch.tensor([[1.0, 3.0]]).log()
        >>> cross_entropy, divergence = divergence_cross_entropy(
        ...     (ar, nar), torch.tensor([0]), pairs=[(0, 1)]
        ... )
        >>> cross_entropy.exp()
        tensor([[2.],
                [4.]])
        >>> divergence
        tensor([[0.1373]])
    """
    heads = (logits,) if isinstance(logits, Tensor) else tuple(logits)
    flat = [head for pair in pairs for head in pair]
    if sizes is not None and not isinstance(sizes, Sequence):
        Check(_NAME).fail("sizes", "be a sequence of numbers", f"{sizes!r}")
    settings = flat, label_smoothing, None if sizes is None else list(sizes)
    if torch.is_grad_enabled() and any(x.requires_grad for x in heads):
        cross_entropy, divergence, _ = _Differentiable.apply(targets, settings, *heads)
    else:
        cross_entropy, divergence, _ = _FORWARD.call(heads, targets, *settings)
    return cross_entropy, divergence


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        targets: Tensor, settings: tuple[Any, ...], *logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _FORWARD.call(logits, targets, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        targets, ctx.settings, *logits = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(targets, output[2], *logits)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_cross_entropy: Tensor, grad_divergence: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        targets, statistics, *logits = ctx.saved_tensors
        grads = _BACKWARD.call(
            grad_cross_entropy,
            grad_divergence,
            logits,
            targets,
            statistics,
            *ctx.settings,
        )
        return (None, None, *grads)


# Heads `[N, V]`, their targets and the pairs among them, flat.
Part = tuple[list[Tensor], Tensor, list[int]]
Results = tuple[Tensor, Tensor, Tensor]


def _parts(heads: list[Tensor], targets: Tensor, pairs: list[int]) -> list[Part]:
    """What heads of different lengths are computed as: their first rows together, and what is left
    of each that is longer."""
    # Not len(), which would make a number of what is a symbol to the compiler.
    shared = min(head.shape[0] for head in heads)
    first = [head[:shared] for head in heads], targets[:shared], pairs
    longer = [head for head in heads if head.shape[0] > shared]
    return [first, *(([head[shared:]], targets[shared : head.shape[0]], []) for head in longer)]


def _by_parts(
    compute: Callable[[list[Tensor], Tensor, list[int]], Results],
    logits: Sequence[Tensor],
    targets: Tensor,
    pairs: list[int],
    sizes: list[int],
) -> Results:
    heads = list(logits[0].split(sizes))
    results = [compute(*part) for part in _parts(heads, targets, pairs)]
    (first, divergence, _), *rest = results
    rows: list[Tensor] = []
    for own, size in zip(first.unbind(), sizes, strict=True):
        rows.append(own)
        if size > own.shape[0]:
            rows.append(rest.pop(0)[0][0])
    return torch.cat(rows), divergence, torch.cat([part[2].flatten() for part in results])


def _gradient_parts(
    grad_cross_entropy: Tensor,
    grad_divergence: Tensor,
    statistics: Tensor,
    parts: list[Part],
    sizes: list[int],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The gradients of the results of each part, and its statistics."""
    shared = min(sizes)
    own = grad_cross_entropy.split(sizes)
    grads = [torch.stack([x[:shared] for x in own]), *(x[None, shared:] for x in own)]
    grads = [grads[0], *(x for x in grads[1:] if x.shape[1] > 0)]
    shapes = [(2 * len(x) + len(part[2]), x.shape[1]) for x, part in zip(grads, parts, strict=True)]
    pieces = statistics.split([rows * width for rows, width in shapes])
    nothing = [statistics.new_empty(0, width) for _, width in shapes[1:]]
    return [
        (grad, divergence, piece.view(shape))
        for grad, divergence, piece, shape in zip(
            grads, [grad_divergence, *nothing], pieces, shapes, strict=True
        )
    ]


def _heads(logits: Sequence[Tensor]) -> list[Tensor]:
    """The heads, `[N, V]` each, of one tensor `[C, N, V]` or of a list of them."""
    stacked = len(logits) == 1 and logits[0].dim() == 3
    return list(logits[0].unbind()) if stacked else list(logits)


def _accumulation(logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if logits[0].dtype == torch.float64 else torch.float32


def _readable(logits: Sequence[Tensor]) -> list[Tensor]:
    # Unlike contiguous(), clone() gives empty tensors new strides, too.
    return [
        x if x.dim() == 0 or x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
        for x in _heads(logits)
    ]


def _native(
    extension: Any,
    logits: Sequence[Tensor],
    targets: Tensor,
    pairs: list[int],
    label_smoothing: float,
    sizes: list[int] | None = None,
) -> Results:
    def compute(heads: list[Tensor], targets: Tensor, pairs: list[int]) -> Results:
        if not heads or heads[0].dim() != 2:
            _check(Check(_NAME), heads, targets, pairs, label_smoothing)
        results = _fake(heads, targets, pairs, label_smoothing)
        plan = extension.divergence_cross_entropy(heads, targets, pairs, label_smoothing, *results)
        if plan is not None:
            _nvrtc.launch(plan)
        return results

    if sizes is None:
        return compute(_readable(logits), targets, pairs)
    _check_sizes(Check(_NAME), logits, targets, pairs, label_smoothing, sizes)
    return _by_parts(compute, _readable(logits), targets, pairs, sizes)


def _backward_native(
    extension: Any,
    grad_cross_entropy: Tensor,
    grad_divergence: Tensor,
    logits: Sequence[Tensor],
    targets: Tensor,
    statistics: Tensor,
    pairs: list[int],
    label_smoothing: float,
    sizes: list[int] | None = None,
) -> list[Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in logits]
    heads, grad_heads = _readable(logits), _heads(grads)
    parts = [(heads, targets, pairs)]
    results = [(grad_cross_entropy, grad_divergence, statistics)]
    into = [grad_heads]
    if sizes is not None:
        parts = _parts(list(heads[0].split(sizes)), targets, pairs)
        results = _gradient_parts(*results[0], parts, sizes)
        into = [part[0] for part in _parts(list(grad_heads[0].split(sizes)), targets, pairs)]
    for part, (grad, divergence, numbers), to in zip(parts, results, into, strict=True):
        heads, targets, pairs = part
        plan = extension.divergence_cross_entropy_backward(
            grad, divergence, heads, targets, numbers.contiguous(), pairs, label_smoothing, to
        )
        if plan is not None:
            _nvrtc.launch(plan)
    return grads


def _check(
    check: Check, logits: Sequence[Tensor], targets: Tensor, pairs: list[int], smoothing: float
) -> None:
    heads = _heads(logits)
    if not 1 <= len(heads) <= MAX_HEADS:
        check.fail("logits", f"have 1 to {MAX_HEADS} heads", len(heads))
    for i, head in enumerate(heads):
        name = f"logits[{i}]"
        check.dims(name, head, 2, "[N, V]")
        wanted = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        check.dtype(name, head, wanted if i == 0 else (heads[0].dtype,))
        check.shape(name, head, list(heads[0].shape), "that of `logits[0]`")
        check.device(name, head, "logits[0]", heads[0])
    rows, vocabulary = heads[0].shape
    if vocabulary == 0:
        check.fail("logits[0]", "have at least one symbol", 0)
    check.shape("targets", targets, [rows], "rows of `logits[0]`")
    check.dtype("targets", targets, (torch.int64,))
    check.device("targets", targets, "logits[0]", heads[0])
    if len(pairs) % 2 != 0:
        check.fail("pairs", "be in twos", len(pairs))
    seen: set[frozenset[int]] = set()
    for pair in zip(pairs[::2], pairs[1::2], strict=True):
        if pair[0] == pair[1] or not all(0 <= head < len(heads) for head in pair):
            check.fail("pairs", f"be of two different heads in [0, {len(heads)})", pair)
        if frozenset(pair) in seen:
            check.fail("pairs", "have each pair once", f"{pair} again")
        seen.add(frozenset(pair))
    if not 0 <= smoothing <= 1:
        check.fail("label_smoothing", "be in [0, 1]", f"{smoothing:.6f}")


def _check_sizes(
    check: Check,
    logits: Sequence[Tensor],
    targets: Tensor,
    pairs: list[int],
    smoothing: float,
    sizes: list[int],
) -> None:
    """All that is to be checked where heads have different lengths."""
    if len(logits) != 1:
        check.fail("logits", "be one tensor where there are `sizes`", f"{len(logits)} heads")
    check.dims("logits", logits[0], 2, "[R, V] where there are `sizes`")
    if not 1 <= len(sizes) <= MAX_HEADS:
        check.fail("sizes", f"be those of 1 to {MAX_HEADS} heads", sizes)
    if min(sizes) < 0 or sum(sizes) != logits[0].shape[0]:
        check.fail("sizes", f"sum up to the rows of `logits`, {logits[0].shape[0]}", sizes)
    check.shape("targets", targets, [max(sizes)], "the greatest of `sizes`")
    shared = min(sizes)
    heads = [head[:shared] for head in logits[0].split(sizes)]
    _check(check, heads, targets[:shared], pairs, smoothing)
    # Here, since a part counts rows from where it begins.
    _check_targets(check, targets, logits[0].shape[1])


def _check_targets(check: Check, targets: Tensor, vocabulary: int) -> None:
    if targets.device.type != "cpu":
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    for row in wrong.nonzero()[:1, 0].tolist():
        got = f"{int(targets[row])} (row {row})"
        check.fail("targets", f"have values in [0, {vocabulary})", got)


def _reference(
    logits: Sequence[Tensor],
    targets: Tensor,
    pairs: list[int],
    label_smoothing: float,
    sizes: list[int] | None = None,
) -> Results:
    check = Check(_NAME)
    if sizes is not None:
        _check_sizes(check, logits, targets, pairs, label_smoothing, sizes)

        def compute(heads: list[Tensor], targets: Tensor, pairs: list[int]) -> Results:
            return _reference(heads, targets, pairs, label_smoothing)

        return _by_parts(compute, logits, targets, pairs, sizes)
    _check(check, logits, targets, pairs, label_smoothing)
    heads = _heads(logits)
    _check_targets(check, targets, heads[0].shape[1])
    return reference.divergence_cross_entropy(
        heads, targets, _in_twos(pairs), label_smoothing=label_smoothing
    )


def _in_twos(pairs: list[int]) -> list[tuple[int, int]]:
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def _fake(
    logits: Sequence[Tensor],
    targets: Tensor,
    pairs: list[int],
    label_smoothing: float,
    sizes: list[int] | None = None,
) -> Results:
    if sizes is not None:

        def compute(heads: list[Tensor], targets: Tensor, pairs: list[int]) -> Results:
            return _fake(heads, targets, pairs, label_smoothing)

        return _by_parts(compute, logits, targets, pairs, sizes)
    heads = _heads(logits)
    rows = heads[0].shape[0]

    def new(count: int) -> Tensor:
        return heads[0].new_empty((count, rows), dtype=_accumulation(heads))

    count = len(pairs) // 2
    return new(len(heads)), new(count), new(2 * len(heads) + 2 * count)


def _backward_reference(
    grad_cross_entropy: Tensor,
    grad_divergence: Tensor,
    logits: Sequence[Tensor],
    targets: Tensor,
    statistics: Tensor,
    pairs: list[int],
    label_smoothing: float,
    sizes: list[int] | None = None,
) -> list[Tensor]:
    if sizes is not None:
        parts = _parts(list(logits[0].split(sizes)), targets, pairs)
        results = (grad_cross_entropy, grad_divergence, statistics)
        each = _gradient_parts(*results, parts, sizes)
        first, *longer = (
            _backward_reference(*result[:2], *part[:2], result[2], part[2], label_smoothing)
            for part, result in zip(parts, each, strict=True)
        )
        grads = []
        for head, size in zip(first, sizes, strict=True):
            grads.append(head)
            if size > len(head):
                grads += longer.pop(0)
        return [torch.cat(grads)]
    check = Check("divergence_cross_entropy_backward")
    _check(check, logits, targets, pairs, label_smoothing)
    heads = _heads(logits)
    rows, count = heads[0].shape[0], len(pairs) // 2
    for name, tensor, size in (
        ("grad_cross_entropy", grad_cross_entropy, len(heads)),
        ("grad_divergence", grad_divergence, count),
        ("statistics", statistics, 2 * len(heads) + 2 * count),
    ):
        check.shape(name, tensor, [size, rows], "as the forward pass returned")
        check.dtype(name, tensor, (_accumulation(heads),))
        check.device(name, tensor, "logits[0]", heads[0])
    grads = reference.divergence_cross_entropy_backward(
        grad_cross_entropy,
        grad_divergence,
        heads,
        targets,
        statistics,
        _in_twos(pairs),
        label_smoothing,
    )
    return [torch.stack(grads)] if logits[0].dim() == 3 else grads


def _backward_fake(
    grad_cross_entropy: Tensor, grad_divergence: Tensor, logits: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in logits]


_FORWARD = Operator(
    "divergence_cross_entropy(Tensor[] logits, Tensor targets, int[] pairs, "
    "float label_smoothing, SymInt[]? sizes=None) -> (Tensor, Tensor, Tensor)",
    native=_native,
    reference=_reference,
    fake=_fake,
)

_BACKWARD = Operator(
    "divergence_cross_entropy_backward(Tensor grad_cross_entropy, Tensor grad_divergence, "
    "Tensor[] logits, Tensor targets, Tensor statistics, int[] pairs, float label_smoothing, "
    "SymInt[]? sizes=None) -> Tensor[]",
    native=_backward_native,
    reference=_backward_reference,
    fake=_backward_fake,
)
