# Every target sets up all it needs: Python >= 3.10, a C++ compiler and make are enough.
#
#   make train    install, then train with the default configuration
#   make test     install, then lint, types and all tests but the long ones
#   make help     the rest

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= $(VENV)-peers
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=

# The stamps are written last: a set-up that was interrupted is taken up again by the next command.
TRAIN_READY := $(VENV)/.ready-train
TEST_READY := $(VENV)/.ready-test
PEERS_READY := $(PEERS_VENV)/.ready-peers
NATIVE := csrc/CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/CMakeLists.txt)
SOURCES := Makefile pyproject.toml constraints.txt $(NATIVE)

# Another TORCH_INDEX than the one a set-up was made with makes it anew; none keeps what is there.
ifneq ($(TORCH_INDEX),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch-index 2>/dev/null))
SOURCES += torch-index
endif
endif

# pip shows its progress on a terminal and stays silent in a log.
PIP_QUIET := $(shell [ -t 2 ] || echo -q)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null || \
	    grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   another interpreter          VENV=dir          another environment"
	@echo "  TORCH_INDEX=URL     another build of torch       ARGS='...'        more arguments for rlcore train or pytest"
	@echo "  JOBS=2              test processes"

train: $(TRAIN_READY) ## train with the default configuration; ARGS="--seed 1" and so on
	$(VENV)/bin/rlcore train $(ARGS)

# Triton's kernels once more, on the CPU: it chooses between its compiler and its interpreter when it is imported.
INTERPRETED := TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/kernels

test: lint types ## lint, types and all tests but the long ones
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not peers" $(ARGS)
	$(INTERPRETED) -m "not slow" $(ARGS)

test-full: lint types ## the same with the long tests, then asan and tsan
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not peers" --timeout 1800 $(ARGS)
	$(INTERPRETED) --timeout 1800 $(ARGS)
	$(VENV)/bin/python tests/sanitizers.py address
	$(VENV)/bin/python tests/sanitizers.py thread

asan: $(TEST_READY) ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(VENV)/bin/python tests/sanitizers.py address $(ARGS)

tsan: $(TEST_READY) ## the native tests under ThreadSanitizer
	$(VENV)/bin/python tests/sanitizers.py thread $(ARGS)

test-peers: $(PEERS_READY) ## comparisons with other libraries, in an environment of their own
	$(PEERS_VENV)/bin/python -m pytest -m peers --timeout 1800 $(ARGS)

BENCH := -m pytest bench --benchmark-only --benchmark-quiet --timeout 1800

bench: $(TEST_READY) ## measure every limit on this machine; ARGS="-k segments", ARGS=--guard
	$(VENV)/bin/python $(BENCH) $(ARGS)
	$(VENV)/bin/python bench/report.py

bench-peers: $(PEERS_READY) ## time our losses beside those of TRL and Liger
	$(PEERS_VENV)/bin/python $(BENCH) -m peers $(ARGS)
	$(PEERS_VENV)/bin/python bench/report.py

grid: $(PEERS_READY) ## prefix trees over prompt, response and group sizes; resumes; ARGS=--quick, ARGS=--draw
	$(PEERS_VENV)/bin/python bench/prefix_grid.py $(ARGS)

learn: $(TEST_READY) ## train every method with three seeds, one table; ARGS="--recipes ppo --seeds 0", ARGS=--draw
	$(VENV)/bin/python bench/learn.py $(ARGS)

static: $(TEST_READY) ## compile every GPU kernel for every target, record registers, spills and shared memory
	$(VENV)/bin/python bench/compile_kernels.py --write $(ARGS)
	$(VENV)/bin/python bench/compile_cuda.py --write

lint: $(TEST_READY) ## ruff, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter-out %.txt,$(NATIVE))

types: $(TEST_READY) ## mypy
	$(VENV)/bin/mypy

clean: ## remove build outputs and caches; environments and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find rlcore kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(TRAIN_READY): $(SOURCES)
	$(call environment,$(VENV))
	@$(call say,rlcore with what training needs)
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt --no-build-isolation -e '.[train]'
	$(call finish,$(VENV),$@)

# Warnings of the compiler are errors here, and so is a native build that fails.
$(TEST_READY): $(SOURCES)
	$(call environment,$(VENV))
	@$(call say,rlcore with what training and the tests need)
	@SKBUILD_CMAKE_DEFINE=RLCORE_WERROR=ON RLCORE_NATIVE=1 \
	    $(VENV)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt --no-build-isolation -e '.[train,test,bench,dev]'
	$(call finish,$(VENV),$@)

$(PEERS_READY): $(SOURCES)
	$(call environment,$(PEERS_VENV))
	@$(call say,rlcore and the libraries it is compared with)
	@$(PEERS_VENV)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt --no-build-isolation -e '.[train,test,peers]'
	$(call finish,$(PEERS_VENV),$@)

say = echo "--- $(1)"

# An environment with torch and the build tools. torch comes first, from its own index if one is given, so that nothing
# after it chooses another build; what it needs comes from both indexes, since only some builds have theirs on PyPI.
# The build tools come from PyPI: a compiler is all that the machine must have.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1). Choose with: make PYTHON=python3.12" >&2; exit 1; }
	@if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	        echo "'$(PYTHON)' can not make virtual environments: its venv or ensurepip module is missing. Install it" >&2; \
	        echo "(Debian, Ubuntu: apt install python3-venv) or choose another interpreter: make PYTHON=python3.12" >&2; exit 1; }; \
	    $(call say,environment $(1)); \
	    $(PYTHON) -m venv $(1); \
	fi
	@$(1)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt pip
	@known=$$(cat $(1)/.torch-index 2>/dev/null || true); index='$(TORCH_INDEX)'; index=$${index:-$$known}; \
	$(call say,torch$${index:+ from $$index}); \
	if [ -n "$$index" ]; then \
	    [ "$$index" = "$$known" ] && again= || again=--force-reinstall; \
	    $(1)/bin/python -m pip install $(PIP_QUIET) $$again --no-deps --index-url "$$index" $$(grep '^torch==' constraints.txt); \
	    echo "$$index" > $(1)/.torch-index; \
	fi; \
	$(1)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt $${index:+--extra-index-url "$$index"} torch
	@$(call say,build tools)
	@$(1)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt scikit-build-core pybind11 cmake ninja
endef

# $(2) is the stamp.
define finish
	@$(1)/bin/python -c 'import rlcore; print("--- backends:", rlcore.backends())'
	@touch $(2)
endef

.PHONY: help train test test-full asan tsan test-peers bench bench-peers grid learn static lint types clean torch-index
