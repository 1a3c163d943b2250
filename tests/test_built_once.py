"""Each command builds its network, process and optimizer once."""

from __future__ import annotations

import collections

import jax
import pytest

from mdt_jax import builders, optimizers
from mdt_jax.checkpoints import converted
from mdt_jax.chips import parse_topology
from mdt_jax.diffusion import PROCESSES
from mdt_jax.evaluation import bits_per_dimension, job
from mdt_jax.planning.plan import make_plan
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.settings import Settings
from mdt_jax.training.loop import train
from mdt_jax.training.replay import replay
from tests.training.tiny import tiny_dit_config

CHANGES = {"sample_every": 2, "eval.every": 2, "eval.metrics": "frechet"}
RUN = {"num_steps": 2, "eval.num_images": 8, "eval.batch_size": 8, **CHANGES}
ALL = {"model": 1, "process": 1, "optimizer": 1}


@pytest.fixture
def counts(monkeypatch):
  """Counts how often a network, a process and an optimizer are built."""
  found: collections.Counter[str] = collections.Counter()

  def counted(name, function):
    def wrapper(*args, **kwargs):
      found[name] += 1
      return function(*args, **kwargs)

    return wrapper

  create_model = counted("model", builders.create_model)
  monkeypatch.setattr(builders, "create_model", create_model)
  for name, function in PROCESSES.items():
    monkeypatch.setitem(PROCESSES, name, counted("process", function))
  for name, function in optimizers.OPTIMIZERS.items():
    monkeypatch.setitem(optimizers.OPTIMIZERS, name, counted("optimizer", function))
  return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  train(tiny_dit_config(**RUN), folder)
  return folder


def test_training_with_pictures_and_scores_builds_each_part_once(tmp_path, counts):
  train(tiny_dit_config(**RUN), tmp_path)
  assert counts == ALL


def test_resumed_training_builds_each_part_once(workdir, counts):
  train(tiny_dit_config(**{**RUN, "num_steps": 3}), workdir)
  assert counts == ALL


def test_replay_builds_each_part_once(workdir, counts):
  replay(tiny_dit_config(**RUN), workdir, 1)
  assert counts == ALL


def test_sampling_builds_network_and_process_once(workdir, tmp_path, counts):
  pipeline = Pipeline.from_checkpoint(workdir)
  pipeline.write(tmp_path, [0, 1], num_steps=2, progress=False)
  pipeline.draw([2], method="ddim", num_steps=2)
  assert counts == {"model": 1, "process": 1}


def test_evaluation_builds_network_and_process_once(workdir, counts):
  checkpoint = job.load_run(workdir, sampling={"num_steps": 2})
  job.score_images(["frechet"], checkpoint, num_images=8, batch_size=8)
  bits_per_dimension.measure(checkpoint, 4, num_steps=2, batch_size=4)
  assert counts == {"model": 1, "process": 1}


@pytest.mark.parametrize("what", ["train", "sample"])
def test_planning_builds_each_part_once(counts, what):
  settings = Settings.from_config(tiny_dit_config(**RUN))
  make_plan(settings, parse_topology("cpu:1"), jax.devices()[:1], what)
  assert counts == ALL


def test_conversion_to_torch_builds_network_and_process_once(workdir, tmp_path, counts):
  converted.to_torch_file(workdir, tmp_path / "model.safetensors")
  assert counts == {"model": 1, "process": 1}
