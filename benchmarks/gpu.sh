#!/usr/bin/env bash
# make bench-gpu: builds the CUDA ops, tests them, then measures; for a machine that may have no network.
#
#   WHEELS=folder   wheels of deepspeed and of whatever else the python at hand lacks; without it pip asks its index
#   OUT=folder      where the JSON goes; default benchmarks/results
#   PYTHON=python3  one that sees a CUDA torch
#
# Needs nvcc and one GPU. Each part has a limit of its own, nine minutes together; a part that fails or is cut off leaves
# the others their turn, and makes the exit code 1.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
VENV=${VENV:-.venv-gpu}
WHEELS=${WHEELS:-}
mkdir -p "$OUT"
failed=0

part() { # seconds, name, command...
    local limit=$1 name=$2 started=$SECONDS
    shift 2
    echo "== $name"
    if timeout --kill-after=5 "$limit" "$@"; then
        echo "== $name: $((SECONDS - started)) s"
    else
        echo "== $name: FAILED (exit code $?) after $((SECONDS - started)) s"
        failed=1
    fi
}

install() {
    local from=(--disable-pip-version-check --quiet -c constraints.txt --no-build-isolation)
    [ -n "$WHEELS" ] && from=(--disable-pip-version-check --quiet --no-build-isolation --no-index --find-links "$WHEELS")
    # The CUDA torch of the system is seen from the new environment and stays as it is.
    "$PYTHON" -m venv --system-site-packages "$VENV" &&
        "$VENV/bin/pip" install "${from[@]}" setuptools deepspeed megatron-core transformers pytest hypothesis &&
        "$VENV/bin/pip" install "${from[@]}" -e . &&
        "$VENV/bin/python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
}

export PYTHON VENV WHEELS
export -f install
part 150 install bash -c install
[ "$failed" = 1 ] && exit 1
part 20 doctor "$VENV/bin/growth-ds" doctor
part 80 test-gpu "$VENV/bin/python" -m pytest -m gpu tests/gpu
part 70 ops "$VENV/bin/python" benchmarks/ops.py --device cuda --quick --json "$OUT/ops_cuda.json"
part 220 train_throughput "$VENV/bin/python" benchmarks/train_throughput.py --device cuda --limit 30 --rounds 5 \
    --json "$OUT/train_throughput_cuda.json"
exit "$failed"
