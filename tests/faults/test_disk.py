"""A full disk: training continues, logs the failed saves, and saves again later."""

from __future__ import annotations

import contextlib
import subprocess

import numpy as np
import pytest

from tests.cli.commands import run as run_command
from tests.faults import runs


@pytest.fixture
def disk(tmp_path):
  """A file system of 16 MB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
  try:
    mounted = subprocess.run(mount, capture_output=True)
  except FileNotFoundError:
    mounted = None
  if mounted is None or mounted.returncode:
    pytest.skip("takes the right to mount a file system")
  yield folder
  subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path):
  with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
    while True:
      file.write(bytes(4096))


def test_run_survives_a_full_disk(disk, tmp_path):
  expected = tmp_path / "expected"
  runs.finish(expected)
  workdir = disk / "run"
  run = runs.Run(workdir, "--config.num_steps=4000", logs=tmp_path)
  run.wait_for("^step 12/")
  fill(disk / "filler")
  failed = int(run.wait_for(r"THE CHECKPOINT OF STEP (\d+) IS NOT SAVED")[1])
  run.wait_for(f"^step {failed + 20}/")
  whole = runs.steps_saved(workdir)
  assert whole and whole[-1] < failed  # Earlier checkpoints are kept.
  run.kill()

  # The checkpoints on the disk are still valid, though the disk was full.
  (disk / "filler").unlink()
  again = runs.finish(workdir, logs=tmp_path)
  start = again.steps()[0]
  assert start - 1 in whole
  runs.assert_same(runs.read(workdir, 30), runs.read(expected, 30))


def test_saves_succeed_again_when_the_disk_has_room(disk, tmp_path):
  workdir = disk / "run"
  run = runs.Run(workdir, "--config.num_steps=100000", logs=tmp_path)
  run.wait_for("^step 20/")
  fill(disk / "filler")
  failed = int(run.wait_for(r"THE CHECKPOINT OF STEP (\d+) IS NOT SAVED")[1])
  (disk / "filler").unlink()
  seen = set(runs.steps_saved(workdir))
  while not any(step > failed for step in seen):
    assert run.is_alive(), run.log.read_text()
    seen |= set(runs.steps_saved(workdir))
  run.kill()


@pytest.fixture
def trained(tmp_path):
  workdir = tmp_path / "trained"
  runs.finish(workdir, "--config.num_steps=5")
  return workdir


def assert_one_line(result, text):
  """Checks for exit code 1 and one line beside the progress bar."""
  code, _, err = result
  assert code == 1 and "Traceback" not in err, err
  assert err.splitlines()[-1].startswith("error: ") and text in err.splitlines()[-1]


def test_sampling_onto_a_full_disk_ends_in_one_line_and_resumes(disk, trained):
  flags = [f"--checkpoint={trained}", f"--output={disk / 'out'}", "--num_images=64"]
  command = ("mdt_jax.sample", *flags, "--batch_size=32", "--num_steps=2")
  fill(disk / "filler")
  # Room for the settings, and not for a block.
  with (disk / "filler").open("r+b") as file:
    file.truncate((disk / "filler").stat().st_size - 3 * 4096)
  assert_one_line(run_command(*command), "No space left on device")
  (disk / "filler").unlink()
  code, _, err = run_command(*command)
  assert code == 0, err
  with np.load(disk / "out" / "samples.npz") as file:
    assert file["arr_0"].shape == (64, 8, 8, 1)


def test_scores_for_a_full_disk_end_in_one_line(disk, trained):
  fill(disk / "filler")
  flags = [f"--checkpoint={trained}", "--metrics=bpd", f"--output={disk}"]
  flags += ["--num_steps=2", "--num_images=4"]
  assert_one_line(run_command("mdt_jax.evaluate", *flags), "No space left on device")
