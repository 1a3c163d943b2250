#!/usr/bin/env bash
# Runs the tests of the demo (mdt_jax.demo) that need gradio and a browser; arguments go
# to pytest. gradio requires older versions of packages that the other tests use, so it
# is installed into a virtual environment of its own, on top of that of launch/test.sh.
# Without a Chromium, the script tries to install Debian's; where that is impossible, the
# tests in the browser are skipped, with a line that says so.
# DEMO_VENV: folder of this virtual environment (default: .venv_demo)
set -euo pipefail
source "$(dirname "$0")/common.sh"
DEMO_VENV="${DEMO_VENV:-.venv_demo}"

has_browser() {
  command -v chromium || command -v chromium-browser || command -v google-chrome
}

install test
python="$DEMO_VENV/bin/python"
if [ ! -x "$python" ]; then
  base="$("$VENV/bin/python" -c 'import sys; print(sys._base_executable)')"
  "$base" -m venv "$DEMO_VENV"
fi
# The packages of the first environment are found after those of the second one.
folder="import sysconfig; print(sysconfig.get_path('purelib'))"
"$VENV/bin/python" -c "$folder" > "$("$python" -c "$folder")/tests_of_mdt_jax.pth"
if ! "$python" -m pip install --quiet --disable-pip-version-check \
  --editable '.[demo]' playwright; then
  echo "gradio cannot be installed here: the tests of the running demo are skipped"
  exit 0
fi
if ! has_browser > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  echo "installing Chromium"
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
    > /dev/null 2>&1 || echo "Chromium cannot be installed here"
fi
has_browser > /dev/null || echo "no Chromium: the tests in the browser are skipped"
PYTHONPATH=. "$python" -m pytest -rs tests/demo/test_sessions.py tests/demo/test_browser.py "$@"
