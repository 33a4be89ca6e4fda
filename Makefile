# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## */\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  make %-24s %s\n' "$$name" "$$text"; done

# Install again when the list of packages changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[plot]' --group dev
	@touch $@

install: $(VENV)/.installed  ## .venv with everything, versions as in constraints.txt

demo: install  ## compare LSTM and BN-LSTM on the embedded corpus: about two minutes, no download
	$(BIN)/bnrnn -m experiment=demo model=lstm,bnlstm resume=auto outputs=outputs/demo
	@echo
	$(BIN)/python -m bnrnn.report.compare outputs/demo outputs/demo/comparison.png

# Keep bytecode, regardless of the environment: compiling the tests takes longer than importing
# them, and each process that a test starts would compile the package again. Waiting threads must
# not spin: the threads of JOBS processes share the cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
test: install  ## the tests except the slow ones
	$(PYTEST)

test-all: install  ## all tests
	$(PYTEST) -m 'not gpu'

# tests/portable.py has the combinations; it logs and skips instruction sets that the machine lacks.
PORTABLE ?= --seeds 20
test-portable: install  ## the numeric tests with 20 seeds, all instruction sets, 1 to 3 threads
	$(BIN)/python -m tests.portable --jobs $(JOBS) $(PORTABLE)

CXX_SOURCES := bnrnn/kernels/csrc/*.h bnrnn/kernels/csrc/*.cpp
lint: install  ## ruff, pyright, clang-format, and the order of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

MINUTES ?= 10
SEED ?=
stress: install  ## random kills, concurrent commands, damaged files; compare with uninterrupted runs; MINUTES=10, SEED=
	$(BIN)/python -m tests.stress --minutes $(MINUTES) $(SEED:%=--seed %)

format: install  ## format the code with ruff and clang-format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

dist: install  ## dist/: the sdist, and the wheel built from it
	rm -rf dist build *.egg-info
	$(BIN)/python -m build --outdir dist .

PYTHONS ?= $(PYTHON)
RELEASE ?=
release-check: dist  ## wheel and sdist in new environments of PYTHONS="python3.11 python3.12", used there
	$(BIN)/python -m tests.release $(RELEASE) $(PYTHONS)

# The papers' tables and figures: SCALE=minutes|hour|full, SEEDS=0,1,2, ARGS="data_dir=DIR ...".
# Each target first prints its cost and expected results. They are at the head of each file in
# conf/reproduce, and below for the analyses.
SCALE ?= full
SEEDS ?= 0
ARGS ?=
SWEEPS := mnist pmnist ptb text8 cnn4 cnn gamma sum words frames
TRAINED := lengths population
ALONE := gradient-flow tanh
# The report takes no settings of runs. Write it even if a run failed, because it lists failed runs.
MAKE_REPORT = $(BIN)/bnrnn mode=report $(filter outputs=%,$(ARGS))
REPORT = status=$$?; $(MAKE_REPORT) && exit $$status

reproduce-mnist:  ## figure 2 left, table 1
reproduce-pmnist:  ## figure 2 right, table 1
reproduce-ptb:  ## figure 3a, table 2
reproduce-text8:  ## table 3
reproduce-cnn4:  ## figure 4 left
reproduce-cnn:  ## figure 4 right, table 4
reproduce-gamma:  ## figure 6: other initial values of gamma
reproduce-sum:  ## Laurent et al.: figure 1, their failed first attempt
reproduce-words:  ## Laurent et al.: table 2, figure 3
reproduce-frames:  ## Laurent et al. 2015, frames of speech: table 1 and figure 2, on AN4
reproduce-lengths:  ## figure 3b: test sequences of other lengths, after reproduce-ptb
reproduce-population:  ## figure 5: population statistics against time, after reproduce-ptb
reproduce-gradient-flow:  ## figure 1a: a minute or two, no training
reproduce-tanh:  ## figure 1b: a second

$(SWEEPS:%=reproduce-%): reproduce-%: install
	@sed '/^[^#]/,$$d; 1d; s/^# \{0,1\}//' conf/reproduce/$*.yaml
	$(BIN)/bnrnn reproduce=$* scale=$(SCALE) seed=$(SEEDS) resume=auto $(ARGS); $(REPORT)

$(TRAINED:%=reproduce-%): reproduce-%: expect-% reproduce-ptb
	$(BIN)/bnrnn reproduce=ptb scale=$(SCALE) seed=$(SEEDS) mode=$* run=auto \
		$(if $(filter population,$*),model=bnlstm) $(ARGS); $(REPORT)

$(ALONE:%=reproduce-%): reproduce-%: expect-% install
	$(BIN)/bnrnn mode=$(subst tanh,tanh_derivative,$(subst -,_,$*)) $(ARGS); $(REPORT)

expect-lengths:
	@echo "Figure 3b: the Penn Treebank test string, cut into slices of 100 to 1000 characters."
	@echo "Expected (the paper), bits per character from length 100 to 1000: BN-LSTM with population"
	@echo "statistics 1.398 to 1.333, below batch statistics at every length; LSTM 1.449 to 1.391."
	@echo "Two cores, 1000 units: 27 minutes for a BN-LSTM, 11 for an LSTM; make reproduce-ptb comes first."

expect-population:
	@echo "Figure 5: population mean and variance of units of the Penn Treebank BN-LSTM at each time step."
	@echo "Expected (the paper): all settle within about ten time steps."
	@echo "Two cores: a minute; make reproduce-ptb, which trains the model, comes first."

expect-gradient-flow:
	@echo "Figure 1a: the gradient in an untrained batch-normalised RNN over the pixels of MNIST."
	@echo "Expected: for W_h = I (the paper), the larger gamma, the faster the gradient vanishes; it stays"
	@echo "flat at 0.1. For orthogonal W_h the opposite holds. Two cores: two minutes."

expect-tanh:
	@echo "Figure 1b: the derivative of tanh for normal x of standard deviation 0 to 1."
	@echo "Expected: mean 0.99 at 0.1 and 0.61 at 1. Two cores: a second."

reproduce:  ## all of the above, one after the other, even if one fails
	$(MAKE) --keep-going $(SWEEPS:%=reproduce-%) $(TRAINED:%=reproduce-%) $(ALONE:%=reproduce-%)

report: install  ## outputs/report/: tables and figures of all runs, beside the paper's
	$(MAKE_REPORT)

results: install  ## regenerate results/ from the runs under outputs/
	$(BIN)/python -m bnrnn.report.results outputs results
	if [ -d outputs/demo ]; then $(BIN)/python -m bnrnn.report.compare outputs/demo results/figures/demo.png; fi

bench: install  ## results/bench/: the cost of a training step, compared with nn.LSTM and others; a quarter of an hour
	$(BIN)/python -m bench.recurrence results/bench
	$(BIN)/python -m bench.unnormalised results/bench
	$(BIN)/python -m bench.few_sequences results/bench
	$(BIN)/python -m bench.family results/bench
	$(BIN)/python -m bench.reader results/bench
	$(BIN)/python -m bench.processes results/bench
	$(BIN)/python -m bench.profile results/bench

# Use .venv if there is one, else $(PYTHON), which may already have a torch for the GPU.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:  ## on a GPU, at most nine minutes: tests and the cost of a step; results/bench/gpu-NAME.json
	$(GPU_PYTHON) -m bench.gpu results/bench

# Run the sweeps one after the other. The target stops at Ctrl-C, or when a sweep has run for
# GPU_MINUTES (0: no limit). Run it again to resume.
GPU_MINUTES ?= 0
GPU_SWEEPS ?= pmnist ptb words mnist text8 cnn4
gpu-evidence:  ## on a GPU: the papers' runs at full length, in parts of GPU_MINUTES=60; SEEDS=0,1,2
	@$(GPU_PYTHON) -m bench.gpu --only-ask
	for sweep in $(GPU_SWEEPS); do \
		timeout --foreground -s INT $(GPU_MINUTES)m $(GPU_PYTHON) -m bnrnn reproduce=$$sweep \
			scale=full seed=$(SEEDS) device=cuda resume=auto $(ARGS) || exit $$?; \
	done

SITE ?= site
docs: install  ## site/: the documentation as a web site, with the API reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir $(SITE)

clean:  ## remove .venv, builds and caches; never data or runs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache

.PHONY: help install demo test test-all test-portable stress lint format dist release-check results bench docs clean report reproduce \
	gpu-check gpu-evidence \
	$(SWEEPS:%=reproduce-%) $(TRAINED:%=reproduce-%) $(ALONE:%=reproduce-%) \
	$(TRAINED:%=expect-%) $(ALONE:%=expect-%)
