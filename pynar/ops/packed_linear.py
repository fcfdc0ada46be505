"""Linear maps with weights packed once for the CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pynar import _backend, reference
from pynar.ops._checks import Check
from pynar.ops._operator import Operator

__all__ = ["PackedWeight", "pack_linear", "packed_linear"]

# csrc/linear/panel.h says the same to the kernels.
PANEL = 64  # columns that are computed together
INT8_DEPTH = 1 << 16  # up to which sums of int8 products fit 32 bits
_PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
ACTIVATIONS = ("none", "relu", "gelu")
_CHECK = Check("packed_linear")


def strip_columns() -> int:
    """Columns of a panel whose words follow each other, for the instruction set in use."""
    extension = _backend.extension()
    wide = extension is not None and extension.simd_level().startswith("avx512")
    return PANEL if wide else 16


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[out_features, in_features]` in the layout of the CPU kernels.

    `data: [strips, steps, columns of a strip, depth per word]` in float32, bfloat16 or int8; int8
    has a scale and the sum of the quantised weights for each output feature. All are padded to
    whole panels of 64 columns.
    """

    data: Tensor
    scales: Tensor | None
    column_sums: Tensor | None
    out_features: int
    in_features: int

    def check_input(self, check: Check, x: Tensor) -> None:
        """Checks the width of `x`, which the padded layout does not tell."""
        if x.dim() == 2 and x.shape[1] != self.in_features:
            check.fail("x", f"have {self.in_features} columns (depth of `weight`)", x.shape[1])

    def unpack(self) -> Tensor:
        """The weight that the kernels multiply with, float32 `[out_features, in_features]`."""
        rows = self.data.transpose(1, 2).flatten(2).flatten(0, 1).float()
        if self.scales is not None:
            rows = rows * self.scales[:, None]
        return rows[: self.out_features, : self.in_features]


