"""Damaged checkpoints are found, named and skipped before training or sampling."""

from __future__ import annotations

import logging
import shutil

import jax
import numpy as np
import pytest

from mdt_jax.checkpoints.loading import load_ema
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.experiment import build
from mdt_jax.training.program import make_program
from tests.faults import run_config, runs

STEPS = (10, 15)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with two checkpoints, its config, and an initial state."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  runs.finish(workdir, "--config.num_steps=15", "--config.checkpoints_to_keep=2")
  assert runs.steps_saved(workdir) == list(STEPS)
  config = run_config.get_config()
  return workdir, config, make_program(build(config)).state


def flip_a_byte(path, random):
  data = bytearray(path.read_bytes())
  data[random.integers(len(data))] ^= 1 << random.integers(8)
  path.write_bytes(data)


def truncate(path, random):
  path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])


DAMAGES = {
  "a byte flipped": flip_a_byte,
  "truncated": truncate,
  "emptied": lambda path, random: path.write_bytes(b""),
  "deleted": lambda path, random: path.unlink(),
}


def restore(workdir, config, like):
  checkpoints = Checkpoints(workdir, 2)
  try:
    return checkpoints.restore(like, build(config))
  finally:
    checkpoints.close()


def values(state):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_damage_to_any_file_skips_the_newest_checkpoint(run, tmp_path, caplog, request):
  workdir, config, like = run
  states = {}
  for step in STEPS:
    shutil.copytree(workdir, tmp_path / str(step))
    for other in STEPS:
      if other > step:
        shutil.rmtree(tmp_path / str(step) / "checkpoints" / str(other))
    states[step] = values(restore(tmp_path / str(step), config, like))
  newest = workdir / "checkpoints" / str(STEPS[-1])
  files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
  assert len(files) > 10
  every = request.config.getoption("--all-faults")
  tried = 0
  for i, file in enumerate(files):
    for j, (name, damage) in enumerate(DAMAGES.items()):
      if not every and i % len(DAMAGES) != j:
        continue
      tried += 1
      copy = tmp_path / f"{i}_{j}"
      shutil.copytree(workdir, copy)
      path = copy / "checkpoints" / str(STEPS[-1]) / file
      was_empty = path.stat().st_size == 0
      if was_empty and name != "deleted":
        continue
      damage(path, np.random.default_rng(i))
      caplog.clear()
      with caplog.at_level(logging.WARNING, "mdt_jax"):
        sampled = load_ema(copy).step
        assert sampled == STEPS[0] or file.parts[0] not in ("ema", "config")
        restored = values(restore(copy, config, like))
      assert f"the checkpoint at step {STEPS[-1]} is moved" in caplog.text, (file, name)
      assert file.name in caplog.text or "checksums" in caplog.text
      for found, expected in zip(restored, states[STEPS[0]], strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=f"{file} {name}")
      shutil.rmtree(copy)
  print(f"{tried} damages to {len(files)} files")


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(run, tmp_path):
  workdir, _, _ = run
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  (file, *_) = (copy / "checkpoints" / "15" / "state" / "d").iterdir()
  flip_a_byte(file, np.random.default_rng(0))
  again = runs.finish(copy, "--config.num_steps=15")
  assert "the checkpoint at step 15 is moved" in again.log.read_text()
  assert again.steps() == [11, 12, 13, 14, 15]
  runs.assert_same(runs.read(copy, 15), runs.read(workdir, 15))


def test_config_of_the_fault_tests_is_valid():
  build(run_config.get_config())
