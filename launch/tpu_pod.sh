#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from the request for the slice to the logs; see
# docs/launch.md.
set -euo pipefail

# Flags of this script. A flag that ends in = has a value.
OWN=(--name= --type= --zone= --runtime= --bucket= --extras= --restarts= --output= --dry-run)
# Flags of gcloud that are passed on. The others are set by this script, or do not suit it:
# docs/launch.md says how to train on several slices, for which --node-count is.
ALL_COMMANDS=(--project= --account= --billing-project= --configuration=
  --impersonate-service-account= --verbosity=)
CREATE=(--spot --reserved --guaranteed --reservation-host-project=
  --reservation-host-folder= --reservation-host-organization= --service-account= --scopes=
  --network= --subnetwork= --internal-ips --range= --tags= --labels= --description=
  --metadata= --metadata-from-file= --data-disk= --shielded-secure-boot
  --valid-after-duration= --valid-after-time= --valid-until-duration= --valid-until-time=)
CONNECT=(--internal-ip --tunnel-through-iap --ssh-key-file= --ssh-key-expire-after=
  --ssh-key-expiration= --strict-host-key-checking= --force-key-file-overwrite --plain)
SSH=(--ssh-flag=)
SCP=(--scp-flag=)

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
  profile  trace the next five steps of the run, on worker 0
  stop     make the run save and end; the slice remains, and is billed
  delete   delete the slice
  all      create, wait, install, run, logs and delete; requests a new slice after a
           preemption

flags
  --name=NAME        name of the slice and its queued resource (default: mdt-jax)
  --type=TYPE        v4-N, v5p-N (N cores, 2 per chip), v5e-N, v6e-N (N chips)
  --zone=ZONE        a zone that offers this type
  --runtime=VERSION  software version of the workers (default: depends on the type)
  --bucket=BUCKET    Cloud Storage bucket, mounted at /mnt/bucket on all workers
  --extras=LIST      optional dependencies to install besides tpu, such as gcs,wandb
  --restarts=N       for `all`: restarts after failures other than preemption and exit
                     code 2, bad settings (default: 3)
  --output=DIR       folder of the logs (default: runs/NAME)
  --dry-run          print the commands without running them

flags of gcloud, with the meaning of `gcloud COMMAND --help`; every step accepts all of
them and passes each one to the commands that it is for
EOF
  local list
  for list in "all commands:${ALL_COMMANDS[*]}" "create:${CREATE[*]}" \
    "ssh and scp:${CONNECT[*]}" "ssh:${SSH[*]}" "scp:${SCP[*]}"; do
    echo "  ${list%%:*}"
    list_flags "${list#*:}" | fold -s -w 84 | sed 's/^/    /; s/ *$//'
    echo
  done
  cat <<'EOF'

--spot is cheaper, but Google can preempt the slice at any time. --internal-ips requests
workers without external addresses; ssh and scp then get --internal-ip, which works inside
the network of the slice, unless --tunnel-through-iap is given. Relative paths start at
the folder of the repository.
EOF
}

refuse() {
  echo "error: $*" >&2
  exit 2
}

main() {
  parse "$@"
  tpus=(gcloud compute tpus)
  workers=("${tpus[@]}" tpu-vm)
  # Only the alpha commands have this flag.
  if has --tunnel-through-iap; then workers=(gcloud alpha compute tpus tpu-vm); fi
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
    create | wait | install | run | logs | profile | stop | delete | all) shift ;;
    -h | --help | help) usage && exit 0 ;;
    *)
      refuse "'$step' is not a step: create, wait, install, run, logs, profile, stop," \
        "delete or all"
      ;;
  esac
  name=mdt-jax type="" zone="" runtime="" bucket="" extras="" output=""
  restarts=3 dry_run=false command=() flags=()
  place=() create=() connect=() ssh=() scp=()
  while [ $# -gt 0 ]; do
    if [ "$1" = -- ]; then shift && command=("$@") && break; fi
    check_flag "$1"
    case "$1" in
      --name=*) name="${1#*=}" ;;
      --type=*) type="${1#*=}" ;;
      --zone=*) zone="${1#*=}" ;;
      --runtime=*) runtime="${1#*=}" ;;
      --bucket=*) bucket="${1#*=}" && bucket="${bucket#gs://}" ;;
      --extras=*) extras="${1#*=}" ;;
      --output=*) output="${1#*=}" ;;
      --restarts=*) restarts="${1#*=}" ;;
      --dry-run) dry_run=true ;;
    esac
    if among "$1" "${ALL_COMMANDS[@]}"; then place+=("$1"); fi
    if among "$1" "${CREATE[@]}"; then create+=("$1"); fi
    if among "$1" "${CONNECT[@]}"; then connect+=("$1"); fi
    if among "$1" "${SSH[@]}"; then ssh+=("$1"); fi
    if among "$1" "${SCP[@]}"; then scp+=("$1"); fi
    flags+=("$1")
    shift
  done
  place=("--zone=$zone" ${place[@]+"${place[@]}"})
  exclude --spot --reserved
  exclude --spot --guaranteed
  exclude --internal-ip --tunnel-through-iap
  # Workers without external addresses are reached by their internal ones.
  if has --internal-ips && ! has --internal-ip && ! has --tunnel-through-iap; then
    connect+=(--internal-ip)
  fi

  [[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    refuse "--name = '$name': must be lower case letters, digits and hyphens"
  [[ "$extras" =~ ^([a-z]+(,[a-z]+)*)?$ ]] ||
    refuse "--extras = '$extras': must be names separated by commas, such as gcs,wandb"
  [[ "$restarts" =~ ^[0-9]+$ ]] || refuse "--restarts = '$restarts': must be a number"
  [ -n "$zone" ] || refuse "--zone is missing: name a zone that offers this type of TPU"
  case "$step" in create | all) choose_type ;; esac
  case "$step" in
    run | all) [ ${#command[@]} -gt 0 ] || refuse "no command: give the command after --" ;;
    *) [ ${#command[@]} -eq 0 ] || refuse "'${command[0]}': $step takes no command" ;;
  esac
}

# Refuses an unknown flag, a flag without its value, and a value of a flag that has none.
check_flag() {
  local flag="${1%%=*}"
  local all=("${OWN[@]}" "${ALL_COMMANDS[@]}" "${CREATE[@]}" "${CONNECT[@]}" "${SSH[@]}"
    "${SCP[@]}")
  if among "$1" "${all[@]}"; then return; fi
  if among "$flag=x" "${all[@]}"; then refuse "'$1' has no value: write $flag=VALUE"; fi
  if among "$flag" "${all[@]}"; then refuse "'$1': $flag has no value, write $flag"; fi
  refuse "'$1' is unknown: accepted are $(list_flags "${all[*]}"), and -- before the command"
}

# among ARGUMENT FLAGS...: whether the argument, --flag or --flag=value, is among the flags.
among() {
  local flag argument="$1"
  shift
  case "$argument" in *=?*) argument="${argument%%=*}=" ;; *=) return 1 ;; esac
  for flag in "$@"; do
    if [ "$flag" = "$argument" ]; then return; fi
  done
  return 1
}

