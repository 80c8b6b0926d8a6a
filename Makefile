# make demo    set up, then watch a BERT grow (two CPU ranks, no data of yours, no network)
# make test    set up, then the tests
# make check   ruff, types, import rules

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-state test-faults test-large check format clean

demo: $(READY)
	$(BIN)/growth-ds demo

test: $(READY)
	$(BIN)/python -m pytest

# State from every ZeRO stage and number of ranks to every other: see tests/distributed/test_state.py; prints a table.
test-state: $(READY)
	$(BIN)/python -m pytest -m state -s tests/distributed/test_state.py

# A hundred SIGKILLs at random instants, and the same final state every time (GROWTH_DS_KILLS, GROWTH_DS_SEED).
test-faults: $(READY)
	$(BIN)/python -m pytest -m faults -s tests/faults

# BERT-Large on the CPU: needs 20 GiB and several minutes.
test-large: $(READY)
	$(BIN)/python -m pytest -m large

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by itself, so that no other package chooses its build.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,mpi]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
