from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from pynar import _backend

ROOT = Path(__file__).parent.parent


# As in an activated environment: cmake and ninja come from the one that runs the tests.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _setup(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("pybind11") is None or importlib.util.find_spec("cmake") is None:
        pytest.skip("the build requirements are not installed here")
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": PATH, **environment},
        capture_output=True,
        text=True,
    )


def test_unknown_choice_of_cuda_lists_the_choices(tmp_path: Path) -> None:
    done = _setup("build_ext", "--build-lib", str(tmp_path), PYNAR_CUDA="maybe")
    assert done.returncode == 1
    assert "PYNAR_CUDA must be one of auto, on, off, got 'maybe'" in done.stderr


def test_cuda_without_nvcc_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = _setup(
        "build_ext", "--build-lib", str(tmp_path), PYNAR_CUDA="on", CUDACXX="/nowhere/nvcc"
    )
    assert done.returncode == 1
    assert "PYNAR_CUDA=on, but nvcc was not found: set CUDACXX" in done.stderr


# How our struct members are called in DLPack's own header.
LAYOUT = {
    ("Array", "DLTensor"): {
        "data": "data",
        "device": "device",
        "ndim": "ndim",
        "dtype": "dtype",
        "shape": "shape",
        "strides": "strides",
        "byte_offset": "byte_offset",
    },
    ("ManagedArray", "DLManagedTensor"): {
        "array": "dl_tensor",
        "context": "manager_ctx",
        "deleter": "deleter",
    },
    ("ManagedArrayVersioned", "DLManagedTensorVersioned"): {
        "version": "version",
        "context": "manager_ctx",
        "deleter": "deleter",
        "flags": "flags",
        "array": "dl_tensor",
    },
    ("ExchangeApi", "DLPackExchangeAPI"): {
        "header": "header",
        "allocate": "managed_tensor_allocator",
        "managed_from_object": "managed_tensor_from_py_object_no_sync",
        "managed_to_object": "managed_tensor_to_py_object_no_sync",
        "array_from_object": "dltensor_from_py_object_no_sync",
        "current_work_stream": "current_work_stream",
    },
}


def test_dlpack_structs_have_the_layout_of_pytorchs_header(tmp_path: Path) -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    compiler = shutil.which("g++")
    if compiler is None or not header.exists():
        pytest.skip("needs g++ and PyTorch's headers")
    lines = ["#include <cstddef>", f'#include "{header}"', '#include "common/dlpack.h"']
    for (ours, theirs), members in LAYOUT.items():
        lines.append(f"static_assert(sizeof(pynar::dlpack::{ours}) == sizeof({theirs}));")
        for name, their_name in members.items():
            offset = f"offsetof(pynar::dlpack::{ours}, {name})"
            lines.append(f"static_assert({offset} == offsetof({theirs}, {their_name}));")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extension_links_neither_torch_nor_cuda_libraries() -> None:
    extension = _backend.extension()
    readelf = shutil.which("readelf")
    if extension is None or readelf is None:
        pytest.skip(_backend.why_not_extension() or "no readelf")
    dynamic = subprocess.run(
        [readelf, "-d", str(extension.__file__)], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    for library in ("torch", "c10", "cudart", "libcuda", "python"):
        assert not any(library in line for line in needed), needed


def test_extension_shares_torchs_openmp() -> None:
    if _backend.extension() is None:
        pytest.skip(_backend.why_not_extension())
    program = "import pynar.ops, pynar._backend as b; print(b.shares_openmp_with_torch())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() in ("True", "None"), done.stderr


def test_import_of_the_package_is_cheap() -> None:
    program = "import sys, pynar; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def _run_with(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_disabled_extension_leaves_the_references_in_silence() -> None:
    program = (
        "import torch, pynar.ops; from pynar.ops._operator import implementation;"
        "z = torch.zeros; i = torch.tensor([1]);"
        "pynar.ops.mask_predict_step(z(1, 1, 5), i[None], z(1, 1), i, i);"
        "print(implementation('cpu').name)"
    )
    done = _run_with(program, PYNAR_DISABLE_EXT="1", PYTHONWARNINGS="error::UserWarning:pynar")
    assert done.stdout.strip() == "reference", done.stderr
    assert "pynar operators run as" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PYNAR_DISABLE_EXT", "yes", "PYNAR_DISABLE_EXT must be 0 or 1, got 'yes'"),
        ("PYNAR_SIMD", "sse9", "the SIMD level must be one of"),
    ],
)
def test_unknown_settings_are_errors(variable: str, value: str, message: str) -> None:
    if variable == "PYNAR_SIMD" and _backend.extension() is None:
        pytest.skip(_backend.why_not_extension())
    done = _run_with("import pynar.ops", **{variable: value})
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.slow
def test_distributions_are_complete(tmp_path: Path) -> None:
    done = _setup("sdist", "--dist-dir", str(tmp_path), "egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*") if p.is_file()}
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "pynar" / "recipes").glob("*.yaml")}
    assert native | recipes | {"CMakeLists.txt", "setup.py", "pyproject.toml"} <= files

    # The wheel is built from what the sdist holds, as pip does it.
    source = next(path for path in tmp_path.glob("pynar-*") if path.is_dir())
    done = _setup("bdist_wheel", "--dist-dir", str(tmp_path), cwd=source, PYNAR_CUDA="off")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        files = set(archive.namelist())
    shipped = {name for name in native if name.endswith((".cuh", ".h"))}
    assert {f"pynar/_{name}" for name in shipped} | recipes <= files
    assert any(name.startswith("pynar/_C.") for name in files)
    assert "pynar/ops/mask_predict_step.py" in files
