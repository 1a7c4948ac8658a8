# Everything runs from the checkout, in .venv, which is built from requirements/lock.txt whenever that has changed.
#   PYTHON  the interpreter that .venv is made with (3.11 or newer)
#   TORCH   cpu (default) or cuda; an existing .venv keeps its build
#   ARGS    passed on: make compare ARGS="force=true", make test ARGS="-k gate"
PYTHON ?= python3
VENV := .venv
TORCH ?= $(or $(shell cat $(VENV)/torch-build 2>/dev/null),cpu)
ARGS ?=

STAMP := $(VENV)/ready-$(TORCH)
SOURCES := $(wildcard moe baselines methods experiments analysis slurm tests)

.DEFAULT_GOAL := help
.PHONY: help venv compare figures report test test-gpu test-slurm lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): requirements/lock.txt requirements/install.sh
	@bash requirements/install.sh "$(PYTHON)" "$(VENV)" "$(TORCH)"
	@touch $@

venv: $(STAMP) ## build .venv from the lock (TORCH=cpu or TORCH=cuda, PYTHON=python3)

compare: $(STAMP) ## compare the systems on this machine: table and figures in outputs/compare
	$(VENV)/bin/python -m experiments.compare $(ARGS)

figures: $(STAMP) ## make the papers' figures and tables again from results/ and outputs/, into outputs/figures
	$(VENV)/bin/python -m analysis.figures $(ARGS)

report: $(STAMP) ## write outputs/report.html: tables, figures, claims and every run's routing on one page
	$(VENV)/bin/python -m analysis.report outputs $(ARGS)

test: $(STAMP) ## run the whole test suite
	$(VENV)/bin/python -m pytest -q $(ARGS)

test-gpu: $(STAMP) ## run the tests that need GPUs, on all GPUs of this machine
	$(VENV)/bin/python -m pytest -q tests/gpu tests/test_kernels.py $(ARGS)

test-slurm: $(STAMP) ## run the tests that need Slurm, on a private one in network namespaces (root; Debian's packages)
	bash tests/slurm/install.sh
	$(VENV)/bin/python -m pytest -q tests/slurm $(ARGS)

lint: $(STAMP) ## ruff and mypy, all of them even if one complains
	@failed=; for tool in "ruff check" "ruff format --check"; do \
		echo "$$tool ."; $(VENV)/bin/$$tool . || failed=1; done; \
	echo "mypy $(SOURCES)"; $(VENV)/bin/mypy $(SOURCES) || failed=1; \
	test -z "$$failed"

format: $(STAMP) ## let ruff format and sort the imports
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lock: $(STAMP) ## write requirements/lock.txt anew from pyproject.toml (ARGS=--upgrade for newer versions)
	bash requirements/lock.sh $(VENV)/bin/uv $(ARGS)

clean: ## remove .venv and the tools' caches; outputs/ and .cache/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
