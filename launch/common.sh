# shellcheck shell=bash
# Other scripts source this file. It changes to the repository root and defines `install`.
# Environment variables:
#   PYTHON  interpreter that creates the virtual environment (default: python3)
#   VENV    folder of the virtual environment (default: .venv)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV="${VENV:-.venv}"

# install [EXTRA]: creates the virtual environment if it is missing, and installs the
# package and the optional dependencies EXTRA.
install() {
  if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
}
