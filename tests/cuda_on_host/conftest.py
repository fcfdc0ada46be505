from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def compile_on_host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """Compiles `tests/cuda_on_host/<name>.cpp` with the sanitizers; returns the program.

    What the chosen tests will need is compiled side by side, from the first of them on.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n", encoding="utf-8")
    probe = [compiler, *SANITIZERS, str(empty), "-o", str(folder / "empty")]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("g++ has no AddressSanitizer runtime here")

    def compile_one(name: str) -> Path:
        program = folder / name
        includes = [f"-I{CSRC}", f"-I{HERE}"]
        source = str(HERE / f"{name}.cpp")
        command = [compiler, *FLAGS, *SANITIZERS, *includes, source, "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    paths = dict.fromkeys(item.path for item in request.session.items if item.path.parent == HERE)
    names = [path.stem.removeprefix("test_") for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = {
            name: pool.submit(compile_one, name)
            for name in names
            if (HERE / f"{name}.cpp").exists()
        }

        def build(name: str) -> Path:
            if name not in programs:
                programs[name] = pool.submit(compile_one, name)
            return programs[name].result()

        yield build
        for program in programs.values():
            program.cancel()
