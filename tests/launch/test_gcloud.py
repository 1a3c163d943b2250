"""What tpu_pod.sh passes to gcloud, and what it shows of gcloud's answers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.launch.fakes import Fakes

ROOT = Path(__file__).parents[2]
POD = ROOT / "launch" / "tpu_pod.sh"
SLICE = ["--type=v6e-8", "--zone=z"]
TRAIN = ["python", "-m", "mdt_jax.main", "--workdir=gs://bucket/it's a run"]

# Messages in the form in which public bug reports show those of gcloud.
TPU_API = (
  "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Cloud TPU"
  " API has not been used in project mine before or it is disabled."
)
COMPUTE_API = (
  "ERROR: (gcloud.compute.tpus.tpu-vm.scp) PERMISSION_DENIED: Compute Engine API has"
  " not been used in project mine before or it is disabled."
)
QUOTA = (
  "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit"
  " 'TPUV6EPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone z."
)
TAKEN = (
  "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource"
  " 'projects/mine/locations/z/queuedResources/mdt-jax' already exists"
)
REASON = "There is no more capacity in the zone z"


@pytest.fixture
def fakes(tmp_path):
  fakes = Fakes(tmp_path)
  fakes.add("git")
  fakes.add("sleep")
  return fakes


def dry_run(fakes, step, *flags):
  """Returns the commands of the step as lists of words."""
  command = ["--", *TRAIN] if step in ("all", "run") else []
  code, out, err = fakes.run(POD, step, *SLICE, *flags, "--dry-run", *command)
  assert code == 0, err
  assert fakes.calls() == []
  lines = [line for line in out.splitlines() if not line.startswith("#")]
  return [shlex.split(line) for line in lines]


# Flags of gcloud. The lists of commands are those of `gcloud COMMAND --help`.

CREATE, DELETE = "queued-resources create", "queued-resources delete"
DESCRIBE = "queued-resources describe"
SSH, SCP, COUNT = "tpu-vm ssh", "tpu-vm scp", "tpu-vm describe"


@pytest.mark.parametrize(
  ("flag", "commands"),
  [
    ("--reserved", {CREATE}),
    ("--spot", {CREATE}),
    ("--service-account=me@mine.iam.gserviceaccount.com", {CREATE}),
    ("--network=own", {CREATE}),
    ("--subnetwork=own", {CREATE}),
    ("--internal-ips", {CREATE}),
    ("--labels=team=a,run=b", {CREATE}),
    ("--tags=a", {CREATE}),
    ("--metadata=key=a value", {CREATE}),
    ("--valid-until-duration=6h", {CREATE}),
    ("--internal-ip", {SSH, SCP}),
    ("--tunnel-through-iap", {SSH, SCP}),
    ("--ssh-key-file=key", {SSH, SCP}),
    ("--ssh-flag=-v", {SSH}),
    ("--scp-flag=-l 8000", {SCP}),
    ("--project=mine", {CREATE, DESCRIBE, SSH, SCP, COUNT, DELETE}),
    ("--account=me@mine", {CREATE, DESCRIBE, SSH, SCP, COUNT, DELETE}),
  ],
)
def test_flag_is_passed_to_the_commands_that_accept_it(fakes, flag, commands):
  calls = [call for call in dry_run(fakes, "all", flag) if call[0] == "gcloud"]
  name = re.compile(r"(tpu-vm|queued-resources) \w+")
  kinds = [name.search(" ".join(call))[0] for call in calls]
  assert {*kinds} == {CREATE, DESCRIBE, SSH, SCP, COUNT, DELETE}
  with_flag = {kind for kind, call in zip(kinds, calls, strict=True) if flag in call}
  without = {kind for kind, call in zip(kinds, calls, strict=True) if flag not in call}
  assert with_flag == commands
  assert without == {*kinds} - commands


def test_create_with_all_flags(fakes):
  flags = ["--reserved", "--service-account=me", "--network=n", "--internal-ips"]
  (create,) = dry_run(fakes, "create", "--project=mine", *flags)
  assert create == [
    *("gcloud", "compute", "tpus", "queued-resources", "create", "mdt-jax"),
    *("--node-id=mdt-jax", "--accelerator-type=v6e-8"),
    *("--runtime-version=v2-alpha-tpuv6e", "--zone=z", "--project=mine"),
    *flags,
  ]


@pytest.mark.parametrize(
  ("flags", "track", "connection"),
  [
    ([], "gcloud compute tpus tpu-vm ssh", []),
    (["--internal-ips"], "gcloud compute tpus tpu-vm ssh", ["--internal-ip"]),
    (
      ["--internal-ips", "--internal-ip"],
      "gcloud compute tpus tpu-vm ssh",
      ["--internal-ip"],
    ),
    (
      ["--internal-ips", "--tunnel-through-iap"],
      "gcloud alpha compute tpus tpu-vm ssh",
      ["--tunnel-through-iap"],
    ),
  ],
)
def test_workers_without_external_addresses_are_reached(
  fakes, flags, track, connection
):
  (stop,) = dry_run(fakes, "stop", *flags)
  assert stop == [
    *track.split(),
    *("mdt-jax", "--worker=all", "--zone=z", *connection, "--quiet"),
    "--command=bash mdt_jax/launch/tpu_worker.sh stop",
  ]


def test_extras_are_passed_to_the_workers(fakes):
  *_, install = dry_run(fakes, "install", "--extras=gcs,wandb")
  command = "bash mdt_jax/launch/tpu_worker.sh install '' gcs,wandb"
  assert install[-1] == f"--command={command}"


@pytest.mark.parametrize(
  "step", ["create", "install", "run", "logs", "profile", "stop", "delete"]
)
def test_pasted_dry_run_makes_the_calls_of_the_run(fakes, step):
  record = fakes.folder / "words"
  fakes.add("gcloud", f'printf "%q " "$@" >>{record}\necho >>{record}\necho 1')
  flags = [*SLICE, "--labels=a=b c", "--ssh-flag=-o A=b", f"--output={fakes.folder}"]
  command = ["--", *TRAIN] if step == "run" else []
  code, _, err = fakes.run(POD, step, *flags, *command)
  assert code == 0, err
  expected = record.read_text()
  record.unlink()
  _, commands, _ = fakes.run(POD, step, *flags, "--dry-run", *command)
  assert not record.exists()
  code, _, err = fakes.run("bash", "-c", commands)
  assert code == 0, err
  assert record.read_text() == expected


# Answers of gcloud.


def answer(fakes, call, message, code=1):
  """Makes gcloud fail at this call with the message."""
  succeed = 'case "$*" in *"resources describe"*) echo ACTIVE ;; *len*) echo 1 ;; esac'
  body = f"echo {shlex.quote(message)} >&2; exit {code}"
  fakes.add("gcloud", f'case "$*" in *"{call}"*) {body} ;; esac\n{succeed}\n')


def gcloud_calls(fakes, word):
  return [call for call in fakes.calls() if word in call]


@pytest.mark.parametrize("step", ["create", "all"])
@pytest.mark.parametrize("message", [TPU_API, QUOTA, TAKEN])
def test_refused_request_shows_the_message_of_gcloud(fakes, message, step):
  answer(fakes, CREATE, message)
  command = ["--", *TRAIN] if step == "all" else []
  code, _, err = fakes.run(POD, step, *SLICE, *command)
  assert code == 1
  first, second, *_ = err.splitlines()
  assert first == message
  assert second.startswith("error: ")
  assert "docs/launch.md" in second
  # A slice of this name may belong to another run.
  assert len(gcloud_calls(fakes, "gcloud")) == 1


def test_exit_code_of_gcloud_is_returned(fakes):
  answer(fakes, CREATE, "ERROR: unrecognized arguments", 2)
  assert fakes.run(POD, "create", *SLICE)[0] == 2


@pytest.mark.parametrize(
  ("step", "call"),
  [
    ("install", SCP),
    ("stop", SSH),
    ("profile", SSH),
    ("wait", DESCRIBE),
    ("logs", COUNT),
  ],
)
def test_disabled_compute_engine_shows_the_message_of_gcloud(fakes, step, call):
  answer(fakes, call, COMPUTE_API)
  code, _, err = fakes.run(POD, step, *SLICE, f"--output={fakes.folder}")
  assert code == 1
  assert err.splitlines()[-1] == COMPUTE_API


def test_slice_that_cannot_be_reached_is_deleted(fakes):
  answer(fakes, SCP, COMPUTE_API)
  output = f"--output={fakes.folder}"
  code, _, err = fakes.run(POD, "all", *SLICE, output, "--", *TRAIN)
  assert code == 1
  assert COMPUTE_API in err.splitlines()
  assert len(gcloud_calls(fakes, DELETE)) == 1


def test_failed_request_shows_the_reason_of_google(fakes):
  fakes.add("gcloud", f'case "$*" in *yaml*) echo "{REASON}" ;; *) echo FAILED ;; esac')
  code, _, err = fakes.run(POD, "wait", *SLICE)
  assert code == 1
  reason, error = err.splitlines()
  assert reason == REASON
  assert error.startswith("error: mdt-jax is FAILED")


def test_slice_that_is_not_deleted_gives_an_error(fakes):
  answer(fakes, DELETE, "ERROR: no permission")
  output = f"--output={fakes.folder}"
  code, _, err = fakes.run(POD, "all", *SLICE, output, "--", *TRAIN)
  assert code == 1
  assert err.splitlines()[-2:] == [
    "ERROR: no permission",
    "error: mdt-jax was not deleted, and may be billed",
  ]
