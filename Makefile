# Each target sets up what it needs: a virtual environment with torch, and pyattn in it, editable.
# `make PYTHON=python3.13 VENV=.venv-3.13 test` takes another Python, `make TORCH=... test` another torch,
# `make ARGS="-k causal" test` passes arguments on.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
# Processes that share the tests. Threads that wait sleep, or each process would take the others' cores.
JOBS ?= auto
# Of `make gpu`: a Python that has torch with CUDA, triton, pybind11, ninja and pytest; nothing is installed.
GPU_PYTHON ?= python3
STAGE ?= check
BACKEND ?=

PY := $(VENV)/bin/python
CSRC := $(shell find csrc -type d -o -name '*.cpp' -o -name '*.h' -o -name '*.cuh')
DOCTESTS = $(shell grep -rl --include='*.py' '^ *>>> ' pyattn)
SANITIZED := build/sanitize

.PHONY: demo data test test-all bench gpu report sanitize tsan lint clean

demo: $(VENV)/built
	$(PY) -m pyattn compare --out build/demo $(ARGS)
	$(PY) examples/demo.py --out build/demo

data: $(VENV)/built
	$(PY) -m pyattn.models.data $(ARGS)

test: $(VENV)/built
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal --doctest-modules tests $(DOCTESTS) $(ARGS)

test-all: $(VENV)/built
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal --doctest-modules -m "not gpu" tests $(DOCTESTS) $(ARGS)

bench: $(VENV)/installed-bench
	$(PY) -m pytest --benchmark-only benchmarks $(ARGS)

gpu:
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --stage $(STAGE) $(if $(BACKEND),--backend $(BACKEND)) $(ARGS)

report: $(VENV)/built
	$(PY) benchmarks/report.py $(ARGS)

lint: $(VENV)/built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(filter %.cpp %.h %.cuh,$(CSRC)) tests/threads.cpp
	$(PY) -m mypy

# The suite with AddressSanitizer and UndefinedBehaviorSanitizer in the extension. A second copy of the package is
# built in build/sanitize, and `python -m`, started there, finds it before the editable install; the `python -c` makes
# sure of that. libstdc++ is preloaded so that ASan finds __cxa_throw; --capture=sys lets its report through.
sanitize: $(VENV)/built
	rm -rf $(SANITIZED)/pyattn
	PYATTN_SANITIZE=address,undefined $(PY) setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	export LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 && \
	cd $(SANITIZED) && \
	$(abspath $(PY)) -c "import pyattn._native as n; assert n.__file__.startswith('$(abspath $(SANITIZED))'), n" && \
	$(abspath $(PY)) -m pytest --capture=sys $(CURDIR)/tests $(ARGS)

# The kernels on std::thread, since ThreadSanitizer does not understand OpenMP's barriers; without Python. `setarch -R`:
# it does not start where addresses are laid out too randomly.
TSAN := $(SANITIZED)/threads
tsan:
	mkdir -p $(SANITIZED)
	$${CXX:-g++} -std=c++17 -O1 -g -fsanitize=thread -pthread -DPYATTN_STD_THREADS -DNDEBUG -Icsrc \
	    -DPYATTN_ISA=portable -DPYATTN_ISA_PORTABLE=1 \
	    tests/threads.cpp csrc/scratch.cpp csrc/cpu/*.cpp -o $(TSAN)
	TSAN_OPTIONS=halt_on_error=1 setarch -R $(TSAN)

# Leaves the virtual environment, in which torch takes longest to install.
clean:
	rm -rf build dist *.egg-info pyattn/*.so $(VENV)/built $(VENV)/installed* \
	    .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch only if it is missing: the version of development is no requirement of the library.
$(VENV)/installed: pyproject.toml setup.py | $(VENV)/bin/pip
	$(PY) -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e '.[dev]'
	touch $@

$(VENV)/installed-bench: $(VENV)/built
	$(PY) -m pip install -e '.[dev,bench]'
	touch $@

# Does nothing right after an install; after an edit of csrc it compiles what changed.
$(VENV)/built: $(VENV)/installed $(CSRC)
	$(PY) setup.py -q build_ext --inplace
	touch $@
