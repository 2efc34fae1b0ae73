# For train_shapes.sh and ablate_shapes.sh: stages of the Shapes world, each of which is trained once.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # an interpreter of LONGLIVE_PYTHON need not have longlive installed

longlive() { "$python" -m longlive "$@"; }

told() { # settings: those that tell what is learnt, in one order, paths below $runs
    printf '%s\n' "${@//"$runs/"/}" | sort |
        grep -vE '^(device|compile|low_memory|cuda_graphs|attention|log_iters|vis_interval|max_checkpoints|tensorboard|wandb_project)=' |
        paste -sd ' ' || true
}

train_once() { # stage, folder of the run, settings
    local weights="$2/generator.safetensors" asked last
    [[ $1 != vae ]] || weights="$2/vae.safetensors"
    asked="$(told "${@:3}")"
    if [[ -e "$2/done" ]]; then
        [[ ! -s "$2/done" || $asked == "$(<"$2/done")" ]] || {
            echo "error: $2: was trained with $(<"$2/done"), not with $asked; name another FOLDER" >&2
            exit 2
        }
        echo "$2: is done" >&2
        return
    fi
    longlive train --config_path "$root/configs/shapes_$1.yaml" logdir="$2" "${@:3}"
    last='import json, sys; print("step_%06d" % json.load(open(sys.argv[1]))["max_iters"])'
    last="$2/checkpoints/$("$python" -c "$last" "$2/train_config.json")"
    [[ -e $last && -e $weights && ! $last -nt $weights ]] || exit 1 # stopped by a signal; weights may have been exported on the way
    echo "$asked" >"$2/done"
}
