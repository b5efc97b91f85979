# make demo   set up, build and run the main job
# make test   set up, build and run the tests
# make check  formatters, linters and type checks;  make wheel  a wheel in dist/;  make test-wheel  tests it;  make bench
#
# make gpu    on a machine with a GPU: what it can do, tests, compute-sanitizer, benchmarks; one of them with
#             STAGE=micro|test|sanitize|bench
#
# Everything happens in .venv. Where PYTHON already has a torch >= 2.10 and what a build needs (numpy, ninja, pybind11, setuptools), its
# packages are used as they are and nothing is fetched; otherwise torch and the tools are installed from the package index.
# With FUSEDRNN_CUDA=1 everything happens in .venv-cuda, with a torch that has CUDA; the build needs nvcc, and no GPU.
PYTHON ?= python3
ifeq ($(FUSEDRNN_CUDA),1)
VENV := .venv-cuda
TORCH ?= torch==2.14.1
else
VENV := .venv
TORCH ?= torch==2.13.0
endif
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc setup.py pyproject.toml -type f)
HAS_TORCH := import torch, numpy, ninja, pybind11, setuptools; exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))
SITE := $(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test check format wheel test-wheel bench gpu gpu-micro gpu-test gpu-sanitize gpu-bench clean
.DELETE_ON_ERROR:
SHELL := bash

demo: $(VENV)/.built
	$(PY) -m fusedrnn demo

# In two processes, of which each may use all cores.
test: $(VENV)/.built $(VENV)/.extra-test
	@if $(PY) -c "import xdist, pytest_benchmark" 2>/dev/null; then \
	  $(PY) -m pytest -n auto --maxprocesses=2 --benchmark-disable; \
	elif $(PY) -c "import pytest" 2>/dev/null; then $(PY) -m pytest; \
	else echo "pytest is not installed: running the cases against the oracle, without the other tests"; $(PY) tests/without_pytest.py; fi

check: $(VENV)/.extra-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.extra-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

wheel: $(VENV)/.ready
	rm -rf dist build/lib*
	$(PY) setup.py -q bdist_wheel

# The wheel in an environment of its own, away from the checkout; UNDER=torch==2.14.1 tries the same wheel under another torch.
test-wheel: wheel
	@set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	$(PYTHON) -m venv "$$away/venv"; \
	"$$away/venv/bin/python" -m pip install -q $(or $(UNDER),$(TORCH)) pytest hypothesis dist/*.whl; \
	cp -r tests "$$away"; cd "$$away"; \
	venv/bin/python -m fusedrnn info; \
	[ "$(FUSEDRNN_CUDA)" != 1 ] || venv/bin/python -c "from fusedrnn import _dispatch as d; assert d.cuda_extension, d.why_no_cuda"; \
	venv/bin/python -m pytest -q tests/test_operators.py tests/test_packaging.py tests/test_simd.py -m "not slow" -k "not opcheck"

bench: $(VENV)/.built $(VENV)/.extra-bench
	$(PY) -m benchmarks

# Each stage within 8 minutes on one H100 or H200, the most telling first; results go to OUT. Fewer architectures build faster:
# TORCH_CUDA_ARCH_LIST=9.0 make gpu.
OUT ?= .
STAGE ?= micro test sanitize bench
NVCC ?= $(if $(CUDA_HOME),$(CUDA_HOME)/bin/nvcc,nvcc)
gpu: $(addprefix gpu-,$(STAGE))

gpu-micro:
	mkdir -p build && $(NVCC) -std=c++20 -O3 -arch=native -Icsrc benchmarks/micro.cu -o build/micro
	build/micro 2>&1 | tee $(OUT)/gpu-micro.txt; exit $${PIPESTATUS[0]}

gpu-test: $(VENV)/.built $(VENV)/.extra-test
	$(PY) -m pytest -q tests/test_gpu.py 2>&1 | tee $(OUT)/gpu-test.txt; exit $${PIPESTATUS[0]}

# racecheck looks at our kernels only. initcheck must see who else writes what they read.
gpu-sanitize: $(VENV)/.built $(VENV)/.extra-test
	set -e; export PYTORCH_NO_CUDA_MEMORY_CACHING=1; for tool in memcheck racecheck synccheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $$([ $$tool != racecheck ] || echo --kernel-regex kns=fusedrnn) \
	    $(PY) -m pytest -q -m sanitize tests/test_gpu.py 2>&1 | tee $(OUT)/gpu-$$tool.txt; [ $${PIPESTATUS[0]} = 0 ]; done

gpu-bench: $(VENV)/.built
	$(PY) -m benchmarks.gpu --out $(OUT)/gpu.jsonl 2>&1 | tee $(OUT)/gpu-bench.txt; exit $${PIPESTATUS[0]}

clean:
	rm -rf .venv .venv-cuda build dist fusedrnn.egg-info fusedrnn/_C*.so fusedrnn/_cuda*.so

# ninja compiles only what has changed.
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# Extra tools, by the names of pyproject.toml's extras. With borrowed packages there is no pip here, and what is missing stays missing.
$(VENV)/.extra-%: $(VENV)/.ready
	@if $(PY) -c "import pip" 2>/dev/null; then FUSEDRNN_BUILD=0 $(PY) -m pip install -q --no-build-isolation -e '.[$*]'; fi
	@touch $@

$(VENV)/.ready: pyproject.toml
	@if [ "$$($(PYTHON) -c 'import sys; print(sys.prefix)')" = "$(CURDIR)/$(VENV)" ]; then \
	  echo "PYTHON is this checkout's $(VENV), which would be made anew with itself: deactivate it first"; exit 1; fi
	@if $(PYTHON) -c "$(HAS_TORCH)" 2>/dev/null; then \
	  echo "using the torch of $$($(PYTHON) -c 'import sys; print(sys.executable)'), installing nothing"; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" > "$$($(SITE))/borrowed.pth" && \
	  echo "$(CURDIR)" > "$$($(SITE))/checkout.pth" && \
	  FUSEDRNN_BUILD=0 $(PY) setup.py -q egg_info; \
	else \
	  echo "installing $(TORCH) into $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV) && \
	  $(PY) -m pip install -q $(TORCH) numpy ninja pybind11 'setuptools>=70.1' && \
	  FUSEDRNN_BUILD=0 $(PY) -m pip install -q --no-build-isolation -e .; \
	fi
	@touch $@
