# For train_shapes.sh and ablate_shapes.sh: stages of the Shapes world, each of which is trained once.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # an interpreter of LONGLIVE_PYTHON need not have longlive installed

longlive() { "$python" -m longlive "$@"; }

train_once() { # stage, folder of the run below $runs, settings
    local weights="$2/generator.safetensors" asked="${*:3}"
    [[ $1 != vae ]] || weights="$2/vae.safetensors"
    asked="${asked//"$runs/"/}"
    if [[ -e "$2/done" ]]; then
        [[ ! -s "$2/done" || $asked == "$(<"$2/done")" ]] || {
            echo "error: $2: was trained with $(<"$2/done"), not with $asked; name another FOLDER" >&2
            exit 2
        }
        echo "$2: is done" >&2
        return
    fi
    mkdir -p "$2"
    touch "$2/begun"
    longlive train --config_path "$root/configs/shapes_$1.yaml" logdir="$2" "${@:3}"
    [[ "$weights" -nt "$2/begun" ]] || exit 1 # stopped by a signal; weights that lie there were exported on the way
    echo "$asked" >"$2/done"
}
