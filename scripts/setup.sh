#!/usr/bin/env bash
# Makes .venv in the repository root with everything that running and testing need, and prints the path of its python.
#
#   bash scripts/setup.sh
#   LONGLIVE_PYTHON=/path/to/python bash scripts/setup.sh    use that interpreter and the packages it has; install nothing
#
# Progress goes to stderr. A second call returns at once and needs no network; an interrupted one is made good by the
# next; of several at a time one works and the others wait. An activated environment is neither used nor changed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/longlive-setup"

say() { echo "setup: $*" >&2; }
fail() { echo "error: $*" >&2; exit 2; }
is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# All that an installed environment depends on; its place too, since an editable install holds its path.
wanted() { echo "$root"; cat "$root"/{requirements,requirements-dev}.txt "$root/pyproject.toml"; }
is_done() { [[ -x "$python" && -f "$stamp" && "$(wanted)" == "$(<"$stamp")" ]]; }

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3 python; do
        if is_supported "$name" && can_make_venv "$name"; then echo "$name"; return; fi
    done
    fail "no Python >= 3.11 with the venv module found; install one or set LONGLIVE_PYTHON to an interpreter to use"
}

make_venv() {
    local base
    base="$(find_python)"
    say "making $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" >&2 || fail "could not make $venv, see above"
}

pip_install() {
    say "installing $1"
    "$python" -m pip --disable-pip-version-check install -qq "${@:2}" >&2 ||
        fail "could not install $1, see above; run bash scripts/setup.sh again to go on"
}

install() {
    "$python" -m pip --version >/dev/null 2>&1 || make_venv
    pip_install "torch (a large download)" "$(grep '^torch==' "$root/requirements.txt")"
    pip_install "the other packages" -r "$root/requirements.txt" -r "$root/requirements-dev.txt"
    pip_install "longlive itself" --no-deps --no-build-isolation --editable "$root"
    wanted >"$stamp" # last: a set-up without it is not complete
    say "done"
}

if [[ -n "${LONGLIVE_PYTHON:-}" ]]; then
    is_supported "$LONGLIVE_PYTHON" || fail "LONGLIVE_PYTHON=$LONGLIVE_PYTHON is not a Python >= 3.11"
    command -v "$LONGLIVE_PYTHON"
    exit
fi
if ! is_done; then
    exec 9>>"${BASH_SOURCE[0]}" # the lock; opened for append because some file systems lock only what can be written
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        say "waiting for another set-up to finish"
        flock 9
    fi
    if ! is_done; then install; fi
fi
echo "$python"