def pack_linear(weight: Tensor, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Packs `weight: [out_features, in_features]` as float32, bfloat16 or int8.

    int8 weights are rounded symmetrically to [-127, 127] with one scale an output feature. Where
    the processor adds products of bytes in 16 bits (AVX2), sums of two neighbours are bounded as
    well, see `pynar.reference.round_weight`. A weight is for the instruction set it was packed
    under, which the layout depends on, too.

    Raises:
        ValueError: `weight` is no matrix on the CPU, or `dtype` is another.
    """
    check = Check("pack_linear")
    check.dims("weight", weight, 2, "[out_features, in_features]")
    check.cpu("weight", weight)
    if dtype not in _PER_WORD:
        check.fail("dtype", "be torch.float32, torch.bfloat16 or torch.int8", dtype)
    rows, depth = weight.shape
    if depth == 0:
        check.fail("weight", "have at least one column", 0)
    if dtype == torch.int8 and depth > INT8_DEPTH:
        check.fail("weight", f"have at most {INT8_DEPTH} columns in int8", depth)
    per_word = _PER_WORD[dtype]
    missing = (-depth % per_word, -rows % PANEL)
    padded = torch.nn.functional.pad(weight.detach().float(), (0, missing[0], 0, missing[1]))
    scales = column_sums = None
    if dtype == torch.int8:
        extension = _backend.extension()
        pairs = extension is not None and extension.simd_level() == "avx2"
        padded, scales = reference.round_weight(padded, pairs=pairs)
    padded = padded.to(dtype)
    if dtype == torch.int8:
        column_sums = padded.sum(1, dtype=torch.int32)
    strips = padded.view(-1, strip_columns(), padded.shape[1] // per_word, per_word)
    data = strips.transpose(1, 2).contiguous()
    return PackedWeight(data, scales, column_sums, rows, depth)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    input_norm: float | None = None,
    output_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    r"""A linear map with what surrounds it in a Transformer, for inference on the CPU.

    .. math::
        h = x \ \text{or}\ (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon}, \qquad
        z = f(h W^T + b) + r, \qquad y = z \ \text{or}\ \mathrm{LayerNorm}(z)

    Inputs and outputs are float32; products are computed in the weight's type. With an int8
    weight each row of `h` is rounded to 256 steps over its own range, so that no row depends on
    another; with bfloat16 it is rounded to bfloat16. Sums are fp32 (int32 for int8), in
    an order that depends neither on the other rows nor on the number of threads. Not
    differentiable.

    Args:
        x: `[N, in_features]`.
        weight: from `pack_linear`.
        bias: `[out_features]`.
        activation: f, one of "none", "relu", "gelu".
        residual: r, `[N, out_features]`.
        input_norm: epsilon of a layer normalisation of `x` without an affine part (which can be
            folded into `weight` and `bias`); None for no normalisation.
        output_norm: weight, bias `[out_features]` and epsilon of a layer normalisation of z.

    Returns:
        y, `[N, out_features]`.
    """
    check = _CHECK
    if not isinstance(weight, PackedWeight):
        check.fail("weight", "be a PackedWeight from pack_linear", type(weight).__name__)
    weight.check_input(check, x)
    if activation not in ACTIVATIONS:
        check.fail("activation", f"be one of {', '.join(ACTIVATIONS)}", activation)
    if input_norm is not None and not input_norm >= 0:
        check.fail("input_norm", "be at least 0", input_norm)
    norm_weight, norm_bias, output_eps = output_norm or (None, None, 0.0)
    if not output_eps >= 0:
        check.fail("output_norm", "have an epsilon of at least 0", output_eps)
    operator: Any = _OPERATOR
    if torch.is_grad_enabled():
        x, bias, residual = x.detach(), _detached(bias), _detached(residual)
        norm_weight, norm_bias = _detached(norm_weight), _detached(norm_bias)
    elif not torch.compiler.is_compiling():
        # Past the dispatcher, which takes longer than a small layer of one row does.
        operator = _OPERATOR.direct(x)
    return operator(
        x,
        weight.data,
        weight.scales,
        weight.column_sums,
        bias,
        residual,
        norm_weight,
        norm_bias,
        weight.out_features,
        ACTIVATIONS.index(activation),
        -1.0 if input_norm is None else input_norm,
        output_eps,
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _native(
    extension: Any,
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    out_features: int,
    activation: int,
    input_eps: float,
    output_eps: float,
) -> Tensor:
    y = x.new_empty(x.shape[0] if x.dim() == 2 else 0, out_features)
    # Most are contiguous, which is the quickest question.
    if not x.is_contiguous() and x.dim() == 2 and x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None and not residual.is_contiguous():
        if residual.dim() == 2 and residual.stride(1) != 1:
            residual = residual.contiguous()
    extension.packed_linear(
        x,
        data,
        scales,
        column_sums,
        None if bias is None else bias.contiguous(),
        residual,
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        activation,
        input_eps,
        output_eps,
        y,
    )
    return y


def _reference(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    out_features: int,
    activation: int,
    input_eps: float,
    output_eps: float,
) -> Tensor:
    check = _CHECK
    check.dims("x", x, 2, "[N, K]")
    check.dtype("x", x, (torch.float32,))
    check.cpu("x", x)
    check_packed(check, data, scales, column_sums, x.shape[1], out_features)
    if not 0 <= activation < len(ACTIVATIONS):
        check.fail("activation", f"be in [0, {len(ACTIVATIONS) - 1}]", activation)
    rows = [x.shape[0], out_features]
    for name, tensor, wanted, meaning in (
        ("bias", bias, rows[1:], "columns of `weight`"),
        ("residual", residual, rows, "rows of `x`, columns of `weight`"),
        ("norm_weight", norm_weight, rows[1:], "columns of `weight`"),
        ("norm_bias", norm_bias, rows[1:], "columns of `weight`"),
    ):
        if tensor is not None:
            check.shape(name, tensor, wanted, meaning)
            check.dtype(name, tensor, (torch.float32,))
            check.cpu(name, tensor)
    if (norm_weight is None) != (norm_bias is None):
        got = "None" if norm_bias is None else "it alone"
        check.fail("norm_bias", "be given with `norm_weight`, and only then", got)
    weight = PackedWeight(data, scales, column_sums, out_features, x.shape[1])
    norm = None
    if norm_weight is not None and norm_bias is not None:
        norm = (norm_weight, norm_bias, output_eps)
    return reference.packed_linear(
        x,
        weight.unpack(),
        bias,
        data.dtype,
        ACTIVATIONS[activation],
        residual,
        input_eps if input_eps >= 0 else None,
        norm,
    )


def check_packed(
    check: Check,
    data: Tensor,
    scales: Tensor | None,
    column_sums: Tensor | None,
    depth: int,
    columns: int,
) -> None:
    """The checks of a packed weight that the extension makes in csrc/linear/host.h."""
    check.dims("weight", data, 4, "[strips, steps, columns of a strip, depth per word]")
    check.dtype("weight", data, tuple(_PER_WORD))
    check.cpu("weight", data)
    per_word = _PER_WORD[data.dtype]
    padded, strip = -(-columns // PANEL) * PANEL, strip_columns()
    if data.shape[2] != strip:
        extension = _backend.extension()
        level = "the reference" if extension is None else extension.simd_level()
        wanted = f"be packed for {level}, in strips of {strip} columns"
        check.fail("weight", wanted, data.shape[2])
    shape = [padded // strip, -(-depth // per_word), strip, per_word]
    meaning = "strips for all columns, steps for the depth of `x`"
    check.shape("weight", data, shape, meaning)
    if data.dtype == torch.int8:
        if depth > INT8_DEPTH:
            check.fail("x", f"have at most {INT8_DEPTH} columns with an int8 weight", depth)
        if scales is None or column_sums is None:
            check.fail("scales", "be given for an int8 weight", "None")
        for name, tensor, dtype in (
            ("scales", scales, torch.float32),
            ("column_sums", column_sums, torch.int32),
        ):
            check.shape(name, tensor, [padded], "columns, padded to panels")
            check.dtype(name, tensor, (dtype,))
            check.cpu(name, tensor)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0] if x.dim() > 0 else 0, rest[7])


_OPERATOR = Operator(
    "packed_linear(Tensor x, Tensor data, Tensor? scales, Tensor? column_sums, Tensor? bias, "
    "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, int out_features, int activation, "
    "float input_eps, float output_eps) -> Tensor",
    native=_native,
    reference=_reference,
    fake=_fake,
    cpu_only="packed weights are for CPUs",
)
