from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def compile_on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles `tests/cuda_on_host/<name>.cpp` with the sanitizers; returns the program."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n", encoding="utf-8")
    probe = [compiler, *SANITIZERS, str(empty), "-o", str(folder / "empty")]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("g++ has no AddressSanitizer runtime here")

    def build(name: str) -> Path:
        program = folder / name
        if not program.exists():
            includes = [f"-I{CSRC}", f"-I{HERE}"]
            source = str(HERE / f"{name}.cpp")
            command = [compiler, *FLAGS, *SANITIZERS, *includes, source, "-o", str(program)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return program

    return build
