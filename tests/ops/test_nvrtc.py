"""The route for a GPU whose machine has no nvcc, as far as it goes without a GPU."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from pynar import _backend
from pynar.ops import _nvrtc

DTYPES = ("float", "double", "pynar::BFloat16", "pynar::Half")


def _attention(rows: tuple[str, ...], tiles: tuple[str, ...]) -> list[str]:
    by_row = [f"pynar::interval_attention_{k}<{dtype}, 128>" for k in rows for dtype in DTYPES]
    by_tile = [
        f"pynar::interval_attention_{k}<{dtype}, {dim}>"
        for k in tiles
        for dtype, dim in (
            ("pynar::BFloat16", 32),
            ("pynar::BFloat16", 64),
            ("pynar::Half", 96),
            ("pynar::Half", 128),
        )
    ]
    return by_row + by_tile


EVERY_KERNEL = [
    ("attention/interval_attention.cuh", _attention(("rows",), ("tiles",))),
    (
        "attention/interval_attention_backward.cuh",
        _attention(
            ("delta", "hulls", "grad_q_rows", "grad_kv_rows"), ("grad_q_tiles", "grad_kv_tiles")
        ),
    ),
    (
        "decoding/mask_predict_step.cuh",
        [
            f"pynar::mask_predict_{kernel}<{dtype}, {threads}>"
            for dtype in DTYPES
            for kernel, threads in (("partials", 64), ("partials", 256), ("finish", 128))
        ],
    ),
    (
        "flow/affine_coupling.cuh",
        [
            f"pynar::affine_coupling_{kernel}<{dtype}, 128>"
            for dtype in DTYPES
            for kernel in ("steps", "sums", "gradient")
        ],
    ),
    (
        "flow/batched_logdet.cuh",
        [f"pynar::batched_logdet_invert<{dtype}, 256>" for dtype in ("float", "double")],
    ),
    (
        "flow/flow_linear.cuh",
        [
            f"pynar::flow_{kernel}<{dtype}, 128>"
            for dtype in DTYPES
            for kernel in ("copy", "linear_steps", "linear_gradient", "linear_finish")
        ],
    ),
    (
        "linear/linear_argmax.cuh",
        [
            *(
                f"pynar::linear_argmax_partials<{dtype}, {most}>"
                for dtype in ("float", "pynar::BFloat16", "pynar::Half")
                for most in (1, 16)
            ),
            "pynar::linear_argmax_finish<128>",
        ],
    ),
    *(
        (
            f"losses/divergence_cross_entropy{file}.cuh",
            [
                f"pynar::divergence_cross_entropy_{kernel}<{dtype}, {heads}>"
                for dtype in DTYPES
                for heads in (1, 2, 3, 4)
            ],
        )
        for file, kernel in (("", "rows"), ("_backward", "gradient"))
    ),
]


def _compile(source: str, kernels: list[str]) -> None:
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    try:
        program = compiler._NVRTCProgram(
            _nvrtc.program(source), "kernel.cu", name_expressions=tuple(kernels)
        )
    except RuntimeError as error:
        pytest.skip(f"no NVRTC library: {error}")
    code, mapping = program.compile((*_nvrtc.options(), "-arch=compute_80"))
    code = code if isinstance(code, str) else code.decode()
    for kernel in kernels:
        assert f".entry {mapping[kernel]}(" in code


def test_every_source_is_covered() -> None:
    folder = _backend.device_sources()
    assert folder is not None
    sources = {str(path.relative_to(folder)) for path in folder.glob("*/*.cuh")}
    sources = {source for source in sources if not source.startswith("common/")}
    assert sources == {source for source, _ in EVERY_KERNEL}


@pytest.mark.parametrize(
    ("source", "kernels"), EVERY_KERNEL, ids=lambda x: x if isinstance(x, str) else ""
)
def test_kernels_compile_without_a_gpu(source: str, kernels: list[str]) -> None:
    _compile(source, kernels)


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class _OnGpu:
    """An array that says it lies on a GPU, at an address that nobody may follow."""

    def __init__(self, address: int, shape: tuple[int, ...], code: int, bits: int) -> None:
        strides = [1] * len(shape)
        for d in range(len(shape) - 2, -1, -1):
            strides[d] = strides[d + 1] * shape[d + 1]
        sizes = ctypes.c_int64 * len(shape)
        self.keep = (sizes(*shape), sizes(*strides))
        self.array = _Array(address, 2, 0, len(shape), code, bits, 1, *self.keep, 0, None, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.array), b"dltensor", None)


def test_plan_names_kernels_and_carries_parameters(extension: Any) -> None:
    batch, steps, vocabulary = 2, 3, 9000
    size = extension.mask_predict_step_workspace(batch, steps, vocabulary, 2)
    bfloat, integer, floating, unsigned = 4, 0, 2, 1
    arrays = [
        _OnGpu(0x1000, (batch, steps, vocabulary), bfloat, 16),
        _OnGpu(0x2000, (batch, steps), integer, 64),
        _OnGpu(0x3000, (batch, steps), floating, 32),
        _OnGpu(0x4000, (batch,), integer, 64),
        _OnGpu(0x5000, (batch,), integer, 64),
        _OnGpu(0x6000, (batch, steps), integer, 64),
        _OnGpu(0x7000, (batch, steps), floating, 32),
        _OnGpu(0x8000, (size,), unsigned, 8),
    ]
    extension.set_use_nvrtc(True)
    try:
        plan = extension.mask_predict_step(*arrays)
    finally:
        extension.set_use_nvrtc(False)
    assert plan.kernels == [
        ("pynar::mask_predict_partials<pynar::BFloat16, 256>", batch * steps * 2, 256),
        ("pynar::mask_predict_finish<pynar::BFloat16, 128>", batch, 128),
    ]
    fields = struct.unpack(f"<{len(plan.parameters) // 8}q", plan.parameters)
    assert fields[:8] == tuple(0x1000 * i for i in range(1, 9))
    assert fields[8:11] == (steps, vocabulary, 2)
    assert fields[11:13] == (steps * vocabulary, vocabulary)
    assert fields[-1] == 1
    _compile(plan.source, [kernel for kernel, _, _ in plan.kernels])


def test_plan_of_linear_argmax(extension: Any) -> None:
    rows, channels, vocabulary = 70, 24, 3000
    integer, unsigned, floating, bfloat = 0, 1, 2, 4
    for k, most, offset, aligned in ((1, 1, 0, 1), (5, 16, 2, 0)):
        size = extension.linear_argmax_workspace(rows, vocabulary, k)
        assert size == rows * 2 * 24 * 8 * (1 + k)
        x, weight, bias, tokens, log_probs, lse, workspace = (
            _OnGpu(0x1000, (rows, channels), bfloat, 16),
            _OnGpu(0x2000 + offset, (vocabulary, channels), bfloat, 16),
            _OnGpu(0x3000, (vocabulary,), floating, 32),
            _OnGpu(0x4000, (rows, k), integer, 64),
            _OnGpu(0x5000, (rows, k), floating, 32),
            _OnGpu(0x6000, (rows,), floating, 32),
            _OnGpu(0x10000, (size,), unsigned, 8),
        )
        arguments = (x, weight, None, None, bias, vocabulary, k, tokens, log_probs, lse)
        extension.set_use_nvrtc(True)
        try:
            plan = extension.linear_argmax(*arguments, workspace)
            with pytest.raises(
                ValueError, match="linear_argmax: `workspace` must be given on cuda"
            ):
                extension.linear_argmax(*arguments, None)
        finally:
            extension.set_use_nvrtc(False)
        assert plan.kernels == [
            (f"pynar::linear_argmax_partials<pynar::BFloat16, {most}>", 2 * 24, 128),
            ("pynar::linear_argmax_finish<128>", 18, 128),
        ]
        fields = struct.unpack(f"<{len(plan.parameters) // 8}q", plan.parameters)
        assert fields == (
            *(0x1000, 0x2000 + offset, 0x3000, 0x10000, 0x10000 + rows * 2 * 24 * 8),
            *(0x4000, 0x5000, 0x6000),
            *(rows, channels, vocabulary, k, 24, channels, channels, aligned),
        )


@pytest.mark.parametrize(("queries", "form"), [(70, "tiles"), (2, "rows")])
def test_attention_plans_name_kernels_and_carry_parameters(
    extension: Any, queries: int, form: str
) -> None:
    heads, keys, dim = 3, 80, 40
    bfloat, integer, floating, unsigned = 4, 0, 2, 1
    q = _OnGpu(0x1000, (queries, heads, dim), bfloat, 16)
    k = _OnGpu(0x2000, (keys, heads, dim), bfloat, 16)
    v = _OnGpu(0x3000, (keys, heads, dim), bfloat, 16)
    intervals = _OnGpu(0x4000, (queries, 2, 2), integer, 32)
    out = _OnGpu(0x5000, (queries, heads, dim), bfloat, 16)
    lse = _OnGpu(0x6000, (queries, heads), floating, 32)
    size = extension.interval_attention_backward_workspace(1, heads, queries, 2)
    workspace = _OnGpu(0x7000, (size,), unsigned, 8)
    extension.set_use_nvrtc(True)
    try:
        forward = extension.interval_attention(q, k, v, intervals, 0.5, out, lse)
        backward = extension.interval_attention_backward(
            out, q, k, v, intervals, out, lse, 0.5, q, k, v, workspace
        )
    finally:
        extension.set_use_nvrtc(False)
    argument = 64 if form == "tiles" else 128
    blocks = heads * 2 if form == "tiles" else heads * 2 // 4 + 1
    ending = f"{form}<pynar::BFloat16, {argument}>"
    assert forward.kernels == [(f"pynar::interval_attention_{ending}", blocks, 128)]
    names = [kernel for kernel, _, _ in backward.kernels]
    assert names == [
        "pynar::interval_attention_delta<pynar::BFloat16, 128>",
        "pynar::interval_attention_hulls<pynar::BFloat16, 128>",
        f"pynar::interval_attention_grad_q_{ending}",
        f"pynar::interval_attention_grad_kv_{ending}",
    ]
    fields = struct.unpack(f"<{len(forward.parameters) // 8}q", forward.parameters)
    assert fields[:4] == (0x1000, 0, dim, heads * dim)
    assert fields[12:16] == (0x4000, 0, 4, 2)
    assert fields[24:30] == (1, heads, queries, keys, dim, 2)
    assert struct.unpack("<d", forward.parameters[-16:-8]) == (0.5,)
    assert fields[-1] == 1
    _compile(backward.source, names)


def test_divergence_plans_name_kernels_and_carry_parameters(extension: Any) -> None:
    rows, vocabulary = 5, 72
    integer, floating, bfloat = 0, 2, 4
    logits = [_OnGpu(0x1000 * i, (rows, vocabulary), bfloat, 16) for i in (1, 2, 3)]
    grads = [_OnGpu(0x10000 * i, (rows, vocabulary), bfloat, 16) for i in (1, 2, 3)]
    targets = _OnGpu(0x4000, (rows,), integer, 64)
    for pairs, group in (([2, 0], 3), ([], 1)):
        cross_entropy = _OnGpu(0x5000, (3, rows), floating, 32)
        divergence = _OnGpu(0x6000, (len(pairs) // 2, rows), floating, 32)
        statistics = _OnGpu(0x7000, (6 + len(pairs), rows), floating, 32)
        results = (cross_entropy, divergence, statistics)
        extension.set_use_nvrtc(True)
        try:
            forward = extension.divergence_cross_entropy(logits, targets, pairs, 0.1, *results)
            backward = extension.divergence_cross_entropy_backward(
                cross_entropy, divergence, logits, targets, statistics, pairs, 0.1, grads
            )
        finally:
            extension.set_use_nvrtc(False)
        ending = f"<pynar::BFloat16, {group}>"
        blocks = rows * 3 // group
        assert forward.kernels == [("pynar::divergence_cross_entropy_rows" + ending, blocks, 256)]
        assert backward.kernels == [
            ("pynar::divergence_cross_entropy_gradient" + ending, blocks, 256)
        ]
        fields = struct.unpack(f"<{len(forward.parameters) // 8}q", forward.parameters)
        assert fields[:3] == (0x5000, 0x6000, 0x7000)
        assert fields[3:7] == (rows, vocabulary, 3, len(pairs) // 2)
        assert fields[7:9] == (tuple(pairs) or (0, 0))
        assert struct.unpack_from("<d", forward.parameters, 8 * 19) == (0.1,)
        assert fields[20:28] == (0x1000, 0x2000, 0x3000, 0, *(vocabulary,) * 3, 0)
        assert fields[28:] == (0x4000, 1, 1)
        fields = struct.unpack(f"<{len(backward.parameters) // 8}q", backward.parameters)
        assert fields[:3] == (0x5000, 0x6000, 0x7000)
        assert struct.unpack_from("<d", backward.parameters, 8 * 23) == (0.1,)
        assert fields[24:32] == (0x1000, 0x2000, 0x3000, 0, *(vocabulary,) * 3, 0)
        assert fields[32:40] == (0x10000, 0x20000, 0x30000, 0, *(vocabulary,) * 3, 0)
        assert fields[40:] == (0x4000, 1, 1)


def test_flow_plans_name_kernels_and_carry_parameters(extension: Any) -> None:
    batch, steps, channels, matrices, dim = 3, 7, 24, 2, 8
    bfloat, integer, floating = 4, 0, 2
    x = _OnGpu(0x1000, (batch, steps, channels), bfloat, 16)
    lengths = _OnGpu(0x2000, (batch,), integer, 64)
    log_scale = _OnGpu(0x3000, (matrices, channels), floating, 32)
    bias = _OnGpu(0x4000, (matrices, channels), floating, 32)
    weight = _OnGpu(0x5000, (matrices, dim, dim), floating, 32)
    y = _OnGpu(0x6000, (batch, steps, channels), bfloat, 16)
    sums = matrices * dim**2 + 2 * (matrices + 1) * channels
    size = extension.flow_linear_backward_workspace(batch, steps, channels, matrices, dim, 4)
    assert size == 3 * (sums + (matrices + 1) * 8 * channels)
    workspace = _OnGpu(0x10000, (size,), floating, 32)
    chain = (x, lengths, log_scale, bias, weight, 2, True, 1)
    extension.set_use_nvrtc(True)
    try:
        forward = extension.flow_linear("f", *chain, y)
        backward = extension.flow_linear_backward(
            "f", y, *chain, x, log_scale, bias, weight, workspace
        )
        # Three of seven steps are no joined one; six are two.
        of_three = _OnGpu(0x6000, (batch, 6, channels // 3), bfloat, 16)
        joined = _OnGpu(0x1000, (batch, 2, channels), bfloat, 16)
        in_pieces = extension.flow_linear("f", joined, *chain[1:-1], 3, of_three)
        copy = extension.squeeze(
            x,
            lengths,
            4,
            *(
                _OnGpu(0x7000, (batch, 2, 40), bfloat, 16),
                _OnGpu(0x8000, (batch, steps, 14), bfloat, 16),
            ),
        )
        logdet = extension.batched_logdet(weight, _OnGpu(0x9000, (2,), floating, 32), weight)
        coupling = extension.affine_coupling(
            *(x, lengths, x, x, False, y, _OnGpu(0x9000, (batch,), floating, 32)),
            _OnGpu(0xA000, (batch, steps), floating, 32),
        )
        with pytest.raises(ValueError, match="f_backward: `workspace` must be given on cuda"):
            extension.flow_linear_backward("f", y, *chain, x, log_scale, bias, weight, None)
    finally:
        extension.set_use_nvrtc(False)
    bf16 = "<pynar::BFloat16, 128>"
    assert forward.kernels == [("pynar::flow_linear_steps" + bf16, 3, 128)]
    assert backward.kernels == [
        ("pynar::flow_linear_gradient" + bf16, 3, 128),
        ("pynar::flow_linear_finish" + bf16, -(-sums // 128), 128),
    ]
    assert copy.kernels == [("pynar::flow_copy" + bf16, 6, 128)]
    assert logdet.kernels == [("pynar::batched_logdet_invert<float, 256>", 2, 256)]
    assert coupling.kernels == [
        ("pynar::affine_coupling_steps" + bf16, 6, 128),
        ("pynar::affine_coupling_sums" + bf16, 1, 128),
    ]
    fields = struct.unpack(f"<{len(forward.parameters) // 8}q", forward.parameters)
    rows = (0, 1, channels, steps * channels, channels, 0, 0, 1, channels)
    assert fields[:20] == (0x1000, *rows, 0x6000, *rows)
    assert fields[20:] == (
        *(0x2000, 0x3000, 0x4000, 0x5000, batch, steps, channels, matrices, dim, 1, 2, 1, 1),
    )
    fields = struct.unpack(f"<{len(in_pieces.parameters) // 8}q", in_pieces.parameters)
    rows = (0, 1, channels, 2 * channels, channels, 0, 0)
    assert fields[:20] == (0x1000, *rows, 1, channels, 0x6000, *rows, 3, channels // 3)
    assert fields[24:27] == (batch, 2, channels)
    assert fields[-1] == 3
    fields = struct.unpack(f"<{len(backward.parameters) // 8}q", backward.parameters)
    assert fields[-5:] == (0x3000, 0x4000, 0x5000, 0x10000, 0x10000 + 4 * 3 * sums)
