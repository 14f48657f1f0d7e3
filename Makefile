# make quickstart   install, then retrofit, tune and measure a small model
# make test         what CI runs: lint, types, layers, tests
# make test-slow    the heavier sweeps
# make coverage     every architecture with attention, proven or refused (hours; goes on where it was stopped;
#                   ARGS=--fresh walks rows again that another commit walked)
# make hybrids      small Swin, MobileViT, EfficientViT and RoPE networks: trained, converted, tuned, compared
# make bench        latency against the original model (ARGS="..." is passed on)
# make clean        caches and build leftovers; .venv and runs/ stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.NOTPARALLEL:
.PHONY: quickstart test test-slow lint bench coverage hybrids clean

quickstart: $(VENV)/.installed
	$(BIN)/ltm-retrofit run recipes/quickstart.yaml

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/latency.py $(ARGS)

coverage: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py run --shard 1/2 $(ARGS) & \
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py run --shard 2/2 $(ARGS); wait
	$(BIN)/python benchmarks/coverage.py write

hybrids: $(VENV)/.installed
	$(BIN)/python benchmarks/hybrids.py train
	$(BIN)/python benchmarks/hybrids.py compare
	$(BIN)/python benchmarks/hybrids.py table

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' here: name a Python 3.11 or newer, e.g. make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ltm-retrofit needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try e.g. make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $@; echo "could not create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) (about 6 GB with PyTorch's CUDA build; a few minutes)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) (about 6 GB with PyTorch's CUDA build; a few minutes)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $(VENV)/.installed $@
