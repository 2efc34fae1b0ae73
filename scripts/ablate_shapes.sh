#!/usr/bin/env bash
# What the parts of the method are worth in the Shapes world: students that differ in one thing, with fewer steps than
# those of train_shapes.sh, from its teacher and, where that is not what differs, its causal model; then what each of
# them makes of held-out scenes. Those of absolute positions differ in length and number of clips as well.
#
#   bash scripts/ablate_shapes.sh FOLDER [NAME ...]     FOLDER of train_shapes.sh; NAMEs: default all, one after another
#   ABLATE_SETTINGS="device=cpu …" EVALUATE_SETTINGS="…"  more settings of every stage, of every evaluation
#
# Figures go to FOLDER/ablations/NAME.json. Several of these at a time may share a GPU, once those are trained that
# others go on from: base, and for relative_later absolute.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/shapes_stages.bash"
runs="$(realpath -m "${1:?usage: bash scripts/ablate_shapes.sh FOLDER [NAME ...]}")"
all=(base stage_1 no_sink sink_unused sink_6 window_6 window_9 window_21 no_switch lora_8 lora_64)
all+=(never_switched plain_past absolute relative_later)
names=("${@:2}")
((${#names[@]})) || names=("${all[@]}")
for name in "${names[@]}"; do
    [[ " ${all[*]} " == *" $name "* ]] || { echo "ablate_shapes: $name is not known, accepted: ${all[*]}" >&2 && exit 2; }
done
out="$runs/ablations"
within_video="model_kwargs.use_infinite_attention=false"
read -ra more <<<"${ABLATE_SETTINGS:-}"
read -ra measured <<<"${EVALUATE_SETTINGS:-}"

train() { # stage, name, init_logdir, settings
    train_once "$1" "$out/$2/$1" init_logdir="$3" seed=7 vae_ckpt="$runs/vae/vae.safetensors" \
        real_ckpt="$runs/teacher/generator.safetensors" "${@:4}" "${more[@]}"
}
train_init() { # name, settings; from the causal model of this name, where it has one
    local causal="$out/$1/causal_init"
    [[ -e "$causal/done" ]] || causal="$runs/causal_init"
    train train_init "$1" "$causal" critic_ckpt="$runs/teacher/generator.safetensors" max_iters=600 "${@:2}"
}
train_long() { # name, whose first stage, settings
    train train_long "$1" "$out/$2/train_init" max_iters=240 "${@:3}"
}
both() { # name, settings
    train_init "$@"
    train_long "$1" "$@"
}
causal_init() { # name, settings; with the seed of the causal model of all others
    local seed
    seed="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["seed"])' "$runs/causal_init/train_config.json")"
    train causal_init "$1" "$runs/teacher" seed="$seed" "${@:2}"
}
absolute() { # positions within the video in all stages, and clips no longer than the teacher's
    causal_init absolute num_training_frames=21 num_scenes=16384 batch_size=32 "$within_video"
    both absolute "$within_video"
}
evaluate() { # name, folder of the run, settings
    [[ -e "$out/$1.json" ]] && return
    longlive evaluate --suite shapes --seed 1 --json "$out/$1.json" --config_path "$2/inference.yaml" \
        batch_size=200 "lengths_s=[5,30,60]" "${@:3}" "${measured[@]}"
}

mkdir -p "$out"
for name in "${names[@]}"; do
    echo "ablate_shapes: $name" >&2
    folder="$out/$name/train_long" settings=()
    case "$name" in
        base) both base ;;
        no_sink) both no_sink model_kwargs.sink_size=0 ;;
        sink_6) both sink_6 model_kwargs.sink_size=6 model_kwargs.local_attn_size=15 ;; # and the same past as ever
        window_*) both "$name" model_kwargs.local_attn_size="${name#window_}" ;;
        no_switch) # in streaming
            train_init base
            train_long no_switch base switch_mode=none
            ;;
        never_switched) # in teacher forcing neither
            causal_init never_switched switch_share=0
            train_init never_switched
            train_long never_switched never_switched switch_mode=none
            ;;
        plain_past) # teacher forcing with a past that is never off
            causal_init plain_past worn_past=false
            both plain_past
            ;;
        lora_*) # of the rank in the name
            train_init base
            train_long "$name" base adapter.type=lora adapter.rank="${name#lora_}" adapter.alpha="${name#lora_}" lr=1.6e-4
            ;;
        stage_1) # before streaming
            train_init base
            folder="$out/base/train_init"
            ;;
        absolute) absolute ;; # positions within the video, not the window
        relative_later) # positions within the window, where training had those within the video
            absolute
            folder="$out/absolute/train_long" settings=(model_kwargs.use_infinite_attention=true)
            ;;
        sink_unused) # trained with a sink
            both base
            folder="$out/base/train_long" settings=(model_kwargs.sink_size=0)
            ;;
    esac
    evaluate "$name" "$folder" "${settings[@]}"
done
