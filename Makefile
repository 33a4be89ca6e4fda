# bnrnn: `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | awk -F': *' '{printf "  make %-12s %s\n", $$1, $$2}'

# Installed again whenever the list of packages changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[plot]' --group dev
	@touch $@

install: $(VENV)/.installed  ## .venv with everything, versions as in constraints.txt

demo: install  ## LSTM against BN-LSTM on the embedded corpus: about two minutes, no download
	$(BIN)/bnrnn -m experiment=demo model=lstm,bnlstm resume=auto outputs=outputs/demo
	@echo
	$(BIN)/python -m bnrnn.report.compare outputs/demo outputs/demo/comparison.png

test: install  ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-all: install  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m 'not gpu'

lint: install  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: install  ## let ruff put the code in shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: install  ## dist/bnrnn-*.whl
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist .

results: install  ## results/ again, from the runs under outputs/
	$(BIN)/python -m bnrnn.report.results outputs results
	if [ -d outputs/demo ]; then $(BIN)/python -m bnrnn.report.compare outputs/demo results/figures/demo.png; fi

bench: install  ## results/bench/: what a training step costs, ours against nn.LSTM and others; ten minutes
	$(BIN)/python -m bench.recurrence results/bench
	$(BIN)/python -m bench.reader results/bench

clean:  ## remove .venv, builds and caches; never data or runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

.PHONY: help install demo test test-all lint format wheel results bench clean
