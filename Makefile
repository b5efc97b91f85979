# make demo   set up, build and run the main job
# make test   set up, build and run the tests
# make check  formatters, linters and type checks;  make wheel  a wheel in dist/;  make test-wheel  tests it;  make bench
#
# Everything happens in .venv. Where PYTHON already has a torch >= 2.10 and what a build needs (numpy, ninja, pybind11, setuptools), its
# packages are used as they are and nothing is fetched; otherwise torch and the tools are installed from the package index.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := .venv/bin/python
SOURCES := $(shell find csrc setup.py pyproject.toml -type f)
HAS_TORCH := import torch, numpy, ninja, pybind11, setuptools; exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))
SITE := $(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test check format wheel test-wheel bench clean
.DELETE_ON_ERROR:

demo: .venv/.built
	$(PY) -m fusedrnn demo

test: .venv/.built .venv/.extra-test
	@if $(PY) -c "import pytest" 2>/dev/null; then $(PY) -m pytest; \
	else echo "pytest is not installed: running the cases against the oracle, without the other tests"; $(PY) tests/without_pytest.py; fi

check: .venv/.extra-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: .venv/.extra-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

wheel: .venv/.ready
	rm -rf dist build/lib*
	$(PY) setup.py -q bdist_wheel

# The wheel in an environment of its own, away from the checkout; UNDER=torch==2.14.1 tries the same wheel under another torch.
test-wheel: wheel
	@set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	$(PYTHON) -m venv "$$away/venv"; \
	"$$away/venv/bin/python" -m pip install -q $(or $(UNDER),$(TORCH)) pytest hypothesis dist/*.whl; \
	cp -r tests "$$away"; cd "$$away"; \
	venv/bin/python -m fusedrnn info; \
	venv/bin/python -m pytest -q tests/test_operators.py tests/test_packaging.py tests/test_simd.py -m "not slow"

bench: .venv/.built .venv/.extra-bench
	$(PY) -m benchmarks

clean:
	rm -rf .venv build dist fusedrnn.egg-info fusedrnn/_C*.so

# ninja compiles only what has changed.
.venv/.built: .venv/.ready $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# Extra tools, by the names of pyproject.toml's extras. With borrowed packages there is no pip here, and what is missing stays missing.
.venv/.extra-%: .venv/.ready
	@if $(PY) -c "import pip" 2>/dev/null; then FUSEDRNN_BUILD=0 $(PY) -m pip install -q --no-build-isolation -e '.[$*]'; fi
	@touch $@

.venv/.ready: pyproject.toml
	@if [ "$$($(PYTHON) -c 'import sys; print(sys.prefix)')" = "$(CURDIR)/.venv" ]; then \
	  echo "PYTHON is this checkout's .venv, which would be made anew with itself: deactivate it first"; exit 1; fi
	@if $(PYTHON) -c "$(HAS_TORCH)" 2>/dev/null; then \
	  echo "using the torch of $$($(PYTHON) -c 'import sys; print(sys.executable)'), installing nothing"; \
	  $(PYTHON) -m venv --clear --without-pip .venv && \
	  $(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" > "$$($(SITE))/borrowed.pth" && \
	  echo "$(CURDIR)" > "$$($(SITE))/checkout.pth" && \
	  FUSEDRNN_BUILD=0 $(PY) setup.py -q egg_info; \
	else \
	  echo "installing $(TORCH) into .venv"; \
	  $(PYTHON) -m venv --clear .venv && \
	  $(PY) -m pip install -q $(TORCH) numpy ninja pybind11 setuptools && \
	  FUSEDRNN_BUILD=0 $(PY) -m pip install -q --no-build-isolation -e .; \
	fi
	@touch $@
