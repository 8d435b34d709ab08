#!/usr/bin/env bash
# Whether patches/ fits: the installed megatron-core's files, and a Megatron-LM checkout where $MEGATRON_LM names one.
#
#   bash scripts/check_patches.sh
#
# Exit status 0 if every patch applies to a copy of the files and what comes out is Python; 1 if one does not.
set -u
cd "$(dirname "$0")/.." || exit 1
patches=$PWD/patches
copies=$(mktemp -d) || exit 1
trap 'rm -rf "$copies"' EXIT
installed=$("${PYTHON:-python}" -c 'import importlib.util; print(importlib.util.find_spec("megatron.core").origin)') || exit 1
installed=${installed%/megatron/core/__init__.py}

check() { # NAME DIRECTORY: apply all patches, in order, to a copy of the files that they change
    local copy=$copies/$1 patch file
    for patch in "$patches"/*.patch; do
        while read -r file; do
            mkdir -p "$copy/$(dirname "$file")"
            [ -e "$copy/$file" ] || cp "$2/$file" "$copy/$file" || return 1
        done < <(sed -n 's|^--- a/||p' "$patch")
        if ! (cd "$copy" && GIT_CEILING_DIRECTORIES=$copies git apply --check "$patch" && git apply "$patch"); then
            echo "$1: ${patch##*/} does not apply" >&2
            return 1
        fi
        echo "$1: ${patch##*/} applies"
    done
    "${PYTHON:-python}" -m compileall -q "$copy"
}

check "installed megatron-core" "$installed" || exit 1
if [ -n "${MEGATRON_LM:-}" ]; then
    check "checkout" "$MEGATRON_LM" || exit 1
else
    echo "checkout: not looked at, \$MEGATRON_LM is not set"
fi