# Whether a flag without a value was given.
has() {
  local flag
  for flag in ${flags[@]+"${flags[@]}"}; do
    if [ "$flag" = "$1" ]; then return; fi
  done
  return 1
}

exclude() {
  if has "$1" && has "$2"; then refuse "$1 and $2 exclude each other: give one of them"; fi
}

# Prints flags with commas between them.
list_flags() {
  local list="${1// /, }"
  printf %s "${list//=/}"
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
  local code=0
  call "${tpus[@]}" queued-resources create "$name" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$runtime" "${place[@]}" \
    ${create[@]+"${create[@]}"} || code=$?
  if [ "$code" -ne 0 ]; then
    echo "error: the request failed with gcloud's exit code $code and the message above;" \
      "\"What Google answers\" in docs/launch.md explains the messages" >&2
    return "$code"
  fi
}

step_wait() {
  local state="" last=""
  if $dry_run; then
    show "${describe[@]}" "$name" "${place[@]}" && echo "# repeated until the state is ACTIVE"
    return
  fi
  while true; do
    state="$(slice_state)"
    if [ "$state" != "$last" ]; then
      echo "$name: $state"
      if [ "$state" = WAITING_FOR_RESOURCES ]; then
        echo "note: the request waits until Google has free capacity; waiting is free" >&2
      fi
    fi
    last="$state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        # Contains Google's reason.
        "${tpus[@]}" queued-resources describe "--format=yaml(state)" "$name" \
          "${place[@]}" >&2 || true
        echo "error: $name is $state, see above; delete it with: launch/tpu_pod.sh delete" >&2
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
  copy "$archive" "$name:mdt_jax.tar.gz" all
  on_worker all "mkdir -p mdt_jax && tar -xzf mdt_jax.tar.gz -C mdt_jax"
  on_worker all "$(quote bash mdt_jax/launch/tpu_worker.sh install "$bucket" \
    ${extras:+"$extras"})"
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
    copy "$name:mdt_jax_run/log" "$output/worker_$i.log" "$i"
  done
  if $dry_run; then echo "# repeated for each other worker"; fi
}

step_profile() { on_worker 0 "bash mdt_jax/launch/tpu_worker.sh profile"; }

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
    one create || code=$?
    if [ "$code" -ne 0 ]; then
      # The name may belong to another run's slice, so `all` does not delete it.
      echo "note: nothing was deleted; \`gcloud compute tpus queued-resources list" \
        "--zone=$zone\` shows your requests" >&2
      return "$code"
    fi
    one wait && one install || code=$?
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
  if ! one delete; then
    echo "error: $name was not deleted, and may be billed" >&2
    if [ "$code" -eq 0 ]; then code=1; fi
  fi
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

# on_worker WORKER COMMAND
on_worker() {
  call "${workers[@]}" ssh "$name" "--worker=$1" "${place[@]}" \
    ${connect[@]+"${connect[@]}"} ${ssh[@]+"${ssh[@]}"} --quiet "--command=$2"
}

# copy SOURCE DESTINATION WORKER
copy() {
  call "${workers[@]}" scp "$1" "$2" "--worker=$3" "${place[@]}" \
    ${connect[@]+"${connect[@]}"} ${scp[@]+"${scp[@]}"} --quiet
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
