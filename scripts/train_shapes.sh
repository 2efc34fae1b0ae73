#!/usr/bin/env bash
# Everything of the Shapes world from nothing: VAE, teacher, causal model, Self-Forcing, streaming. About 20 minutes of
# one large GPU, days of a CPU. Interrupted, the same command goes on where it stopped.
#
#   bash scripts/train_shapes.sh [runs folder, default runs/shapes] [key=value for every stage ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs="runs/shapes"
if (($#)) && [[ $1 != *=* ]]; then
    runs="$1"
    shift
fi
runs="$(realpath -m "$runs")"
python="$(bash scripts/setup.sh)"

train() { # stage, then settings
    if [[ -e "$runs/$1/done" ]]; then
        echo "train_shapes: $1 is there already" >&2
        return
    fi
    echo "train_shapes: $1" >&2
    "$python" -m longlive train --config_path "configs/shapes_$1.yaml" logdir="$runs/$1" "${@:2}"
    touch "$runs/$1/done"
}
vae="vae_ckpt=$runs/vae/vae.safetensors"
teacher="real_ckpt=$runs/teacher/generator.safetensors"
train vae "$@"
train teacher "$vae" "$@"
train causal_init "$vae" init_logdir="$runs/teacher" "$@"
train train_init "$vae" init_logdir="$runs/causal_init" "$teacher" critic_ckpt="$runs/teacher/generator.safetensors" "$@"
train train_long "$vae" init_logdir="$runs/train_init" "$teacher" "$@"
