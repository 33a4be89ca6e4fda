# bnrnn: `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## */\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  make %-24s %s\n' "$$name" "$$text"; done

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

# The paper's tables and figures: SCALE=minutes|hour|full, SEEDS=0,1,2, ARGS="data_dir=DIR ...".
# What each costs and what to expect stands at the head of its file in conf/reproduce, and is printed.
SCALE ?= full
SEEDS ?= 0
ARGS ?=
SWEEPS := mnist pmnist ptb text8 cnn4 cnn gamma
TRAINED := lengths population
ALONE := gradient-flow tanh
# Also after a run that failed: the report lists it.
REPORT = status=$$?; $(BIN)/bnrnn mode=report $(ARGS) && exit $$status

reproduce-mnist:  ## figure 2 left, table 1
reproduce-pmnist:  ## figure 2 right, table 1
reproduce-ptb:  ## figure 3a, table 2
reproduce-text8:  ## table 3
reproduce-cnn4:  ## figure 4 left
reproduce-cnn:  ## figure 4 right, table 4
reproduce-gamma:  ## figure 6: other initial values of gamma
reproduce-lengths:  ## figure 3b: test strings of other lengths, after reproduce-ptb
reproduce-population:  ## figure 5: population statistics against time, after reproduce-ptb
reproduce-gradient-flow:  ## figure 1a: a minute or two, no training
reproduce-tanh:  ## figure 1b: a second

$(SWEEPS:%=reproduce-%): reproduce-%: install
	@sed '/^[^#]/,$$d; 1d; s/^# \{0,1\}//' conf/reproduce/$*.yaml
	$(BIN)/bnrnn reproduce=$* scale=$(SCALE) seed=$(SEEDS) resume=auto $(ARGS); $(REPORT)

$(TRAINED:%=reproduce-%): reproduce-%: reproduce-ptb
	$(BIN)/bnrnn reproduce=ptb scale=$(SCALE) seed=$(SEEDS) mode=$* run=auto \
		$(if $(filter population,$*),model=bnlstm) $(ARGS); $(REPORT)

$(ALONE:%=reproduce-%): reproduce-%: install
	$(BIN)/bnrnn mode=$(subst tanh,tanh_derivative,$(subst -,_,$*)) $(ARGS); $(REPORT)

reproduce:  ## all of them, one after the other, whatever becomes of one
	$(MAKE) --keep-going $(SWEEPS:%=reproduce-%) $(TRAINED:%=reproduce-%) $(ALONE:%=reproduce-%)

report: install  ## outputs/report/: tables and figures from all runs, beside the paper's
	$(BIN)/bnrnn mode=report $(ARGS)

results: install  ## results/ again, from the runs under outputs/
	$(BIN)/python -m bnrnn.report.results outputs results
	if [ -d outputs/demo ]; then $(BIN)/python -m bnrnn.report.compare outputs/demo results/figures/demo.png; fi

bench: install  ## results/bench/: what a training step costs, ours against nn.LSTM and others; ten minutes
	$(BIN)/python -m bench.recurrence results/bench
	$(BIN)/python -m bench.reader results/bench

clean:  ## remove .venv, builds and caches; never data or runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

.PHONY: help install demo test test-all lint format wheel results bench clean report reproduce \
	$(SWEEPS:%=reproduce-%) $(TRAINED:%=reproduce-%) $(ALONE:%=reproduce-%)
