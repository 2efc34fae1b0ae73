#!/usr/bin/env bash
# Sets up if needed, then runs `python -m longlive "$@"` from the caller's working directory.
#
#   NUM_GPUS=4 bash scripts/launch.sh inference ...          one process per GPU
#
# The processes of several GPUs share out the work and never talk to each other. The first one speaks; another only if it
# fails. The exit status is that of the first process that failed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
num_gpus="${NUM_GPUS:-1}"
if [[ ! "$num_gpus" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NUM_GPUS=$num_gpus is not a number of GPUs, 1 or more" >&2
    exit 2
fi
python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # an interpreter of LONGLIVE_PYTHON need not have longlive installed
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin while they wait starve a shared CPU
if ((num_gpus == 1)); then
    exec "$python" -m longlive "$@"
fi

logs="$(mktemp -d)"
pids=()
trap 'rm -rf "$logs"' EXIT
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT TERM HUP
set -m # job control: the processes take Ctrl-C from this script alone, and do not ignore it
for ((rank = 0; rank < num_gpus; rank++)); do
    exec {out}>&1 {err}>&2
    ((rank == 0)) || exec {out}>/dev/null {err}>"$logs/$rank"
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$num_gpus "$python" -m longlive "$@" >&"$out" 2>&"$err" {out}>&- {err}>&- &
    pids+=($!)
    exec {out}>&- {err}>&-
done
set +m
status=0
for ((rank = 0; rank < num_gpus; rank++)); do
    code=0
    wait "${pids[rank]}" || code=$?
    while kill -0 "${pids[rank]}" 2>/dev/null; do wait "${pids[rank]}" || code=$?; done # a signal interrupts wait
    if ((code > 0 && status == 0)); then
        status=$code
        ((rank == 0)) || cat "$logs/$rank" >&2
    fi
done
exit "$status"
