# make quickstart   sets everything up, then trains and compares models on a generated corpus
# make test         sets everything up, then runs the test suite
# make bench        the operator benchmarks on CPU
# make lint         ruff, clang-format, mypy
# make gpu          on a CUDA machine: build, CUDA tests, compute-sanitizer, GPU benchmarks

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS := -n auto --maxprocesses 4
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: quickstart test bench lint format gpu clean

quickstart: $(VENV)/built
	$(VENV)/bin/pynar quickstart

test: $(VENV)/built
	$(RUN) -m pytest -q $(WORKERS)

bench: $(VENV)/built
	@mkdir -p build
	$(RUN) -m pytest -q bench -m "not cuda and not grid" --benchmark-json build/bench.json
	$(RUN) -m bench.report build/bench.json

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format -i

gpu: $(VENV)/installed
	PYTHON=$(RUN) sh tools/gpu.sh

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(RUN) -m pip install -q --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) build pynar/_C*.so
