"""Weights that a new run starts from, in a bucket."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath

from mdt_jax.checkpoints.loading import save_model
from mdt_jax.checkpoints.weights import open_weights
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.models.registry import create_model
from mdt_jax.pretrained.tensors import flatten, read_tensors, write_tensors
from mdt_jax.pretrained.torch_mdt import from_torch
from mdt_jax.setting_groups import InitSettings
from tests import reference
from tests.training.tiny import tiny_dit_config


def open_at(path, **settings):
  target = create_model(**from_torch(reference.FIXTURES / "mdt_v2.pt")[0])
  return open_weights(InitSettings(path=str(path), **settings), target)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_of_a_bucket_is_opened(bucket, suffix, tmp_path, caplog):
  tensors = read_tensors(reference.FIXTURES / "mdt_v2.pt")
  path = tmp_path / f"model{suffix}"
  write_tensors(path, tensors)
  epath.Path(f"{bucket}/{path.name}").write_bytes(path.read_bytes())
  with caplog.at_level("INFO", logger="mdt_jax"):
    opened = open_at(f"{bucket}/{path.name}")
  assert f"{bucket}/{path.name}: 0.00 GB" in caplog.text
  expected = open_at(path)
  assert (opened.model, opened.checksum) == (expected.model, expected.checksum)
  _, params = from_torch(path)
  for name, value in flatten(params).items():  # the copy has no name any more
    np.testing.assert_array_equal(opened.read(name), value, strict=True)


def test_workdir_in_a_bucket_is_opened(bucket):
  experiment = build(tiny_dit_config())
  params = reference.random_params(experiment.model)
  save_model(f"{bucket}/run", experiment.settings, params, step=7)
  opened = open_at(f"{bucket}/run")
  assert (opened.model, opened.step) == (experiment.model, 7)
  for name, value in flatten(params).items():
    np.testing.assert_array_equal(opened.read(name), value)
  with pytest.raises(SettingError, match=r"^config.init.checksum = "):
    open_at(f"{bucket}/run", checksum="00000000")


@pytest.mark.parametrize("name", ["missing.pt", "text.pt", "photos", "x.npz"])
def test_object_without_weights_is_refused(bucket, name):
  for other in ("text.pt", "photos/a.png", "x.npz"):
    epath.Path(f"{bucket}/{other}").write_bytes(b"no weights")
  with pytest.raises(SettingError) as error:
    open_at(f"{bucket}/{name}")
  assert error.value.setting == "config.init.path"
  assert error.value.value == f"{bucket}/{name}"


def test_settings_of_a_workdir_are_refused_for_a_file_of_a_bucket(bucket):
  write_tensors(f"{bucket}/x.safetensors", {"a": np.zeros(1, np.float32)})
  with pytest.raises(SettingError, match=r"^config.init.step = 3: is for workdirs"):
    open_at(f"{bucket}/x.safetensors", step=3)


def test_autoencoder_of_a_bucket_is_refused(bucket):
  experiment = build(tiny_dit_config(**{"data.source": "latents"}))
  with pytest.raises(SettingError, match=r"^config.data.vae = .*local") as error:
    experiment.with_vae(f"{bucket}/vae").load_autoencoder()
  assert error.value.value == f"{bucket}/vae"
