#!/usr/bin/env bash
# The wheel and the tests that need no torch under every Python that is here: tests/pythons.sh [3.10 3.12 ...].
# Interpreters are taken from PATH and from pyenv; one that is not here is named and left out. Each gets a fresh
# environment below $TMPDIR with the light dependencies only; torch and DeepSpeed are what this does not show.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
light="typer rich pydantic PyYAML psutil numpy zstandard pytest hypothesis regex tokenizers sentencepiece"

interpreter() {
    for found in "$(command -v "python$1" || true)" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        if [[ -x $found ]] && "$found" -c 'import venv' 2>/dev/null; then
            echo "$found"
            return
        fi
    done
}

try() {
    local python=$1 here=$work/$2
    "$python" -m venv "$here/venv"
    # A copy: building leaves files in the tree. No compiler, and no torch to compile against: the package must do without.
    mkdir "$here/source"
    git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$here/source"
    (cd "$here/source" && CC=false CXX=false "$here/venv/bin/pip" wheel --quiet --disable-pip-version-check --no-deps -w "$here" .)
    # shellcheck disable=SC2086
    "$here/venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt $light
    "$here/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$here"/growth_ds-*.whl
    (cd "$work" && "$here/venv/bin/growth-ds" --help >/dev/null && "$here/venv/bin/growth-ds" train --help >/dev/null)
    (cd "$work" && "$here/venv/bin/python" -c 'from importlib.resources import files
root = files("growth_ds")
assert root.joinpath("py.typed").is_file() and root.joinpath("configs/run/demo.yaml").is_file()')
    cd "$root"
    "$here/venv/bin/python" -m pytest -p no:cacheprovider --confcutdir tests/data tests/data/test_{corpus,hashing,masking,ngrams,packing,prose}.py
    "$here/venv/bin/python" -m pytest -p no:cacheprovider --noconftest tests/test_{help,imports,lock,part,progress,rank_logs}.py \
        tests/docs tests/engine/test_{hosts,places}.py tests/evaluate/test_read.py
}

status=0
for version in "${@:-3.10 3.11 3.12 3.13}"; do
    for each in $version; do
        python=$(interpreter "$each")
        if [[ -z $python ]]; then
            echo "python $each: not here"
            continue
        fi
        code=0
        set +e  # the subshell ends at its first failure, which no `if` in front of it would let it do
        (set -e; try "$python" "$each")
        code=$?
        set -e
        if [[ $code == 0 ]]; then
            echo "python $each: $("$python" -V) builds the wheel, answers --help, and passes"
        else
            echo "python $each: FAILED"
            status=1
        fi
    done
done
exit $status
