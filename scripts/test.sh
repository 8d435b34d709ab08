#!/usr/bin/env bash
# Set-up, then every check of the project, cheapest first; stops at the first stage that fails.
# Arguments go to pytest: `bash scripts/test.sh tests/search -k greedy`, `bash scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null # nothing here may wait for an answer
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"

stage() {
    local name="$1" start="$SECONDS" status=0
    shift
    printf '== %s\n' "$name"
    "$@" || status=$?
    if ((status != 0)); then
        printf '== %s: FAILED with status %d after %d s\n' "$name" "$status" "$((SECONDS - start))"
        exit "$status"
    fi
    printf '== %s: ok, %d s\n' "$name" "$((SECONDS - start))"
}

stage "set-up" bash scripts/setup.sh
stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy
stage "import contracts" lint-imports --no-logo
stage "pytest" pytest -n 2 "$@"
printf '== all stages ok, %d s\n' "$SECONDS"
