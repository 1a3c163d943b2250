#!/usr/bin/env bash
# launch/tpu_pod.sh calls this script on each worker of a TPU slice:
#   install [BUCKET [EXTRAS]]
#                     installs Python, and the package with the optional dependencies tpu
#                     and EXTRAS, and mounts BUCKET at /mnt/bucket
#   start COMMAND...  starts COMMAND in the background, unless a command is running
#   follow            prints the log until the command ends; exits with the command's exit
#                     code, or with 0 if `stop` ended the command
#   profile           sends SIGUSR1 to the command, which then traces five steps
#   stop              sends SIGTERM to the command and waits until it has ended
# RUN: folder of the command's log, process id and exit code (default: ~/mdt_jax_run)
# STOP_SECONDS: how long `stop` waits (default: 600)
set -euo pipefail
RUN="${RUN:-$HOME/mdt_jax_run}"
STOP_SECONDS="${STOP_SECONDS:-600}"

step_install() {
  # Some TPU images have Python 3.10, but the package needs 3.11.
  python3 -m pip install --quiet --user uv
  local uv="$HOME/.local/bin/uv"
  "$uv" python install --quiet 3.12
  PYTHON="$("$uv" python find 3.12)"
  export PYTHON
  source "$(dirname "$0")/common.sh"
  install "tpu${2:+,$2}"
  if [ -n "${1:-}" ]; then mount_bucket "$1"; fi
}

mount_bucket() {
  if mountpoint -q /mnt/bucket; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq gcsfuse
  fi
  sudo mkdir -p /mnt/bucket
  sudo chown "$USER" /mnt/bucket
  # Orbax renames the folder of a finished checkpoint, which holds many files.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" /mnt/bucket
}

step_start() {
  mkdir -p "$RUN"
  if running; then
    echo "already running: process $(cat "$RUN/pid")"
    return
  fi
  rm -f "$RUN"/{pid,code,stopped}
  cd "$(dirname "$0")/.."
  PATH="$PWD/.venv/bin:$PATH" \
    setsid nohup bash launch/tpu_worker.sh supervise "$@" >>"$RUN/log" 2>&1 </dev/null &
  until [ -f "$RUN/pid" ]; do sleep 0.1; done
  echo "started: process $(cat "$RUN/pid")"
}

# For `start` only: runs the command and writes its process id and exit code.
step_supervise() {
  local code=0 child
  "$@" &
  child=$!
  write "$child" pid
  wait "$child" || code=$?
  write "$code" code
}

step_follow() {
  if [ ! -f "$RUN/pid" ]; then
    echo "error: no command was started on this worker" >&2
    return 1
  fi
  tail -n 100 --pid="$(cat "$RUN/pid")" -f "$RUN/log"
  for _ in {1..50}; do
    if [ -f "$RUN/code" ]; then break; fi
    sleep 0.1
  done
  if [ -f "$RUN/stopped" ]; then return; fi
  return "$(cat "$RUN/code" 2>/dev/null || echo 1)" # no exit code: the worker restarted
}

step_profile() {
  if ! running; then
    echo "error: no command is running on this worker" >&2
    return 1
  fi
  kill -USR1 "$(cat "$RUN/pid")"
}

step_stop() {
  if ! running; then return; fi
  touch "$RUN/stopped" # before the signal, because `follow` reads it after the run ends
  kill -TERM "$(cat "$RUN/pid")"
  for ((i = 0; i < STOP_SECONDS * 10; i++)); do
    if ! running; then return; fi
    sleep 0.1
  done
  echo "error: the command still runs after $STOP_SECONDS s" >&2
  return 1
}

running() {
  [ -f "$RUN/pid" ] && [ ! -f "$RUN/code" ] && kill -0 "$(cat "$RUN/pid")" 2>/dev/null
}

write() { echo "$1" >"$RUN/$2.part" && mv "$RUN/$2.part" "$RUN/$2"; }

"step_$1" "${@:2}"
