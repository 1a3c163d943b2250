# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with the package in it.
#   PYTHON  the interpreter to make it with (python3)
#   VENV    its folder (.venv)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV="${VENV:-.venv}"

# install [EXTRA]: makes the environment where it is missing, and installs into it.
install() {
  if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
}
