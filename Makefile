# make demo      environment, then the four commands of the README on the embedded example
# make test      environment, lint, the quick tests
# make test-all  the same and the slow tests: servers, kills, several ranks, a browser
# make test-gpu  the tests that need a GPU, on one
# make env       the environment alone, in .venv; make clean removes it

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# CUDA where there is a GPU, otherwise the CPU set.
REQUIREMENTS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
# A package index that has torch's CPU build (see README, "Install"); only for machines without a GPU.
TORCH_INDEX ?=

.PHONY: env demo test test-all test-gpu lint clean

env: $(VENV)/.$(REQUIREMENTS).done

$(VENV)/.$(REQUIREMENTS).done: $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r $(REQUIREMENTS) -e '.[dev]' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
ifeq ($(REQUIREMENTS),requirements-cpu.txt)
	$(BIN)/pip uninstall -y torchvision torchaudio torchcodec
endif
	touch $@

demo: env
	PATH="$(BIN):$$PATH" python refine/refine_response_vllm.py
	PATH="$(BIN):$$PATH" python score/cali_score_vllm.py
	cd RewardTrainer && PATH="$(BIN):$$PATH" bash scripts/train_distilrm.sh
	cd RewardTrainer && PATH="$(BIN):$$PATH" bash scripts/eval_rm.sh

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

test-gpu: env
	$(BIN)/python -m pytest -m cuda

# The environment alone: what you trained and what a teacher was paid for is not to be made again in minutes.
clean:
	rm -rf $(VENV)
