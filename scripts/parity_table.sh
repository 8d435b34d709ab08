#!/usr/bin/env bash
# Runs `mosaic check` on the layouts of docs/parity.md and prints the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1
.venv/bin/python scripts/parity_table.py
