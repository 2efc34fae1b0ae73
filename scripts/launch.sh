#!/usr/bin/env bash
# Sets up if needed, then runs `python -m longlive "$@"` from the caller's working directory.
#
#   NUM_GPUS=4 bash scripts/launch.sh inference ...          one process per GPU; where there is none, on the CPU
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=host0 NUM_GPUS=8 bash scripts/launch.sh train ...
#                                                            on each of 2 machines, the other one with NODE_RANK=1
#
# The first process speaks; another only if it fails. The exit status is that of the first process that failed.
# Processes that make videos never talk to each other, and go on where one fails. Those of `train` cannot do without each
# other: when one has failed the others are killed at once, for SIGTERM would only make them wait for it to save.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
command="${1:-}"
num_gpus="${NUM_GPUS:-1}"
num_nodes="${NUM_NODES:-1}"
node_rank=0

fail() { echo "error: $*" >&2; exit 2; }
[[ "$num_gpus" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS=$num_gpus is not a number of GPUs, 1 or more"
[[ "$num_nodes" =~ ^[1-9][0-9]*$ ]] || fail "NUM_NODES=$num_nodes is not a number of machines, 1 or more"
if ((num_nodes > 1)); then
    node_rank="${NODE_RANK:-}"
    [[ "$node_rank" =~ ^(0|[1-9][0-9]*)$ ]] && ((node_rank < num_nodes)) ||
        fail "NODE_RANK=$node_rank is not the number of this machine, 0 to $((num_nodes - 1))"
    [[ -n "${MASTER_ADDR:-}" || "$command" != train ]] || fail "MASTER_ADDR must name the machine with NODE_RANK=0"
fi

python="$(bash "$root/scripts/setup.sh")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # an interpreter of LONGLIVE_PYTHON need not have longlive installed
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin while they wait starve a shared CPU
if ((num_gpus * num_nodes == 1)); then
    exec "$python" -m longlive "$@"
fi
if ((num_nodes > 1)); then
    export MASTER_PORT="${MASTER_PORT:-29500}"
else
    free_port='
import contextlib, random, socket
for port in random.sample(range(20000, 32768), 100):  # below those that the system gives to others before it is used
    with contextlib.suppress(OSError), socket.create_server(("", port)):
        print(port)
        break
'
    export MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-$("$python" -c "$free_port")}"
fi
export WORLD_SIZE=$((num_nodes * num_gpus)) LOCAL_WORLD_SIZE=$num_gpus

logs="$(mktemp -d)"
pids=()
signal() { kill "-$1" "${pids[@]}" || true; }
if [[ "$command" == train ]]; then stop=TERM; else stop=INT; fi
trap 'rm -rf "$logs"' EXIT
asked="" # while processes are being started, not all are in the list: their turn comes after
trap 'asked=INT' INT
trap 'asked="$stop"' TERM HUP
exec {say}>&2 2>/dev/null # in its own words bash would tell of every process that was killed
set -m # job control: the processes take Ctrl-C from this script alone, and do not ignore it
for ((i = 0; i < num_gpus; i++)); do
    exec {out}>&1 {err}>&"$say"
    ((i == 0)) || exec {out}>/dev/null {err}>"$logs/$i"
    RANK=$((node_rank * num_gpus + i)) LOCAL_RANK=$i "$python" -m longlive "$@" >&"$out" 2>&"$err" {out}>&- {err}>&- {say}>&- &
    pids+=($!)
    exec {out}>&- {err}>&-
done
set +m
trap 'signal INT' INT
trap 'signal "$stop"' TERM HUP
[[ -z "$asked" ]] || signal "$asked"

status=0
is_running() { kill -0 "${pids[$1]}"; }
exec {never}<> <(:) # nothing comes from it, nor its end
pause() { read -rt 0.1 -u "$never" || true; } # no `sleep`: bash can lose a Ctrl-C, or hang, while it waits for a program
look_back() { # at process $1, which has ended
    local code=0
    wait "${pids[$1]}" || code=$?
    ((code > 0 && status == 0)) || return 0
    status=$code
    (($1 == 0)) || cat "$logs/$1" >&"$say"
    if ((code > 128 && code != 128 + 2 && code != 128 + 15)); then # not as asked
        echo "error: process $((node_rank * num_gpus + $1)) was ended by SIG$(kill -l "$code")" >&"$say"
    fi
}

if [[ "$command" != train ]]; then
    for i in "${!pids[@]}"; do
        while is_running "$i"; do pause; done
        look_back "$i"
    done
    exit "$status"
fi
running=("${!pids[@]}")
while ((status == 0 && ${#running[@]} > 0)); do
    pause
    for i in "${running[@]}"; do
        is_running "$i" && continue
        unset "running[i]"
        look_back "$i"
    done
done
for i in "${running[@]}"; do kill -KILL -- "-${pids[i]}" || true; done # and all that they have started
exit "$status"
