#!/usr/bin/env bash
# Builds the documentation site into site/. A broken link or a warning fails the build.
# The site loads nothing from elsewhere, so it also works without a network. Its search
# needs a server.
# VENV: folder of its virtual environment (default: .venv-docs), which holds the extra
# `docs` alone: the pages are made from the source, without importing the package.
set -euo pipefail
VENV="${VENV:-.venv-docs}"
source "$(dirname "$0")/common.sh"

if [ ! -x "$VENV/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
fi
requirements="$(
  "$VENV/bin/python" -c 'import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
print(*project["optional-dependencies"]["docs"], sep="\n")'
)"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
  --requirement <(echo "$requirements")
# mkdocs-material announces its successor on every start.
NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -m mkdocs build --strict --quiet
cat <<EOT
site: site/index.html
The search needs a server: $VENV/bin/python -m http.server --bind 127.0.0.1 --directory site
EOT
