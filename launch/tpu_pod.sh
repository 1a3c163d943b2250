#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from the request for the slice to the logs; see
# docs/launch.md.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_pod.sh STEP [FLAGS] [-- COMMAND...]

steps
  create   request the slice (a queued resource); returns at once
  wait     wait until the slice is ready
  install  copy the committed files to all workers and install the package
  run      start COMMAND on all workers and show its log; if COMMAND is already running,
           only show its log
  logs     download the logs of all workers
  stop     make the run save and end; the slice remains, and is billed
  delete   delete the slice
  all      create, wait, install, run, logs and delete; requests a new slice after a
           preemption

flags
  --name=NAME        name of the slice and its queued resource (default: mdt-jax)
  --type=TYPE        v4-N, v5p-N (N cores, 2 per chip), v5e-N, v6e-N (N chips)
  --zone=ZONE        a zone that offers this type
  --project=PROJECT  Google Cloud project (default: the project that gcloud uses)
  --spot             cheaper, but Google can preempt the slice at any time
  --runtime=VERSION  software version of the workers (default: depends on the type)
  --bucket=BUCKET    Cloud Storage bucket, mounted at /mnt/bucket on all workers
  --restarts=N       for `all`: restarts after failures other than preemption and exit
                     code 2, bad settings (default: 3)
  --output=DIR       folder of the logs (default: runs/NAME)
  --dry-run          print the commands without running them
EOF
}

refuse() {
  echo "error: $*" >&2
  exit 2
}

main() {
  parse "$@"
  tpus=(gcloud compute tpus)
  place=("--zone=$zone")
  if [ -n "$project" ]; then place+=("--project=$project"); fi
  output="${output:-runs/$name}"
  if ! $dry_run && ! command -v gcloud >/dev/null; then
    refuse "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
  fi
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  "step_$step"
}

# Reads the arguments into the variables step, command and those of the flags.
parse() {
  step="${1:-}"
  case "$step" in
    create | wait | install | run | logs | stop | delete | all) shift ;;
    -h | --help | help) usage && exit 0 ;;
    *) refuse "'$step' is not a step: create, wait, install, run, logs, stop, delete or all" ;;
  esac
  name=mdt-jax type="" zone="" project="" runtime="" bucket="" output=""
  restarts=3 spot=false dry_run=false command=() flags=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --name=?*) name="${1#*=}" ;;
      --type=?*) type="${1#*=}" ;;
      --zone=?*) zone="${1#*=}" ;;
      --project=?*) project="${1#*=}" ;;
      --runtime=?*) runtime="${1#*=}" ;;
      --bucket=?*) bucket="${1#*=}" && bucket="${bucket#gs://}" ;;
      --output=?*) output="${1#*=}" ;;
      --restarts=?*) restarts="${1#*=}" ;;
      --spot) spot=true ;;
      --dry-run) dry_run=true ;;
      --) shift && command=("$@") && break ;;
      *) refuse "'$1' is unknown or has no value; launch/tpu_pod.sh --help lists the flags" ;;
    esac
    flags+=("$1")
    shift
  done

  [[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    refuse "--name = '$name': must be lower case letters, digits and hyphens"
  [[ "$restarts" =~ ^[0-9]+$ ]] || refuse "--restarts = '$restarts': must be a number"
  [ -n "$zone" ] || refuse "--zone is missing: name a zone that offers this type of TPU"
  case "$step" in create | all) choose_type ;; esac
  case "$step" in
    run | all) [ ${#command[@]} -gt 0 ] || refuse "no command: give the command after --" ;;
    *) [ ${#command[@]} -eq 0 ] || refuse "'${command[0]}': $step takes no command" ;;
  esac
}

# Sets type to Cloud TPU's name, and runtime to the software version of the generation
# (https://cloud.google.com/tpu/docs/runtimes).
choose_type() {
  local generation="${type%%-*}" size="${type#*-}" image
  [[ "$size" =~ ^[1-9][0-9]*$ ]] || generation=""
  case "$generation" in
    v4) image=tpu-ubuntu2204-base ;;
    v5p) image=v2-alpha-tpuv5 ;;
    v5e | v5litepod) image=v2-alpha-tpuv5-lite type="v5litepod-$size" ;;
    v6e) image=v2-alpha-tpuv6e ;;
    *) refuse "--type = '$type': accepted are v4-N, v5e-N, v5p-N, v6e-N" ;;
  esac
  runtime="${runtime:-$image}"
}

