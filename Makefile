# `make demo` and `make test` work on a fresh machine with Python 3.10 or newer: each makes its own environment first.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python

# Tests that need nothing newer than the oldest supported Transformers.
OLDEST_TESTS := tests/test_config.py tests/test_packed.py tests/test_quantizer.py tests/test_step.py tests/methods \
	tests/test_saving.py tests/test_walk.py tests/test_block.py tests/test_surgery.py tests/test_distance.py tests/test_patch.py \
	tests/test_train.py tests/test_losses.py tests/test_adapters.py tests/test_sparse_lora.py tests/test_sparse.py \
	tests/test_sparsity.py tests/test_sparse_step.py tests/test_sparse_training.py tests/test_stream.py \
	tests/test_binary.py tests/test_binary_step.py tests/test_sign.py tests/test_sign_training.py tests/test_blockwise.py \
	tests/test_latent.py tests/test_stock_bitnet.py

# Benchmarks that need a GPU, another environment or arguments.
ASKING := $(wildcard benchmarks/gpu_*.py) benchmarks/peer_llmcompressor.py benchmarks/gguf_llama_cpp.py

.PHONY: demo test test-oldest style check bench clean

demo: $(VENV)/.ready  ## slim SmolLM2-135M-Instruct, reload it, compare both models
	$(RUN) examples/demo.py

test: $(VENV)/.ready  ## the whole suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8

test-oldest: $(OLDEST)/.ready  ## the core tests under the oldest supported Transformers
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)

style: $(VENV)/.ready  ## format and fix
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

check: $(VENV)/.ready  ## what `style` would change, without changing it
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.ready  ## every script in benchmarks/; results go to benchmarks/results
	set -e; for script in $(filter-out $(ASKING),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(RUN) $$script; done

clean:
	rm -rf $(VENV) $(OLDEST) .cache build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that pip settles on one build of it before anything else asks for torch.
$(VENV)/.ready: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install $$(grep '^torch==' requirements-dev.txt)
	$(RUN) -m pip install -r requirements-dev.txt
	$(RUN) -m pip install --no-deps --no-build-isolation --editable .
	touch $@

$(OLDEST)/.ready: requirements-oldest.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --upgrade pip
	$(OLDEST)/bin/python -m pip install $$(grep '^torch==' requirements-oldest.txt)
	$(OLDEST)/bin/python -m pip install -r requirements-oldest.txt
	$(OLDEST)/bin/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@
