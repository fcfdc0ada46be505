"""The route for a GPU whose machine has no nvcc, as far as it goes without a GPU."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from pynar import _backend
from pynar.ops import _nvrtc

EVERY_KERNEL = [
    (
        "decoding/mask_predict_step.cuh",
        [
            f"pynar::mask_predict_{kernel}<{dtype}, {threads}>"
            for dtype in ("float", "double", "pynar::BFloat16", "pynar::Half")
            for kernel, threads in (("partials", 64), ("partials", 256), ("finish", 128))
        ],
    ),
]


@pytest.fixture
def extension() -> Any:
    if _backend.extension() is None:
        pytest.skip(_backend.why_not_extension())
    return _backend.extension()


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
    assert sources - {"common/device.cuh"} == {source for source, _ in EVERY_KERNEL}


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
