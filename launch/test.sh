#!/usr/bin/env bash
# Installs the test extra and runs every test; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/common.sh"

install test
"$VENV/bin/python" -m pytest -n auto --maxprocesses=4 --dist loadfile \
  --no-loadscope-reorder --durations=40 --durations-min=5 "$@"
