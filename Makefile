# Tandem's commands. `make setup` is implied by the others and costs nothing the second time.
#   make demo [PROMPT="…"]   a whole cluster on this machine answers a prompt
#   make test                the tests, at most ten minutes      make test-full   the slow ones too
#   make check               format, lint, types, import arrows, generated code, unsafe code, known faults of pins, manifests
#   make proto               regenerate protos/tandem_pb2*       make clean       remove what was built
#   make peers               what `tandem bench … --against` compares with (some minutes, 6 GB); `make peers-engine`,
#                            `peers-transfer` and `peers-router` install those of `bench engine`, `transfer` and `pool`, `router`

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
STAMP := $(VENV)/.tandem-setup
BIN := $(VENV)/bin
PEERS := .peers
# The demo's prompt, passed through the environment as it is: make expands no dollar sign in it, the shell no quote.
PROMPT ?= Write one sentence about the sea.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: help setup platform model demo test test-full check proto peers peers-engine peers-transfer peers-router clean

help:
	@sed -n 's/^# \{0,1\}//; 1,7p' Makefile

platform:
	@found="$$(uname -s) $$(uname -m)"; \
	[ "$$found" = "Linux x86_64" ] || { echo "error: Tandem runs on Linux x86_64; this is $$found" >&2; exit 1; }

# Pinned by constraints.txt; a change of either file installs anew.
setup: platform $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kvpool/native/*.cpp router/native/*.cpp tandem/sim/native/*.cpp) | platform
	@python=""; \
	for candidate in python3.11 python3; do \
	    command -v $$candidate >/dev/null || continue; \
	    $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { python=$$candidate; break; }; \
	done; \
	[ -n "$$python" ] || { echo "error: Tandem needs Python 3.11 or newer; found $$(python3 --version 2>&1 || true)" >&2; exit 1; }; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV) || \
	    { echo "error: $$python can't make a virtual environment; install its venv module (Debian: python3-venv)" >&2; exit 1; }; \
	echo "Installing into $(VENV) (a few minutes the first time) …"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $(STAMP)

# Tests and demo run a real, small model; it is fetched once and verified.
model: setup
	@$(BIN)/tandem pull smollm2-135m >/dev/null

demo: setup
	@$(BIN)/tandem demo "$$PROMPT"

test: model
	@$(BIN)/python -m pytest -q -m "not slow"

test-full: model
	@$(BIN)/python -m pytest -q

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m protos.generate --check
	@$(BIN)/bandit -q -c pyproject.toml -r decode_worker kernels kvpool prefill_worker protos router tandem benchmarks setup.py .ci
	@$(BIN)/python .ci/audit.py
	@$(BIN)/python deploy/kubernetes/check.py

proto: setup
	@$(BIN)/python -m protos.generate

# What the engine, the transports and the pool are compared with, each in a virtual environment of its own: none of it is
# Tandem's. pip brings cmake by itself.
PEERS_CHECK_llama-cpp = for tool in cc c++; do command -v $$tool >/dev/null || \
	    { echo "error: llama.cpp is compiled here and needs a C and C++ compiler: there is no '$$tool' (Debian: build-essential)" >&2; exit 1; }; done
PEERS_CHECK_vllm = :
PEERS_CHECK_nixl = :
PEERS_CHECK_lmcache = :
PEERS_CHECK_dynamo = :
# Its wheel is linked against these, whatever it moves bytes by.
PEERS_CHECK_mooncake = for library in libibverbs.so.1 libnuma.so.1 libcurl.so.4; do \
	    $(BIN)/python -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' $$library 2>/dev/null || \
	    { echo "error: Mooncake needs $$library, which is not here (Debian: apt-get install libibverbs1 libnuma1 libcurl4)" >&2; exit 1; }; done
PEERS_PIP_nixl = --no-deps
PEERS_AFTER_llama-cpp = :
PEERS_AFTER_nixl = :
PEERS_AFTER_mooncake = :
PEERS_AFTER_lmcache = $(PEERS)/lmcache/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmcache==0.5.6
PEERS_AFTER_dynamo = $(PEERS)/dynamo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ai-dynamo-runtime==1.6.1
# They don't match the torch that vLLM comes with, and importing vLLM fails while they are there.
PEERS_AFTER_vllm = $(PEERS)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

peers: peers-engine peers-transfer peers-router
peers-engine: $(PEERS)/llama-cpp/.installed $(PEERS)/vllm/.installed
peers-router: $(PEERS)/dynamo/.installed
peers-transfer: $(PEERS)/nixl/.installed $(PEERS)/mooncake/.installed $(PEERS)/lmcache/.installed

$(PEERS)/%/.installed: benchmarks/peers/%.txt | setup
	@$(PEERS_CHECK_$*)
	@echo "Installing $* into $(@D) (minutes: llama.cpp is compiled, vLLM brings its own torch) …"
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_PIP_$*) -r $< || \
	    { echo "error: $* could not be installed; pip's words are above. 'make peers' tries again" >&2; exit 1; }
	@$(PEERS_AFTER_$*)
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
