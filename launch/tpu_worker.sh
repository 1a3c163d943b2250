#!/usr/bin/env bash
# On each worker of a TPU slice, where launch/tpu_pod.sh calls it:
#   install [BUCKET]  Python and the package; BUCKET, if any, is mounted at /mnt/bucket
#   start COMMAND...  starts COMMAND so that it outlives the connection, unless one runs
#   follow            prints its log to the end; exits with its code, 0 if it was stopped
#   stop              sends SIGTERM and waits until it has saved and ended
# RUN: folder of the run's log, process id and exit code (~/mdt_jax_run)
set -euo pipefail
RUN="${RUN:-$HOME/mdt_jax_run}"
STOP_SECONDS="${STOP_SECONDS:-600}"

step_install() {
  # The image's Python is 3.10 on some generations; the package needs 3.11.
  python3 -m pip install --quiet --user uv
  local uv="$HOME/.local/bin/uv"
  "$uv" python install --quiet 3.12
  PYTHON="$("$uv" python find 3.12)"
  export PYTHON
  source "$(dirname "$0")/common.sh"
  install tpu
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
  # A checkpoint is written under another name and renamed: a folder of many files.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" /mnt/bucket
}

step_start() {
  mkdir -p "$RUN"
  if running; then
    echo "runs already: process $(cat "$RUN/pid")"
    return
  fi
  rm -f "$RUN"/{pid,code,stopped}
  cd "$(dirname "$0")/.."
  PATH="$PWD/.venv/bin:$PATH" \
    setsid nohup bash launch/tpu_worker.sh supervise "$@" >>"$RUN/log" 2>&1 </dev/null &
  until [ -f "$RUN/pid" ]; do sleep 0.1; done
  echo "started: process $(cat "$RUN/pid")"
}

# Internal: runs the command and keeps its exit code.
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
    echo "error: nothing was started here" >&2
    return 1
  fi
  tail -n 100 --pid="$(cat "$RUN/pid")" -f "$RUN/log"
  for _ in {1..50}; do
    if [ -f "$RUN/code" ]; then break; fi
    sleep 0.1
  done
  if [ -f "$RUN/stopped" ]; then return; fi
  return "$(cat "$RUN/code" 2>/dev/null || echo 1)" # 1: the worker was restarted
}

step_stop() {
  if ! running; then return; fi
  touch "$RUN/stopped" # before the signal: `follow` asks for it once the run has ended
  kill -TERM "$(cat "$RUN/pid")"
  for ((i = 0; i < STOP_SECONDS * 10; i++)); do
    if ! running; then return; fi
    sleep 0.1
  done
  echo "error: still running after $STOP_SECONDS s" >&2
  return 1
}

running() {
  [ -f "$RUN/pid" ] && [ ! -f "$RUN/code" ] && kill -0 "$(cat "$RUN/pid")" 2>/dev/null
}

write() { echo "$1" >"$RUN/$2.part" && mv "$RUN/$2.part" "$RUN/$2"; }

"step_$1" "${@:2}"
