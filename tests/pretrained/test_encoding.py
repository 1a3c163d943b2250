"""encode_images: the written set, its statistics, and errors by argument name."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import latents
from mdt_jax.errors import SettingError
from mdt_jax.pretrained import encoding
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.training import loop
from mdt_jax.training.metric_lines import read_lines
from tests import reference
from tests.training.tiny import tiny_dit_config

VAE = str(reference.FIXTURES / "vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for name in ("ant_1.png", "bee_1.png"):
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
  return str(folder)


def encode(images, output, **changes):
  settings = {"vae": VAE, "image_size": 16, "batch_size": 8, **changes}
  return encoding.encode_images(images, output, **settings)


def test_set_whose_card_has_no_counts_is_verified(images, tmp_path):
  encode(images, tmp_path)
  card = json.loads((tmp_path / latents.CARD).read_text())
  del card["images"], card["shards"][0]["left_out"]
  (tmp_path / latents.CARD).write_text(json.dumps(card))
  assert encoding.verify(tmp_path) == 2
  assert latents.read_card(tmp_path)["shards"][0]["left_out"] == []


def test_set_holds_moments_of_images_and_mirror_images(images, tmp_path):
  assert encode(images, tmp_path)
  source = latents.open_set(tmp_path)
  autoencoder = Autoencoder.load(VAE)
  for index, name in enumerate(("ant_1.png", "bee_1.png")):
    pixels = np.array(Image.open(f"{images}/{name}"))
    views = np.stack([pixels, pixels[:, ::-1]])
    expected = np.asarray(autoencoder.moments(views))
    np.testing.assert_allclose(source[index]["views"], expected, rtol=2e-3, atol=2e-3)


def test_card_holds_the_statistics_of_the_autoencoder(images, tmp_path):
  shutil.copytree(VAE, tmp_path / "vae")
  config = json.loads((tmp_path / "vae" / "config.json").read_text())
  statistics = {
    "latents_mean": [0.5, 0.0, -1.0, 2.0],
    "latents_std": [1.0, 2.0, 0.5, 3.0],
  }
  (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **statistics}))
  encode(images, tmp_path / "scaled", vae=str(tmp_path / "vae"))
  encode(images, tmp_path / "plain")
  scaled, plain = (latents.read_card(tmp_path / name) for name in ("scaled", "plain"))
  assert {name: scaled[name] for name in statistics} == statistics
  assert not statistics.keys() & plain.keys()
  Autoencoder.load(str(tmp_path / "vae")).check_scale("vae", scaled)
  with pytest.raises(SettingError, match="latents_mean"):
    Autoencoder.load(VAE).check_scale("vae", scaled)


def test_statistics_file_holds_mean_and_deviation(images, tmp_path):
  encode(images, tmp_path)
  found = encoding.write_statistics(tmp_path)
  written = json.loads((tmp_path / encoding.STATISTICS).read_text())
  assert written == {"mean": found.mean.tolist(), "deviation": found.std.tolist()}


@pytest.mark.parametrize(
  ("settings", "argument"),
  [
    ({"batch_size": 0}, "batch_size"),
    ({"num_shards": 0}, "num_shards"),
    ({"dtype": "float8"}, "dtype"),
    ({"vae": "./nowhere"}, "vae"),
    ({"process_index": 1}, "process_count"),
    ({"process_count": 1}, "process_index"),
    ({"process_index": 2, "process_count": 2}, "process_index"),
  ],
)
def test_error_names_the_invalid_argument(images, tmp_path, settings, argument):
  with pytest.raises(SettingError) as caught:
    encode(images, tmp_path / "out", **settings)
  assert caught.value.setting == argument
  assert not (tmp_path / "out").exists()


def test_missing_image_folder_is_an_error_of_source(tmp_path):
  with pytest.raises(SettingError) as caught:
    encode(str(tmp_path / "gone"), tmp_path)
  assert caught.value.setting == "source"


def test_folder_without_a_set_is_an_error_of_output(tmp_path):
  with pytest.raises(SettingError) as caught:
    encoding.verify(tmp_path)
  assert caught.value.setting == "output"


# Arrays and captions.


def embed(image, name):
  """Mean colours and the length of the name, (4,)."""
  assert image.shape == (16, 16, 3) and image.dtype == np.uint8
  return np.append(image.mean((0, 1)), len(name)).astype(np.float32)


def expected_embedding(images, name):
  return embed(np.array(Image.open(f"{images}/{name}")), name)


@pytest.fixture(scope="module")
def conditioned(images, tmp_path_factory):
  """A set with an array from a file, one from a function, and captions."""
  folder = tmp_path_factory.mktemp("conditioned")
  np.savez(folder / "clip.npz", ant_1=np.arange(5.0), bee_1=np.arange(5.0) - 1)
  (folder / "captions.tsv").write_text("ant_1\tan ant\n")
  encode(
    images,
    folder / "set",
    condition={"clip": folder / "clip.npz", "colours": embed},
    captions=folder / "captions.tsv",
  )
  return folder / "set"


def test_set_holds_arrays_of_a_file_and_of_a_function(images, conditioned):
  source = latents.open_set(conditioned)
  for index, name in enumerate(("ant_1.png", "bee_1.png")):
    np.testing.assert_array_equal(source[index]["clip"], np.arange(5.0) - index)
    expected = expected_embedding(images, name)
    np.testing.assert_array_equal(source[index]["colours"], expected)
  assert [source.caption(0), source.caption(1)] == ["an ant", None]
  assert encoding.verify(conditioned) == 2


def test_finished_set_with_arrays_is_not_encoded_again(images, conditioned):
  before = {path: path.stat().st_mtime_ns for path in conditioned.iterdir()}
  folder = conditioned.parent
  arrays = {"clip": folder / "clip.npz", "colours": embed}
  captions = folder / "captions.tsv"
  assert encode(images, conditioned, condition=arrays, captions=captions)
  assert before == {path: path.stat().st_mtime_ns for path in conditioned.iterdir()}


def test_network_trains_on_a_vector_of_the_set(conditioned, tmp_path):
  config = tiny_dit_config(
    **{
      "num_steps": 2,
      "batch_size": 2,
      "log_every": 1,
      "data.source": "latents",
      "data.path": str(conditioned),
      "data.flip": True,
      "model.input_size": 2,
      "model.in_channels": 4,
      "model.num_classes": 2,
      "model.condition": "vector",
      "condition.vector": "clip",
      "condition.vector_size": 5,
    }
  )
  loop.train(config, tmp_path)
  losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
  assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize(
  ("settings", "argument"),
  [
    ({"condition": {"clip": "no.npz"}}, "condition"),
    ({"condition": {"label": embed}}, "condition"),
    ({"condition": {"clip": embed}, "condition_missing": "skip"}, "condition_missing"),
    ({"condition_missing": "leave_out"}, "condition_missing"),
    ({"captions": "no.txt"}, "captions"),
  ],
)
def test_error_names_the_argument_of_a_condition(images, tmp_path, settings, argument):
  with pytest.raises(SettingError) as caught:
    encode(images, tmp_path / "out", **settings)
  assert caught.value.setting == argument
  assert not (tmp_path / "out").exists()


def test_out_of_device_memory_is_an_error_of_batch_size(images, tmp_path, monkeypatch):
  def moments(self, images):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(Autoencoder, "moments", moments)
  with pytest.raises(SettingError, match=r"^batch_size = 8: needs more memory"):
    encode(images, tmp_path)
