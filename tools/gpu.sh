#!/bin/sh
# Builds with CUDA on a machine that has a GPU, runs the CUDA tests, plain, through NVRTC and under
# compute-sanitizer, and the GPU benchmarks. Writes bench/results/cuda_*.json.
set -eu

python=${PYTHON:-.venv/bin/python}
cd "$(dirname "$0")/.."

PYNAR_CUDA=on "$python" -m pip install -e . --no-deps
"$python" -m pynar.cli info

"$python" -m pytest -q tests -m cuda
if "$python" -c "import cupy" 2>/dev/null; then
  PYNAR_NVRTC=1 "$python" -m pytest -q tests -m cuda
else
  echo "CuPy is not installed: the NVRTC route is not tested"
fi

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # The caching allocator would hide a kernel that leaves its own array.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=pynar "$python" -m pytest -q tests/ops -m cuda
  done
else
  echo "compute-sanitizer is not on PATH: its checks are not run"
fi

for file in bench/test_*.py; do
  name=$(basename "$file" .py)
  name=${name#test_}
  json=$(mktemp)
  "$python" -m pytest -q "$file" -m cuda --benchmark-json "$json"
  "$python" -m bench.report "$json" --save "bench/results/cuda_$name.json"
  rm -f "$json"
done
