#!/usr/bin/env bash
# Sets up if needed, then runs `python -m longlive "$@"` from the caller's working directory.
#
#   NUM_GPUS=4 bash scripts/launch.sh inference ...          one process per GPU, through torchrun
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
num_gpus="${NUM_GPUS:-1}"
if [[ ! "$num_gpus" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NUM_GPUS=$num_gpus is not a number of GPUs, 1 or more" >&2
    exit 2
fi
python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # an interpreter of LONGLIVE_PYTHON need not have longlive installed
if ((num_gpus > 1)); then
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$num_gpus" -m longlive "$@"
fi
exec "$python" -m longlive "$@"
