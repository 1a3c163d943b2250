"""SamplingJob: the settings of a call, its blocks and its description."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest

import mdt_jax
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.experiment import build
from tests import reference
from tests.training.tiny import tiny_config

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)
MASK = np.eye(8, dtype=bool)


@pytest.fixture(scope="module")
def pipeline():
  experiment = build(tiny_config())
  return mdt_jax.Pipeline(experiment, reference.random_params(experiment.model), 7)


def test_job_settings_do_not_change_the_pipeline(pipeline):
  job = pipeline.job([1], num_steps=2)
  assert job.experiment.settings.sampling.num_steps == 2
  assert pipeline.experiment.settings.sampling.num_steps == 3


def test_jobs_share_the_network_and_process_of_the_pipeline(pipeline):
  job = pipeline.job([1], num_steps=2)
  assert job.experiment.model is pipeline.experiment.model
  assert job.experiment.process is pipeline.experiment.process


def test_no_blocks_generate_no_images(pipeline):
  assert list(pipeline.job([7]).generate_blocks([])) == []


# If the description changes, unfinished images of earlier versions cannot be resumed.
def test_description_matches_earlier_versions(pipeline):
  described = pipeline.job([1, 2], seed=5, batch_size=1).describe()
  digests = [described.pop(name) for name in ("parameters", "labels")]
  assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
  assert described == {
    "step": 7,
    "images": 2,
    "seed": 5,
    "batch_size": 1,
    "vae": None,
    "sampling.method": "ddpm",
    "sampling.num_steps": 3,
    "sampling.spacing": None,
    "sampling.eta": 0.0,
    "sampling.cfg_scale": 3.8,
    "sampling.cfg_power": 4.0,
    "sampling.cfg_channels": 3,
    "sampling.cfg_interval": [0.0, 1.0],
    "sampling.clip_denoised": False,
    "sampling.ema_decay": None,
    "task": {
      "kind": "draw",
      "interpolation": 0.0,
      "repeats": 1,
      "num_keep": 0,
      "strength": 1.0,
    },
  }


def test_description_holds_the_ema_decay(pipeline, tmp_path):
  save_model(tmp_path, pipeline.experiment.settings, pipeline.params)
  loaded = mdt_jax.Pipeline.from_checkpoint(tmp_path)
  assert loaded.job([1]).describe()["sampling.ema_decay"] == 0.9


@pytest.mark.parametrize(
  "changes",
  [
    dict(labels=[2]),
    dict(seed=1),
    dict(num_steps=2),
    dict(inpaint=IMAGE + 1),
    dict(mask=~MASK),
    dict(repeats=2),
  ],
)
def test_different_jobs_have_different_descriptions(pipeline, changes):
  arguments = dict(labels=[1], inpaint=IMAGE, mask=MASK)
  job, other = (pipeline.job(**(arguments | more)) for more in ({}, changes))
  assert job.describe() != other.describe()
  assert job.describe() == pipeline.job(**arguments).describe()


@pytest.mark.parametrize("changes", [{"weights": 1.0}, {"scale": 2.0}])
def test_description_holds_a_digest_of_the_autoencoder(pipeline, changes):
  def digest(weights=0.0, scale=1.0):
    autoencoder = SimpleNamespace(
      params={"w": np.full(3, weights)}, scales=lambda: {"scaling_factor": scale}
    )
    job = dataclasses.replace(pipeline.job([1]), autoencoder=autoencoder)
    return job.describe()["autoencoder"]

  assert digest() == digest()
  assert digest() != digest(**changes)
