# make run   sets everything up and chats with the built-in demo model (ARGS="FOLDER" for another)
# make test  sets everything up and runs every check
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint types check clean

run: $(VENV)/installed
	@$(BIN)/m1 run $(ARGS)

test: lint types check

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-$(EXTRAS)
	$(BIN)/mypy

check: $(VENV)/installed-$(EXTRAS)
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

$(VENV)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

# torch first and by its version: a range would let pip look for something newer.
$(VENV)/installed: $(VENV)/pip pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-$(EXTRAS): $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
