"""The shell scripts, run with fake gcloud, git, srun and scontrol programs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.fakes import Fakes

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "launch").glob("*.s[hb]*"))]
COMMAND = [
  "python",
  "-m",
  "mdt_jax.main",
  "--config=configs/digits.py",
  "--workdir=a b",
]

SAVES_ON_SIGTERM = (
  "trap 'sleep 0.5; echo saved; exit 75' TERM; echo ready;"
  " for _ in {1..300}; do sleep 0.1; done"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_passes(script):
  beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
  shellcheck = shutil.which("shellcheck", path=beside)
  assert shellcheck, "comes with the test extra"
  result = subprocess.run([shellcheck, script], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path)


# tpu_pod.sh.

POD = ROOT / "launch" / "tpu_pod.sh"
PLACE = "--zone=us-west4-a --project=mine"


def test_dry_run_prints_all_commands_and_runs_none(fakes):
  for name in ("gcloud", "git"):
    fakes.add(name)
  flags = ["--name=big", "--type=v5e-256", *PLACE.split(), "--spot", "--dry-run"]
  code, out, err = fakes.run(
    POD, "all", *flags, "--bucket=gs://mine", "--output=out", "--", *COMMAND
  )
  assert code == 0, err
  assert fakes.calls() == []
  ssh = f"gcloud compute tpus tpu-vm ssh big --worker={{}} {PLACE} --quiet".format
  scp = "gcloud compute tpus tpu-vm scp {} --worker={} " + PLACE + " --quiet"
  worker = "bash mdt_jax/launch/tpu_worker.sh"
  expected = [
    "gcloud compute tpus queued-resources create big --node-id=big"
    " --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite"
    f" {PLACE} --spot",
    "gcloud compute tpus queued-resources describe --format=value(state.state) big "
    + PLACE,
    "mkdir -p out",
    "git archive --format=tar.gz --output=out/mdt_jax.tar.gz HEAD",
    scp.format("out/mdt_jax.tar.gz big:mdt_jax.tar.gz", "all"),
    f"{ssh('all')} --command=mkdir -p mdt_jax && tar -xzf mdt_jax.tar.gz -C mdt_jax",
    f"{ssh('all')} --command={worker} install mine",
    f"{ssh('all')} --command={worker} start {shlex.join(COMMAND)}",
    f"{ssh(0)} --command={worker} follow",
    "gcloud compute tpus tpu-vm describe big --format=value(networkEndpoints.len()) "
    + PLACE,
    "mkdir -p out",
    scp.format("big:mdt_jax_run/log out/worker_0.log", 0),
    f"gcloud compute tpus queued-resources delete big {PLACE} --force --quiet",
  ]
  printed = [line for line in out.splitlines() if not line.startswith("#")]
  assert [" ".join(shlex.split(line)) for line in printed] == expected


@pytest.mark.parametrize(
  ("kind", "accelerator", "image"),
  [
    ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
    ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
    ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
    ("v6e-256", "v6e-256", "v2-alpha-tpuv6e"),
  ],
)
def test_runtime_image_matches_the_tpu_generation(fakes, kind, accelerator, image):
  flags = [f"--type={kind}", "--zone=z", "--dry-run"]
  code, out, err = fakes.run(POD, "create", *flags)
  assert code == 0, err
  assert f"--accelerator-type={accelerator} --runtime-version={image} " in out
  assert "--spot" not in out
  _, out, _ = fakes.run(POD, "create", *flags, "--runtime=other")
  assert "--runtime-version=other " in out


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ("", "'' is not a step: create, wait"),
    ("launch --zone=z", "'launch' is not a step"),
    ("create --type=v5e-8", "--zone is missing"),
    ("create --zone=z --type=v9-8", "--type = 'v9-8': accepted are v4-N"),
    ("create --zone=z --type=v5e", "--type = 'v5e'"),
    ("create --zone=z", "--type = ''"),
    ("create --zone= --type=v5e-8", "'--zone='"),
    ("wait --zone=z --name=Big_One", "--name = 'Big_One'"),
    ("wait --zone=z --spto", "'--spto' is unknown: accepted are --name, --type,"),
    ("wait --zone=z --node-count=2", "'--node-count=2' is unknown"),
    ("wait --zone=z python", "'python' is unknown"),
    ("wait --zone=z --network", "'--network' has no value: write --network=VALUE"),
    ("wait --zone=z --spot=yes", "'--spot=yes': --spot has no value"),
    ("create --zone=z --type=v5e-8 --spot --reserved", "--spot and --reserved"),
    ("wait --zone=z --internal-ip --tunnel-through-iap", "--internal-ip and --tunnel"),
    ("wait --zone=z --extras=gcs,", "--extras = 'gcs,'"),
    ("wait --zone=z -- true", "'true': wait takes no command"),
    ("run --zone=z", "no command"),
    ("all --zone=z --type=v5e-8 --restarts=many -- true", "--restarts = 'many'"),
  ],
)
def test_invalid_flags_give_one_line_and_exit_code_2(fakes, arguments, text):
  fakes.add("gcloud")
  code, out, err = fakes.run(POD, *arguments.split())
  assert code == 2
  assert out == ""
  (line,) = err.splitlines()
  assert line.startswith("error: ")
  assert text in line
  assert fakes.calls() == []


def run_all(fakes, codes, states, *flags):
  """Runs `all`. `follow` returns the codes and `describe` the states, one per call."""
  (fakes.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
  (fakes.folder / "states").write_text("".join(f"{state}\n" for state in states))
  take = "head -n 1 {0}; sed -i 1d {0}".format
  fakes.add(
    "gcloud",
    'case "$*" in\n'
    f"  *queued-resources\\ describe*) {take('states')} ;;\n"
    "  *networkEndpoints.len*) echo 2 ;;\n"
    f'  *follow) exit "$({take("codes")})" ;;\n'
    "esac\n",
  )
  fakes.add("git")
  fakes.add("sleep")
  flags = ["--type=v6e-8", "--zone=z", f"--output={fakes.folder}/out", *flags]
  code, _, err = fakes.run(POD, "all", *flags, "--", "python", "train.py")
  left = (fakes.folder / "codes").read_text() + (fakes.folder / "states").read_text()
  assert left == "", err
  return code, [
    next(word for word in STEPS if word in call)
    for call in fakes.calls()
    if any(word in call for word in STEPS)
  ]


STEPS = (
  "queued-resources create",
  "worker.sh install",
  "worker.sh start",
  "worker.sh follow",
  "worker_0.log",
  "worker_1.log",
  "queued-resources delete",
)
BEGIN, RUN, END = list(STEPS[:2]), list(STEPS[2:4]), list(STEPS[4:])


def test_all_waits_for_the_slice_and_deletes_it(fakes):
  states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  assert run_all(fakes, [0], states) == (0, BEGIN + RUN + END)


def test_exit_code_2_is_not_retried(fakes):
  assert run_all(fakes, [2], ["ACTIVE"]) == (2, BEGIN + RUN + END)


def test_failed_run_is_restarted_on_the_same_slice(fakes):
  states = ["ACTIVE", "ACTIVE", "ACTIVE"]
  assert run_all(fakes, [1, 75, 0], states) == (0, BEGIN + 3 * RUN + END)


def test_slice_is_deleted_after_the_last_restart(fakes):
  result = run_all(fakes, [7, 7], ["ACTIVE", "ACTIVE", "ACTIVE"], "--restarts=1")
  assert result == (7, BEGIN + 2 * RUN + END)


def test_preempted_slice_is_created_again(fakes):
  states = ["ACTIVE", "SUSPENDED", "ACTIVE"]
  steps = BEGIN + RUN + [STEPS[-1]] + BEGIN + RUN + END
  assert run_all(fakes, [255, 0], states, "--restarts=0") == (0, steps)


def test_failed_slice_request_is_deleted(fakes):
  assert run_all(fakes, [], ["FAILED"]) == (1, [STEPS[0], *END])


# tpu_worker.sh.


@pytest.fixture
def worker(fakes):
  launch = fakes.folder / "launch"
  launch.mkdir()
  script = launch / "tpu_worker.sh"
  shutil.copy(ROOT / "launch" / "tpu_worker.sh", script)
  return lambda *step: fakes.run(
    "bash", script, *step, RUN=str(fakes.folder / "run"), HOME=str(fakes.folder)
  )


def wait_for(file, text):
  deadline = time.monotonic() + 30
  while not (file.exists() and text in file.read_text()):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_follow_prints_the_output_and_returns_the_exit_code(worker):
  code, _, err = worker("start", "bash", "-c", 'echo "$0"; sleep 1; exit 75', "a b")
  assert code == 0, err
  code, out, err = worker("start", "true")
  assert "already running" in out
  assert worker("follow")[:2] == (75, "a b\n")
  worker("start", "true")
  assert worker("follow")[0] == 0


def test_stopped_run_saves_and_follow_returns_zero(worker, fakes):
  worker("start", "bash", "-c", SAVES_ON_SIGTERM)
  wait_for(fakes.folder / "run" / "log", "ready")
  code, _, err = worker("stop")
  assert code == 0, err
  code, out, _ = worker("follow")
  assert code == 0
  assert "saved" in out
  assert worker("stop")[0] == 0


def test_follow_without_a_run_is_an_error(worker):
  code, _, err = worker("follow")
  assert code == 1
  assert "no command was started" in err


def test_profile_sends_sigusr1_to_the_run(worker, fakes):
  code, _, err = worker("profile")
  assert code == 1
  assert "no command is running" in err
  trace = (
    "trap 'echo traced; exit' USR1; echo ready; for _ in {1..300}; do sleep 0.1; done"
  )
  worker("start", "bash", "-c", trace)
  wait_for(fakes.folder / "run" / "log", "ready")
  assert worker("profile")[0] == 0
  code, out, _ = worker("follow")
  assert code == 0
  assert "traced" in out


@pytest.mark.parametrize(
  ("arguments", "extras"), [([], "tpu"), (["", "gcs,wandb"], "tpu,gcs,wandb")]
)
def test_install_adds_the_extras(worker, fakes, arguments, extras):
  shutil.copy(ROOT / "launch" / "common.sh", fakes.folder / "launch")
  fakes.add("python3")
  for program in (".local/bin/uv", ".venv/bin/python"):
    fakes.add(program.split("/")[-1])
    (fakes.folder / program).parent.mkdir(parents=True)
    (fakes.folder / "bin" / program.split("/")[-1]).rename(fakes.folder / program)
  code, _, err = worker("install", *arguments)
  assert code == 0, err
  assert fakes.calls()[-1].endswith(f"--editable .[{extras}]")


# slurm.sbatch.

SBATCH = ROOT / "launch" / "slurm.sbatch"


def start_job(fakes, body, **environment):
  fakes.add("scontrol")
  fakes.add(
    "srun",
    'while [[ "$1" == --* ]]; do shift; done\n'
    f'echo "devices ${{JAX_LOCAL_DEVICE_IDS-unset}}" >>{fakes.folder}/calls\n'
    'exec "$@"\n',
  )
  job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}
  return fakes.start("bash", SBATCH, "bash", "-c", body, **(job | environment))


def finish(process):
  out, err = process.communicate(timeout=60)
  return process.returncode, out + err


def requeued(fakes):
  return "scontrol requeue 7" in fakes.calls()


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True)])
def test_job_is_requeued_except_after_exit_code_0_or_2(fakes, code, again):
  assert finish(start_job(fakes, f"exit {code}"))[0] == code
  assert requeued(fakes) == again


def test_job_is_requeued_at_most_restarts_times(fakes):
  job = start_job(fakes, "exit 1", SLURM_RESTART_COUNT="3", RESTARTS="3")
  assert finish(job)[0] == 1
  assert not requeued(fakes)


def test_sigterm_reaches_the_run_and_its_exit_code_is_kept(fakes):
  job = start_job(fakes, SAVES_ON_SIGTERM)
  assert job.stdout.readline() == "ready\n"
  job.send_signal(signal.SIGTERM)
  code, out = finish(job)
  assert code == 75
  assert "saved" in out
  assert requeued(fakes)


@pytest.mark.parametrize(
  ("tasks", "devices"), [("8", "unset"), ("1", "0,1,2,3,4,5,6,7")]
)
def test_single_task_on_a_node_uses_all_gpus(fakes, tasks, devices):
  assert finish(start_job(fakes, "true", SLURM_NTASKS_PER_NODE=tasks))[0] == 0
  assert f"devices {devices}" in fakes.calls()


def test_job_without_a_command_is_refused(fakes):
  code, out = finish(fakes.start("bash", SBATCH))
  assert code == 2
  assert out.startswith("error: no command")
