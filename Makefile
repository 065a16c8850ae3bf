# Every target creates .venv and installs what it needs on first use.
#
#   make demo                          the main job, end to end, on this machine
#   make test                          all tests (installs the packages of mosquitto and PostgreSQL if it can)
#   make demo TORCH_BACKEND=auto       a PyTorch for this machine's GPU instead of the CPU

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-ansible trust check docs clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Create .venv with everything for demo and tests

$(VENV)/.installed: pyproject.toml tools/install_torch.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py "$(TORCH)"
	$(BIN)/python -m pip --disable-pip-version-check install -q -e '.[demo,dev]'
	@touch $@

demo: venv ## Four emulated devices fine-tune MiniLM with LEGEND
	$(BIN)/legend demo $(DEMO_ARGS)

test: venv mosquitto postgresql ## Every test, attacks in their short form; those with real fleets come last
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not e2e and not ansible and not trust"
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "e2e and not trust"

test-fast: venv ## The tests that need no service, no training and attack nothing
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/trust -m "not integration and not e2e and not train and not ansible"

test-ansible: venv lab ## Lint the roles and provision virtual hosts (root; LEGEND_LAB=short: without PyTorch)
	$(BIN)/python -m pip --disable-pip-version-check install -q -e '.[ansible]'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m ansible

trust: venv mosquitto ## The attack suite in its long form (twenty minutes)
	$(BIN)/python -m pytest -m trust tests/trust/test_load.py
	$(BIN)/python -m pytest -n 3 -m trust --ignore tests/trust/test_load.py

check: venv ## Format, lint, types, import contracts, generated files, dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_cli_docs.py --check
	$(BIN)/python tools/check_dependencies.py

docs: venv ## Write the generated files anew
	$(BIN)/python tools/generate_cli_docs.py
	$(BIN)/python -m profiles.schema

.PHONY: mosquitto
mosquitto:
	@command -v mosquitto >/dev/null || test -x /usr/sbin/mosquitto || sh tools/install_package.sh mosquitto

.PHONY: lab
lab:
	@command -v debootstrap >/dev/null && command -v systemd-nspawn >/dev/null \
		|| sh tools/install_package.sh debootstrap systemd-container iproute2 iptables openssh-client

.PHONY: postgresql
postgresql:
	@ls /usr/lib/postgresql/*/bin/pg_ctl >/dev/null 2>&1 || sh tools/install_package.sh postgresql

clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
