# From a clone to a trained model, and all checks. Needs python3 (3.11 or newer) with pip, and make; it builds its own .venv.
#
#   make setup       the virtual environment .venv with the pinned dependencies; the other targets call it
#   make pretrain    set up, then train, evaluate, sample and export the embedded corpus: on all GPUs, or on 2 CPU ranks
#   make test        make check, and the tests that take seconds each or start launchers
#   make test-slow   what takes minutes each: parity's whole table, clusters, NVMe, compiled layers, the image's steps, many more damaged inputs
#   make test-matrix the quick tests on each version of Python (3.11 to 3.13) and torch (2.13 to the newest) that can be had here
#   make check       lint, types, import contracts, quick tests
#   make bench       throughput compared with other training loops, into bench/RESULTS.md: half an hour on a quiet machine
#   make bench-overhead   what the engine costs compared with the same model in a plain loop
#   make bench-prefetch   what reading ahead gains when every read of a shard takes 5 ms longer
#   make bench-recipe     what each part of the recipe for CPUs gains, by itself and on top of the others
#   make bench-curves     whether the fast and the plain path learn alike
#   make bench-crash      kills runs at 120 chosen moments and counts what is lost, different, left over or untrue: an hour
#   make bench-help       what `dsllm --help` and every COMMAND --help cost
#   make bench-gpu        correctness and speed on a GPU, under 10 minutes (bench/gpu/run.sh says more)
#   make lint, types, contracts, test-quick   the four parts of make check, one by one
#   make docs        write the generated pages
#   make constraints pin the dependencies of pyproject.toml in constraints.txt; UPGRADE="--upgrade-package NAME" moves a pin
#   make clean       remove the virtual environments, caches and builds; runs/, data/ and out/ stay
#
# Another torch than the pinned one (an older driver, say): make setup TORCH="torch==2.9.1 --index-url URL"

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
EXTRAS ?= dev
TESTS ?=
RUN ?= runs/pydocs
EXPORT ?= out/hf

BIN := $(VENV)/bin
STAMP := $(VENV)/stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# GPUs that torch sees, else two processes on the CPU
RANKS ?= $$($(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# DeepSpeed's default port is the same for every job of a machine
PORT ?= $$($(BIN)/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")

export DS_BUILD_OPS = 0# DeepSpeed's own C++ operators are not used, so none is compiled
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup pretrain test check lint types contracts test-quick test-more test-slow test-matrix bench docs constraints clean
.PHONY: bench-overhead bench-crash bench-prefetch bench-recipe bench-curves bench-help bench-gpu
help:
	@sed -n '/^#   make/s/^# *//p' Makefile

setup: $(STAMP)

# Without ensurepip (Debian's python3 without python3-venv) the venv starts empty and the outer pip fills it.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "Setting up $(VENV): once, a few minutes"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) 2> /dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@sed $(if $(TORCH),'/^torch==/d','') constraints.txt > $(VENV)/constraints.txt
	@$(PIP) --upgrade pip
	@$(if $(TORCH),$(PIP) $(TORCH))
	@$(PIP) --constraint $(VENV)/constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# The launcher hides the exit codes of its ranks, and exits 0 when it is killed itself: status.json has the truth.
pretrain: $(STAMP)
	deepspeed --num_gpus $(RANKS) --master_port $(PORT) launch/pretrain.py
	@grep -q '"state": "finished"' $(RUN)/status.json || { echo "$(RUN) is not finished (status.json): make pretrain continues it"; exit 1; }
	dsllm evaluate $(RUN)
	dsllm generate $(RUN) --prompt "def "
	dsllm export $(RUN) --to $(EXPORT) --replace
	@echo "Loss curve: $(RUN)/loss.png   metrics: $(RUN)/metrics.jsonl   evaluation: $(RUN)/eval/"
	@echo "Checkpoints: $(RUN)/checkpoints/   data card: $(RUN)/data_card.json   exported model: $(EXPORT)/"

test: check test-more

check: lint types contracts test-quick

lint: $(STAMP)
	ruff check .

types: $(STAMP)
	mypy

contracts: $(STAMP)
	lint-imports --no-logo

# one thread per process: the tensors of the tests are tiny, and several ranks share the cores
test-quick: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest -m "not slow and not long" $(TESTS)

test-more: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest -m slow

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest -m long --timeout 3000

# sets up a temporary environment for each pair of versions
test-matrix:
	@PYTHONS="$(PYTHONS)" TORCHES="$(TORCHES)" TESTS="$(TESTS)" .ci/test-matrix

bench: $(STAMP) .venv-litgpt/stamp
	python -m bench.throughput --write

bench-overhead bench-prefetch bench-recipe bench-curves: bench-%: $(STAMP)
	python -m bench.$* --write

bench-crash: $(STAMP)
	OMP_NUM_THREADS=1 python -m bench.crash_campaign --kills 120

bench-help: $(STAMP)
	python -m bench.help_time --write

bench-gpu: $(STAMP)
	bash bench/gpu/run.sh

# litgpt's dependencies exclude dsllm's, so it has an environment of its own
.venv-litgpt/stamp: bench/peers/requirements-litgpt.txt
	@$(PYTHON) -m venv .venv-litgpt
	@.venv-litgpt/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

docs: $(STAMP)
	python docs/generate.py

# Adds the pins that pyproject.toml needs and drops the others; a pin that is still needed stays, unless UPGRADE names it.
# Left out: the gpu extra, whose Triton must be the one of the torch build, and torch's own Triton and CUDA, which torch pins.
constraints: $(STAMP)
	uv pip compile pyproject.toml --extra mpi --extra dev --universal --python-version 3.11 --annotation-style line \
		--custom-compile-command "make constraints" $(UPGRADE) --quiet --output-file constraints.txt
	sed -i '/^cuda-/d; /^nvidia-/d; /^triton==/d' constraints.txt

clean:
	rm -rf $(VENV) .venv-litgpt .venv-matrix bench/data bench/results build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