step_create() {
  local kind=()
  if $spot; then kind=(--spot); fi
  call "${tpus[@]}" queued-resources create "$name" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$runtime" "${place[@]}" \
    ${kind[@]+"${kind[@]}"}
}

step_wait() {
  local state="" last=""
  if $dry_run; then
    show "${describe[@]}" "$name" "${place[@]}" && echo "# repeated until the state is ACTIVE"
    return
  fi
  while true; do
    state="$(slice_state)"
    if [ "$state" != "$last" ]; then echo "$name: $state"; fi
    last="$state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: $name is $state; delete it with: launch/tpu_pod.sh delete" >&2
        return 1
        ;;
    esac
    sleep 30
  done
}

describe=(gcloud compute tpus queued-resources describe "--format=value(state.state)")
slice_state() { "${describe[@]}" "$name" "${place[@]}"; }

step_install() {
  local archive="$output/mdt_jax.tar.gz"
  call mkdir -p "$output"
  call git archive --format=tar.gz "--output=$archive" HEAD
  if ! $dry_run && ! git diff --quiet HEAD; then
    echo "note: uncommitted changes are not copied to the workers" >&2
  fi
  call "${tpus[@]}" tpu-vm scp "$archive" "$name:mdt_jax.tar.gz" --worker=all \
    "${place[@]}" --quiet
  on_worker all "mkdir -p mdt_jax && tar -xzf mdt_jax.tar.gz -C mdt_jax"
  on_worker all "$(quote bash mdt_jax/launch/tpu_worker.sh install "$bucket")"
}

step_run() {
  on_worker all "$(quote bash mdt_jax/launch/tpu_worker.sh start "${command[@]}")"
  on_worker 0 "bash mdt_jax/launch/tpu_worker.sh follow"
}

step_logs() {
  local count=1 i
  local counting=("${tpus[@]}" tpu-vm describe "$name"
    "--format=value(networkEndpoints.len())" "${place[@]}")
  if $dry_run; then show "${counting[@]}"; else count="$("${counting[@]}")"; fi
  call mkdir -p "$output"
  for ((i = 0; i < count; i++)); do
    call "${tpus[@]}" tpu-vm scp "$name:mdt_jax_run/log" "$output/worker_$i.log" \
      "--worker=$i" "${place[@]}" --quiet
  done
  if $dry_run; then echo "# repeated for each other worker"; fi
}

step_stop() { on_worker all "bash mdt_jax/launch/tpu_worker.sh stop"; }

step_delete() {
  call "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Each step runs in its own process, because bash ignores `set -e` to the left of `||`.
step_all() {
  local code failures=0
  trap 'interrupted' INT TERM
  while true; do
    code=0
    one create && one wait && one install || code=$?
    while [ "$code" -eq 0 ]; do
      one run || code=$?
      # Exit code 2 means a bad setting: a restart would fail again.
      if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then break 2; fi
      sleep 30 # the state shows a preemption only after some time
      case "$(slice_state)" in
        SUSPENDING | SUSPENDED)
          echo "note: $name was preempted; requesting it again" >&2
          one delete
          continue 2
          ;;
      esac
      failures=$((failures + 1))
      if [ "$failures" -gt "$restarts" ]; then break 2; fi
      echo "note: exit code $code; restart $failures of $restarts" >&2
      code=0
    done
    break
  done
  one logs || echo "note: the logs could not be downloaded" >&2
  one delete
  return "$code"
}

one() {
  local arguments=("$1" ${flags[@]+"${flags[@]}"})
  case "$1" in run) arguments+=(-- "${command[@]}") ;; esac
  bash launch/tpu_pod.sh "${arguments[@]}"
}

interrupted() {
  echo "error: interrupted; the slice $name may still exist and be billed: \`run\` shows" \
    "the log of the run, \`stop\` ends the run, \`delete\` deletes the slice" >&2
  exit 130
}

on_worker() {
  call "${tpus[@]}" tpu-vm ssh "$name" "--worker=$1" "${place[@]}" --quiet \
    "--command=$2"
}

call() { if $dry_run; then show "$@"; else "$@"; fi; }

show() { quote "$@" && echo; }

# Prints the arguments, quoted for a shell.
quote() {
  local word separator=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then
      word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
    fi
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

main "$@"
