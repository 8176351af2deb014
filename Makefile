# Each target makes what it needs; the environment lives in .venv. Needs Python 3.11 and a package registry.
PYTHON ?= python3
ARGS ?=
NAME ?= dense
JSON ?= out/$(NAME).json

BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
PEERS := $(filter-out %.no-deps,$(basename $(notdir $(wildcard bench/peers/*.txt))))
PYTEST := -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not bench"

.PHONY: help demo test matrix equality check golden docs bench bench-peers test-torch
.DELETE_ON_ERROR:

help:
	@echo "make demo                           train on real flights: two trainers and a server, on this machine"
	@echo "make test [ARGS='-k plan']          the tests"
	@echo "make matrix                         every plan on every small model, against one device"
	@echo "make equality                       the examples with tables on servers, in processes, against one device"
	@echo "make check                          ruff and pyright"
	@echo "make golden                         rewrite the golden files, then look at git diff"
	@echo "make docs                           run what the documents show"
	@echo "make bench [NAME=dense] [JSON=FILE] measure bench/NAME.py"
	@echo "make bench-peers                    other systems to measure against, each in an environment of its own (4 GB)"
	@echo "make test-torch VERSION=2.12.1      the tests with another torch"

# The stamp is newer than what it was made from; an environment that is already there is completed.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -c constraints.txt -e '.[examples,dev]'
	@touch $@

.venv/ready-bench: .venv/ready
	$(BIN)/python $(PIP) -c constraints.txt -e '.[examples,bench,dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/syncwright demo $(ARGS)

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)

matrix: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix $(ARGS)

equality: .venv/ready
	PYTHONPATH=examples OMP_NUM_THREADS=1 $(BIN)/python -m tests.distributed.example_matrix $(ARGS)

check: .venv/ready
	@status=0; \
	for command in "ruff check ." "ruff format --check ." pyright; do \
	  echo "$$command"; $(BIN)/$$command || status=1; \
	done; \
	exit $$status

golden: .venv/ready
	UPDATE_GOLDEN=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)
	@git status --short tests/golden docs '*.md'

docs: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/test_docs.py $(ARGS)

bench: .venv/ready-bench
	@mkdir -p '$(dir $(JSON))'
	$(BIN)/python bench/$(NAME).py --json '$(JSON)' $(ARGS)

# A peer that cannot be had does not keep the others away; what is measured without it says so.
bench-peers:
	@status=0; \
	for peer in $(PEERS); do \
	  $(MAKE) --no-print-directory .venv-peer-$$peer/ready || { echo "$$peer: not installed" >&2; status=1; }; \
	done; \
	exit $$status

.venv-peer-%/ready: bench/peers/%.txt $(wildcard bench/peers/*.no-deps.txt)
	$(PYTHON) -m venv .venv-peer-$*
	.venv-peer-$*/bin/python $(PIP) -r bench/peers/$*.txt
	if test -f bench/peers/$*.no-deps.txt; then \
	  .venv-peer-$*/bin/python $(PIP) --no-deps -r bench/peers/$*.no-deps.txt; \
	fi
	@touch $@

test-torch:
	@test -n '$(VERSION)' || { echo "say which torch: make test-torch VERSION=2.12.1" >&2; exit 2; }
	@$(MAKE) --no-print-directory .venv-torch-$(VERSION)/ready
	OMP_NUM_THREADS=1 .venv-torch-$(VERSION)/bin/python $(PYTEST) $(ARGS)

.venv-torch-%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch-$*
	sed -e 's/^torch==.*/torch==$*/' -e '/^setuptools==/d' constraints.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python $(PIP) -c .venv-torch-$*/constraints.txt -e '.[examples,dev]'
	@touch $@
