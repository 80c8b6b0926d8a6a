#!/bin/bash
# Compare growth methods on a cluster: every run of a suite as a task of an array, then the table.
#
#   slurm/compare.sh SUITE OUT [--seeds N] [--budget B] [--methods a,b] [-- options of sbatch for the runs]
#
# Called again it submits what is not at its end yet. Prints the numbers of both jobs.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 2 ]; then
    echo "compare.sh SUITE OUT [--seeds N] [--budget B] [--methods a,b] [-- options of sbatch]" >&2
    exit 2
fi
suite=$1 out=$2
shift 2
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift

python=python
if [ -n "${GROWTH_DS_VENV:-}" ]; then python=$GROWTH_DS_VENV/bin/python; fi
mkdir -p "$out"
list=$(cd "$out" && pwd)/runs.txt
"$python" "$here/suite_runs.py" "$suite" "$out" "${options[@]}" >"$list"
export GROWTH_DS_SLURM=$here
after=()
runs=$(wc -l <"$list")
if [ "$runs" -gt 0 ]; then
    array=$(sbatch --parsable --array="0-$((runs - 1))%${GROWTH_DS_AT_ONCE:-8}" "$@" "$here/compare.sbatch" "$list")
    echo "$array: $runs runs"
    # afterany: a run that failed has its row in the table too.
    after=(--dependency="afterany:${array%%;*}")
fi
printf -v line '%q ' "$python" "$here/suite_runs.py" "$suite" "$out" "${options[@]}" --table
table=$(sbatch --parsable "${after[@]}" --job-name=growth-ds-table --nodes=1 --ntasks=1 --time=0:30:00 \
    --output="$out/table-%j.log" --wrap="$line")
echo "$table: the table, $out/compare.html"
