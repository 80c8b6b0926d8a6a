# make demo    set up, then watch a BERT grow (two CPU ranks, no data of yours, no network)
# make test    set up, then the tests
# make check   ruff, types, import rules, API page; CUDA kernels compile without spills (where nvcc is)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPS := $(wildcard csrc/*.py csrc/*/*)

.PHONY: demo ops test test-slow test-state test-faults test-large test-gpu test-cluster test-cluster-core test-image test-fuzz test-pythons lint-docker bench suite-s bench-gpu check docs format clean

demo: $(READY)
	$(BIN)/growth-ds demo

test: $(READY)
	$(BIN)/python -m pytest

# State from every ZeRO stage and number of ranks to every other: see tests/distributed/test_state.py; prints a table.
test-state: $(READY)
	$(BIN)/python -m pytest -m state -s tests/distributed/test_state.py

# A hundred SIGKILLs at random instants, and the same final state every time (GROWTH_DS_KILLS, GROWTH_DS_SEED).
test-faults: $(READY)
	$(BIN)/python -m pytest -m faults -s tests/faults tests/suite

# Minutes each: launches that hang, every case of the growth recipes, the benchmarks from end to end.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# New damaged files and command lines for every reader, 20 minutes of them; prints how many (GROWTH_DS_FUZZ_S: seconds
# of each reader; 0: a few, always the same).
test-fuzz: $(READY)
	GROWTH_DS_FUZZ_S=$${GROWTH_DS_FUZZ_S:-43} $(BIN)/python -m pytest -m fuzz -s tests/fuzz

# BERT-Large on the CPU: needs 20 GiB and several minutes.
test-large: $(READY)
	$(BIN)/python -m pytest -m large

# The ops' CUDA kernels against the same references; needs a GPU and nvcc.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu

# Two hosts with Slurm, ssh and Open MPI in namespaces of this machine; installs Debian packages, needs root. Elsewhere
# the tests are skipped and say why. The end of its output has the launchers and hosts that were really run.
test-cluster: $(READY)
	bash tests/cluster/packages.sh
	$(BIN)/python -m pytest -m cluster -rs tests/cluster

# The part of it that continuous integration has time for: each way to start ranks, and two faults.
test-cluster-core: $(READY)
	bash tests/cluster/packages.sh
	$(BIN)/python -m pytest -m core -rs tests/cluster

# The wheel without a compiler, and the tests that need no torch, under every Python from 3.10 to 3.13 that is here.
test-pythons:
	bash tests/pythons.sh

# docker/Dockerfile.cpu built by buildah on a base made of this Debian, and run in two containers on those two hosts; 5 GB
# of disk for the time being. Root and Debian as above; pip finds torch where it finds it here (PIP_EXTRA_INDEX_URL).
test-image: $(READY)
	bash tests/cluster/packages.sh images
	$(BIN)/python -m pytest -m image -rs tests/cluster/test_images.py

# hadolint and shellcheck, each where it is installed.
lint-docker:
	bash docker/lint.sh $(BIN)

# Speed beside the peers, on this machine's processor; the better part of an hour, and nothing else may run beside it.
bench: $(READY)
	$(BIN)/python benchmarks/train_throughput.py --device cpu --json benchmarks/results/train_throughput.json
	$(BIN)/python benchmarks/ops.py --device cpu --json benchmarks/results/ops.json
	$(BIN)/python benchmarks/data.py --json benchmarks/results/data.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/step_profile.py --json benchmarks/results/step_profile.json
	$(BIN)/python benchmarks/compiled.py --device cpu --json benchmarks/results/compiled.json
	$(BIN)/python benchmarks/fused_curves.py --json benchmarks/results/fused_curves.json
	$(BIN)/python benchmarks/plan_error.py --json benchmarks/results/plan_error.json

# The proof: every growth method against training from scratch on ../shared/data/pretrain; an hour or two, goes on when
# started again.
suite-s: $(READY)
	$(BIN)/python benchmarks/suite.py configs/suite/s.yaml --out runs/suite-s --json benchmarks/results/suite_s.json

# The same on a GPU: its own environment, the CUDA ops built and tested first; within nine minutes (WHEELS, OUT: see it).
bench-gpu:
	bash benchmarks/gpu.sh

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/python docs/api.py
	$(BIN)/python csrc/check_cuda.py
	bash docker/lint.sh $(BIN)

# The API page of what a researcher calls from Python, in build/docs; a warning of pdoc's fails it.
docs: $(READY)
	$(BIN)/python docs/api.py

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
