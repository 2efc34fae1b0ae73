#!/usr/bin/env bash
# Second training stage: streaming long tuning. Options: bash train_long.sh --help. Several GPUs: NUM_GPUS=8 bash ...
root="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
exec bash "$root/scripts/launch.sh" train --config_path "$root/configs/longlive_train_long.yaml" "$@"
