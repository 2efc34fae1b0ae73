#!/usr/bin/env bash
# First training stage: Self-Forcing initialisation. Options: bash train_init.sh --help. Several GPUs: NUM_GPUS=8 bash ...
root="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
exec bash "$root/scripts/launch.sh" train --config_path "$root/configs/longlive_train_init.yaml" "$@"
