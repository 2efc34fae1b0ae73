#!/usr/bin/env bash
# Everything of the Shapes world from nothing: VAE, teacher, causal model, Self-Forcing, streaming. Minutes on a large
# GPU, days on a CPU. Interrupted, the same command goes on where it stopped.
#
#   bash scripts/train_shapes.sh [FOLDER] [key=value ...]     FOLDER of the runs: default the repository's runs/shapes; settings: of every stage
#   CAUSAL_INIT=ode bash scripts/train_shapes.sh ...          the causal model by ODE regression, not by teacher forcing
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shapes_stages.bash"
runs="$root/runs/shapes"
if (($#)) && [[ $1 != *=* ]]; then
    runs="$(realpath -m "$1")"
    shift
fi
settings=("$@")

train() { # stage, then what it begins with
    echo "train_shapes: $1" >&2
    train_once "$1" "$runs/$1" "${@:2}" "${settings[@]}"
}

vae="vae_ckpt=$runs/vae/vae.safetensors"
teacher="$runs/teacher/generator.safetensors"
train vae
train teacher "$vae"
if [[ ${CAUSAL_INIT:-teacher_forcing} == ode ]]; then
    common=() # the settings that making clips knows too
    for setting in "${settings[@]}"; do [[ $setting == @(seed|device|num_scenes|batch_size)=* ]] && common+=("$setting"); done
    [[ -e "$runs/causal_init/done" ]] || longlive clips --config_path "$root/configs/shapes_clips.yaml" "$vae" real_ckpt="$teacher" \
        output_folder="$runs/clips" "${common[@]}"
    # clips as long as the teacher's, without what only scenes can show
    train causal_init "$vae" init_logdir="$runs/teacher" world=null clips_path="$runs/clips/clips.jsonl" \
        num_training_frames=21 batch_size=32 worn_past=false switch_share=0
else
    train causal_init "$vae" init_logdir="$runs/teacher"
fi
train train_init "$vae" init_logdir="$runs/causal_init" real_ckpt="$teacher" critic_ckpt="$teacher"
train train_long "$vae" init_logdir="$runs/train_init" real_ckpt="$teacher"
echo "train_shapes: bash inference.sh --config_path $runs/train_long/inference.yaml shows what was learnt" >&2
