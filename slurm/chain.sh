#!/bin/bash
# One run as a chain of jobs of different sizes: a job for each stage and one for each growth, each waiting for the one
# before it. Small models on few nodes, large ones on many.
#
#   slurm/chain.sh CONFIG RUN_DIR 'sbatch options of stage 0' 'of stage 1' ... [-- options of growth-ds train]
#
#   slurm/chain.sh configs/run/bert-large-stack.yaml runs/large '--nodes=2' '--nodes=4'
#
# gives  train stage 0 on 2 nodes -> grow -> train stage 1 on 4 nodes  and prints the numbers of the jobs. There must be as
# many strings as the config has stages. A growth has the options of the stage that it leads to, or those of
# GROWTH_DS_GROWTH (a few ranks on one node with memory enough; each rank reads only what it keeps).
#
# Every job is slurm/train.sbatch, cut off and requeued like it; the next one starts when it is COMPLETED. If one fails
# those behind it are cancelled, and the same line goes on: parts that are done end at once. The global batch of every
# stage must be a multiple of micro-batch x ranks for all of the sizes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 3 ]; then
    echo "chain.sh CONFIG RUN_DIR 'options of stage 0' ['of stage 1' ...] [-- options of growth-ds train]" >&2
    exit 2
fi
config=$1 run=$2
shift 2
sizes=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    sizes+=("$1")
    shift
done
[ $# -eq 0 ] || shift
more=("$@")
last=$((${#sizes[@]} - 1))
before=''

submit() { # name, options of sbatch in one string, options of growth-ds train...
    local name=$1 options number
    read -ra options <<<"$2"
    shift 2
    if [ -n "$before" ]; then options+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes); fi
    number=$(sbatch --parsable --job-name="$name" "${options[@]}" "$here/train.sbatch" "$config" --run-dir "$run" \
        "${more[@]}" "$@")
    before=${number%%;*}
    echo "$before $name"
}

for stage in "${!sizes[@]}"; do
    if [ "$stage" -gt 0 ]; then
        submit "growth-$stage" "${GROWTH_DS_GROWTH:-${sizes[$stage]}}" --until "$stage:start"
    fi
    # The last job has no --until: chain.sh cannot know whether the config has more stages, the run ends with it.
    if [ "$stage" -eq "$last" ]; then
        submit "stage-$stage" "${sizes[$stage]}"
    else
        submit "stage-$stage" "${sizes[$stage]}" --until "$stage:end"
    fi
done
