# make demo    set up, then watch a BERT grow (two CPU ranks, no data of yours, no network)
# make test    set up, then the tests
# make check   ruff, types, import rules; CUDA kernels compile without spills (where nvcc is)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPS := $(wildcard csrc/*.py csrc/*/*)

.PHONY: demo ops test test-state test-faults test-large test-gpu check format clean

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

# The ops' CUDA kernels against the same references; needs a GPU and nvcc.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/python csrc/check_cuda.py

# The fused ops alone, after a change in csrc.
ops:
	$(BIN)/python setup.py --quiet build_ext --inplace

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by itself, so that no other package chooses its build.
$(READY): setup.py constraints.txt $(OPS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,mpi]'
	touch $@

clean:
	rm -rf $(VENV) build growth_ds/ops/*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache
