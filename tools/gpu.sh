#!/bin/sh
# On a machine with a GPU: builds with CUDA, runs the CUDA tests, the benchmarks that
# bench/results/GPU_PENDING.md asks for, and the tests through NVRTC and under compute-sanitizer.
# Writes bench/results/cuda_*.json.
#
#   sh tools/gpu.sh                                  every step but grid
#   LIMIT=570 sh tools/gpu.sh build bench tests      these steps, in this order, for 570 seconds
#   sh tools/gpu.sh grid                             every GPU benchmark there is: much to compile
#
# Whatever fails, the other steps still run, and the script fails at its end.
set -u

cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-.venv/bin/python}
deadline=$(($(date +%s) + ${LIMIT:-1000000}))
failures=""

fail() {
  echo "FAILED: $1"
  failures="$failures
  $1"
}

attempt() { # label, command...; leaves its exit status in `status`
  label=$1
  shift
  left=$((deadline - $(date +%s)))
  status=124
  [ "$left" -gt 0 ] || return 0
  echo "== $label"
  # Interrupted, pytest and `pynar bench` still write what they measured.
  timeout -s INT -k 30 "$left" "$@"
  status=$?
}

run() { # label, command...
  attempt "$@"
  case $status in
    0) ;;
    124) fail "$1: out of time" ;;
    *) fail "$1: exit status $status" ;;
  esac
}

run_if_any() { # label, pytest command... which may have no case for a GPU
  attempt "$@"
  case $status in
    0) ;;
    5) echo "$1: no case for a GPU" ;;
    124) fail "$1: out of time" ;;
    *) fail "$1: exit status $status" ;;
  esac
}

cases() { # run or run_if_any, name, arguments of pytest...
  how=$1 name=$2
  shift 2
  json=$(mktemp)
  "$how" "bench $name" "$python" -m pytest -q -m cuda --benchmark-json "$json" "$@"
  if [ -s "$json" ]; then
    "$python" -m bench.report "$json" --save "bench/results/cuda_$name.json" ||
      fail "bench $name: no report"
  fi
  rm -f "$json"
}

decode() { # name, arguments of `pynar bench decode`...
  name=$1
  shift
  place=$(mktemp -d)
  run "decode $name" "$python" -m pynar.cli bench decode --device cuda --freeze bf16 \
    --threads 1 --lengths 32 --output "$place" "$@"
  if [ -s "$place/results.json" ]; then
    cp "$place/results.json" "bench/results/cuda_decode_$name.json"
  fi
  rm -rf "$place"
}

step() {
  case $1 in
    build)
      run build env PYNAR_CUDA=on "$python" -m pip install -e . --no-deps
      # Whatever came next would be of an older build, or of none.
      [ "$status" -eq 0 ] || exit 1
      run info "$python" -m pynar.cli info
      ;;
    tests)
      run tests "$python" -m pytest -q tests -m cuda
      ;;
    bench)
      # Those with much to compile last.
      cases run mask_predict_step bench/test_mask_predict_step.py -k B512
      cases run flowseq_decode bench/test_flowseq_decode.py
      cases run janus_step bench/test_janus_step.py -k "bfloat16 and post"
      cases run linear_argmax bench/test_linear_argmax.py \
        -k "bfloat16 and not packed and (N1- or N32- or N960 or N16384)"
      cases run divergence_cross_entropy bench/test_divergence_cross_entropy.py -k "not 8000"
      cases run interval_attention bench/test_interval_attention.py \
        -k "two_streams and equal and bfloat16"
      cases run flow bench/test_flow.py -k "batched_logdet or B2048 or test_flow["
      ;;
    decode)
      engines=none
      "$python" -c "import ctranslate2" 2>/dev/null && engines=ctranslate2:float16
      decode one_pass --random ar_base:strategy=greedy cmlm_paper:iterations=1 nat_paper \
        nat_paper:graphs=false --batch 1 8 32 128 256 --engines "$engines"
      decode flowseq --random flowseq_base flowseq_base:graphs=false --batch 1 8 32
      ;;
    nvrtc)
      if "$python" -c "import cupy" 2>/dev/null; then
        run "tests through NVRTC" env PYNAR_NVRTC=1 "$python" -m pytest -q tests -m cuda
      else
        echo "CuPy is not installed: the NVRTC route is not tested"
      fi
      ;;
    sanitizer)
      if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
          # The caching allocator would hide a kernel that leaves its own array.
          run "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 1 --kernel-regex kns=pynar "$python" -m pytest -q tests/ops -m cuda
        done
      else
        echo "compute-sanitizer is not on PATH: its checks are not run"
      fi
      ;;
    grid)
      for file in bench/test_*.py; do
        name=$(basename "$file" .py)
        cases run_if_any "${name#test_}" "$file"
      done
      ;;
    *)
      fail "$1: no such step; there are build, tests, bench, decode, nvrtc, sanitizer and grid"
      ;;
  esac
}

# Without one every case would be skipped, and nothing would fail.
"$python" -c "import torch; torch.cuda.init()" || exit 1
[ $# -gt 0 ] || set -- build tests bench decode nvrtc sanitizer
for chosen in "$@"; do
  step "$chosen"
done
if [ -n "$failures" ]; then
  echo "failed:$failures"
  exit 1
fi
