# Every target makes what it needs; `make` alone lists them.
# make PYTHON=python3.13     another Python to start from          make VENV=../env           another environment
# make test ARGS="-k window" more options for pytest                make bench RESULTS=mine       another folder
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RESULTS ?= build/bench
ROUNDS ?=
SEED ?=
BEFORE ?=
BIN := $(VENV)/bin

SENTENCE := The animal didn't cross the street because it was too tired.

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-timm fuzz check asan tsan aarch64 bench compare docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo ## see what a pretrained model looks at: in the terminal, animal.html and animal.png
	@$(BIN)/foveate see "$(SENTENCE)" --layer 3 --head 1 --from it --out animal.html --out animal.png

test: $(VENV)/.dev ## run the tests, in about three minutes
	@$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.dev ## run the slow tests too
	@$(BIN)/python -m pytest -n 2 -m "not gpu" $(ARGS)

test-timm: $(VENV)/.dev ## test timm's models, apart: the torchvision that timm needs breaks transformers beside a torch for CPUs alone
	@$(BIN)/python -m pip install -qq --no-deps --upgrade --target build/timm -c constraints.txt timm torchvision
	@PYTHONPATH=build/timm $(BIN)/python -m pytest tests/test_timm.py tests/test_timm_detr.py $(ARGS)

fuzz: $(VENV)/.dev ## compare random calls with float64: new ones for five minutes, or SEED=7
	@$(BIN)/python -W ignore tests/fuzzing.py $(if $(SEED),$(SEED),--minutes 5)

check: $(VENV)/.dev ## check style, types, who imports whom, and the docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/mkdocs build --strict --quiet

# Programs without Python, so no environment: cmake and a compiler. ROUNDS is how many calls of each kind are swept.
asan: ## run the kernels' sweep under AddressSanitizer and UBSan (needs cmake and a compiler)
	$(call programs,address)
	@build/address/sweep $(ROUNDS)

tsan: ## run the kernels from several threads at once under ThreadSanitizer (the same)
	$(call programs,thread)
	@build/thread/races

aarch64: ## build the kernels for 64-bit ARM and sweep them in an emulator
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
		echo "needs a cross compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(call programs,plain,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++,aarch64)
	@qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/sweep $(or $(ROUNDS),60)

define programs
@command -v cmake >/dev/null || { echo "needs cmake: pip install cmake, or your system's package" >&2; exit 1; }
@cmake -S . -B build/$(or $(3),$(1)) -DFOVEATE_TESTS=$(1) $(2) >/dev/null
@cmake --build build/$(or $(3),$(1)) --parallel 2 >/dev/null
endef

bench: $(VENV)/.dev ## measure beside PyTorch, into build/bench (half an hour or more; close what else runs)
	@mkdir -p $(RESULTS)
	@for table in softmax linear sparse; do \
		$(BIN)/foveate bench $$table $(foreach kind,json csv svg,--out $(RESULTS)/$$table.$(kind)) $(ARGS) || exit; done

compare: $(VENV)/.dev ## is any row slower than in another checkout? BEFORE=../before (half an hour; close what else runs)
	@$(BIN)/python benchmarks/compare.py $(BEFORE) $(ARGS)

docs: $(VENV)/.dev ## build the documentation into site/
	@$(BIN)/mkdocs build --strict --quiet
	@echo "the documentation is in site/index.html"

clean: ## remove what the targets wrote, but keep the virtual environment
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis animal.html animal.png
	find src tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps say which extra was installed last, with the versions of constraints.txt. dev contains demo.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	$(call install,demo)
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(call install,dev)
	@touch $(VENV)/.demo $@

define install
@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	echo "$(VENV) has no pip: delete $(VENV) and try again, or run $(BIN)/python -m ensurepip" >&2; exit 1; }
@echo "installing foveate[$(1)] into $(VENV): a few minutes the first time"
@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[$(1)]'
endef

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) was not found: install Python 3.11 or newer, or name it: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Foveate needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1): name another one, as in make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version >/dev/null || { rm -f $(BIN)/python; \
		echo "$(PYTHON) could not make a virtual environment with pip in $(VENV): on Debian and Ubuntu install python3-venv" >&2; exit 1; }
