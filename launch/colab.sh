#!/usr/bin/env bash
# Runs colab/mdt.ipynb, from its first cell on, in a new virtual environment with the
# versions of Colab. Leaves out the cells that download weights. Runs the last commit, in
# a clone. Took 17 minutes on two busy cores, 8 minutes of CPU time (2026-11-26).
#   RUNTIME  tpu (default), or gpu, which has TensorFlow: versions only, the device is
#            that of this machine
#   PYTHON   interpreter (default: python3.13, the one of Colab, or else python3)
#   FOLDER   new folder of the environment, the clone and the executed notebook
#            (default: a temporary folder)
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER="${FOLDER:-$(mktemp -d)}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if python3.13 -c "" 2>/dev/null; then PYTHON=python3.13; fi
fi

"$PYTHON" -m venv "$FOLDER/venv"
python="$FOLDER/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
  --requirement "colab/versions_${RUNTIME:-tpu}.txt"
"$python" -m pip freeze > "$FOLDER/before.txt"
git clone --quiet . "$FOLDER/mdt_jax"
"$python" -m nbconvert --to notebook --execute "$FOLDER/mdt_jax/colab/mdt.ipynb" \
  --output-dir "$FOLDER" --ExecutePreprocessor.timeout=-1 \
  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=download
# The notebook installs what is missing and replaces nothing.
"$python" -m pip freeze --exclude-editable > "$FOLDER/after.txt"
if comm -23 <(sort "$FOLDER/before.txt") <(sort "$FOLDER/after.txt") | grep .; then
  echo "the notebook replaced these versions" >&2
  exit 1
fi
"$python" -m nbconvert --to markdown --stdout "$FOLDER/mdt.ipynb" | tail -n 30
echo "executed notebook: $FOLDER/mdt.ipynb"
