#!/usr/bin/env bash
# Sets up if needed, then lints, checks types and runs the tests; needs no GPU and, once set up, no network.
#
#   bash scripts/test.sh [pytest arguments]      paths are relative to the repository root
#
# Every check runs even if an earlier one failed; the exit status is non-zero if any did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(bash scripts/setup.sh)"
export OMP_NUM_THREADS=1 # one thread in each of two test processes: the tensors are too small to share out
failed=()

check() {
    echo "== $1" >&2
    "$python" -m "${@:2}" || failed+=("$1")
}
check "lint" ruff check
check "format" ruff format --check
check "types" mypy
check "tests" pytest -n 2 -m "not gpu and not browser" "$@"

if ((${#failed[@]})); then
    echo "error: failed: ${failed[*]}" >&2
    exit 1
fi
