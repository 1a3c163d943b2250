#!/usr/bin/env bash
# Executes colab/mdt.ipynb, from its first cell to its last, with the versions of Colab,
# and checks what the notebook shows; arguments go to pytest. The first cell clones the
# files of this folder in place of the address of the project.
#   RUNTIME       tpu (default), or gpu, which has TensorFlow: versions only, the device
#                 is that of this machine
#   COLAB_VENV    folder of the environment (default: .venv_colab_RUNTIME); delete the
#                 folder to install everything again
#   COLAB_PYTHON  interpreter that creates it (default: python3.13, the one of Colab, or
#                 else python3.12, or else that of launch/test.sh)
#   STEPS         training steps (default: 40; the notebook itself has 1500)
set -euo pipefail
source "$(dirname "$0")/common.sh"
RUNTIME="${RUNTIME:-tpu}"
COLAB_VENV="${COLAB_VENV:-.venv_colab_$RUNTIME}"

install test
if [ ! -e "$COLAB_VENV/is_complete" ]; then
  # The shims of pyenv fail for versions that are installed but not selected.
  for candidate in python3.13 ~/.pyenv/versions/3.13.*/bin/python \
    python3.12 ~/.pyenv/versions/3.12.*/bin/python "$VENV/bin/python"; do
    if [ -n "${COLAB_PYTHON:-}" ]; then break; fi
    if "$candidate" -c "" 2> /dev/null; then COLAB_PYTHON="$candidate"; fi
  done
  echo "installing the versions of Colab for $("$COLAB_PYTHON" --version)"
  "$COLAB_PYTHON" -m venv --clear "$COLAB_VENV"
  "$COLAB_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --requirement "colab/versions_$RUNTIME.txt"
  touch "$COLAB_VENV/is_complete"
fi
COLAB_VENV="$(cd "$COLAB_VENV" && pwd)" PYTHONPATH=. \
  "$VENV/bin/python" -m pytest -rs tests/test_notebook_runs.py "$@"
