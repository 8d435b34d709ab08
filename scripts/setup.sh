#!/usr/bin/env bash
# Makes .venv/ in the repository root and installs the tested set of packages into it.
# Idempotent: when .venv/ already holds what pyproject.toml and constraints.txt ask for, it returns at once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

stamp=.venv/mosaic-setup.stamp # line 1: where the environment was made; line 2: digest of what was asked for
digest="$(cat pyproject.toml constraints.txt | sha256sum | cut -d ' ' -f 1)"
wanted="$root"$'\n'"$digest"
if [[ -x .venv/bin/python && -f $stamp && "$(<"$stamp")" == "$wanted" ]]; then
    exit 0
fi

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup.sh: %s\n' "$*" >&2
    exit 2
}

# True when $1 starts, is an ordinary (not free-threaded) Python >= 3.12 and can make environments.
# Starting it matters: pyenv's shims exist for versions that are not switched on, and then refuse to run.
usable() {
    "$1" -c '
import ensurepip, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 12) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))' >/dev/null 2>&1 </dev/null
}

candidates() {
    printf '%s\n' python3.12 python3.13 python3.14
    local pyenv_root="${PYENV_ROOT:-$HOME/.pyenv}"
    if command -v pyenv >/dev/null; then pyenv_root="$(pyenv root)"; fi
    printf '%s\n' "$pyenv_root"/versions/3.*/bin/python3 | sort -V
    printf '%s\n' python3 python
}

find_python() {
    local candidate
    while read -r candidate; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done < <(candidates)
    return 1
}

# An environment that was moved, or whose Python is gone or too old, is made again; any other is brought up to date.
if [[ -f $stamp && "$(head -n 1 "$stamp")" != "$root" ]] || { [[ -e .venv ]] && ! usable .venv/bin/python; }; then
    say "making .venv again: it was moved, or its Python no longer runs"
    rm -rf .venv
fi
if [[ ! -e .venv ]]; then
    python="$(find_python)" || fail "no Python >= 3.12 with venv was found (tried python3.12, python3.13, python3.14," \
        "pyenv's versions and python3); install one, for example with 'pyenv install 3.12', and run this again."
    say "making .venv with $("$python" --version) ($python)"
    "$python" -m venv .venv || fail "'$python -m venv .venv' failed; its message is above."
fi
rm -f "$stamp"

say "installing the packages pinned in constraints.txt (minutes the first time, seconds later)"
.venv/bin/python -m pip install -qq --no-input --disable-pip-version-check \
    -c constraints.txt -e '.[test]' </dev/null ||
    fail "pip could not install the packages of constraints.txt; its message is above."
printf '%s\n' "$wanted" >"$stamp"
say "done in $SECONDS s; the environment is in .venv"
