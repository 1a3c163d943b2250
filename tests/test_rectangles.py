"""A data set of images wider than high, from the commands to the samples."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mdt_jax import Pipeline
from mdt_jax.checkpoints.converted import to_torch_file
from mdt_jax.chips import parse_topology
from mdt_jax.config import default_config
from mdt_jax.data import latents
from mdt_jax.errors import SettingError
from mdt_jax.planning.plan import make_plan
from mdt_jax.settings import Settings
from mdt_jax.training import loop
from tests.cli.commands import assert_refused, run
from tests.training.tiny import tiny_dit_config

VAE = Path(__file__).parent / "fixtures" / "vae"
HEIGHT, WIDTH = 6, 10  # pixels of the network's input: 3 x 5 tokens
COUNT = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A folder with grey images of two classes: wide, high and square ones."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(COUNT):
    size = [(14, 9), (9, 14), (10, 10)][i % 3]
    path = folder / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path)
  return folder


def command(images, workdir, *flags):
  """The command that trains a tiny MDTv2, whose steps have a masked pass.

  AdamW compiles faster than Adan.
  """
  changes = {
    "num_steps": 2,
    "batch_size": 8,
    "model.input_size": f"{HEIGHT},{WIDTH}",
    "model.num_classes": 2,
    "model.hidden_size": 16,
    "optimizer.name": "adamw",
    "model.depth": 4,
    "model.num_heads": 2,
    "model.unroll": 1,
    "optimizer.warmup_steps": 0,
    "masking.num_lengths": 1,
    "data.source": "images",
    "data.path": images,
    "sampling.num_steps": 3,
    "checkpoint_every": 2,
    "sample_every": 2,
    "num_samples": 4,
  }
  settings = [f"--config.{name}={value}" for name, value in changes.items()]
  start = ["mdt_jax.main", "--config=digits", f"--workdir={workdir}"]
  return [*start, *settings, *flags]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  code, out, err = run(*command(images, workdir))
  assert code == 0, err
  assert "step 2/2" in out
  return workdir


def test_config_of_a_run_holds_height_and_width(trained):
  config = json.loads((trained / "config.json").read_text())
  assert config["model"]["input_size"] == [HEIGHT, WIDTH]


def test_run_draws_pictures_of_its_size(trained):
  with Image.open(trained / "samples" / "step_0000002.png") as picture:
    assert picture.width > picture.height


def test_run_resumes_and_replays(images, trained):
  flags = ["--config.num_steps=3", "--config.sample_every=0"]
  code, out, err = run(*command(images, trained, *flags))
  assert code == 0, err
  assert "resuming from the checkpoint at step 2" in out
  code, _, err = run(*command(images, trained, *flags, "--replay_step=2"))
  assert code == 0, err


def test_resumed_run_of_another_size_is_refused(images, trained):
  for other in ("10,6", "10"):
    result = run(*command(images, trained, f"--config.model.input_size={other}"))
    assert_refused(result, str(trained), "config.model.input_size was (6, 10), now ")


def test_samples_have_height_and_width(trained, tmp_path):
  code, _, err = run(
    "mdt_jax.sample",
    f"--checkpoint={trained}",
    f"--output={tmp_path}",
    "--num_images=3",
    "--labels=0,1",
  )
  assert code == 0, err
  with np.load(tmp_path / "samples.npz") as data:
    assert data["arr_0"].shape == (3, HEIGHT, WIDTH, 1)


def test_inpainting_keeps_visible_pixels(trained, tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
  mask = np.zeros((HEIGHT, WIDTH), np.uint8)
  mask[:, 4:] = 255
  Image.fromarray(image).save(tmp_path / "image.png")
  Image.fromarray(mask).save(tmp_path / "mask.png")
  given = [f"--inpaint={tmp_path / 'image.png'}", f"--mask={tmp_path / 'mask.png'}"]
  sample = ["mdt_jax.sample", f"--checkpoint={trained}", f"--output={tmp_path}"]
  code, _, err = run(*sample, *given, "--labels=0,1")
  assert code == 0, err
  with np.load(tmp_path / "samples.npz") as data:
    painted = data["arr_0"][..., 0]
  assert (painted[:, :, :4] == image[:, :4]).all()
  assert (painted[:, :, 4:] != image[:, 4:]).any()

  Image.fromarray(mask.T).save(tmp_path / "mask.png")
  assert_refused(
    run(*sample, *given, "--labels=0"), "--mask = '10x6'", "size of the image, 6x10"
  )


def test_edit_and_bits_per_dimension_work(trained, tmp_path):
  pipeline = Pipeline.from_checkpoint(trained)
  assert pipeline.image_shape == (HEIGHT, WIDTH, 1)
  image = np.zeros((HEIGHT, WIDTH), np.uint8)
  edited = pipeline.draw([0, 1], edit=image, num_steps=3)
  assert edited.shape == (2, HEIGHT, WIDTH, 1)
  code, out, err = run(
    "mdt_jax.evaluate",
    f"--checkpoint={trained}",
    "--metrics=bpd,frechet",
    "--num_images=4",
    "--batch_size=4",
    f"--output={tmp_path / 'out'}",
  )
  assert code == 0, err
  assert "bpd" in out and "frechet" in out


def test_released_code_cannot_hold_the_network(trained, tmp_path):
  with pytest.raises(SettingError) as error:
    to_torch_file(trained, tmp_path / "x.pt")
  assert str(error.value).startswith("config.model.input_size = (6, 10): must be a sq")
  assert not (tmp_path / "x.pt").exists()


def test_plan_counts_the_tokens_of_height_and_width():
  flops = []
  for size in ((HEIGHT, WIDTH), (WIDTH, HEIGHT)):
    config = tiny_dit_config(**{"model.input_size": size})
    topology, devices = parse_topology("cpu:1"), jax.devices()[:1]
    flops.append(make_plan(Settings.from_config(config), topology, devices).flops)
  assert flops[0] == flops[1] > 0


# Latents.


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
  """Images of 24 x 40 pixels, and the set of their latents of 3 x 5."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for i in range(8):
    path = folder / "images" / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    small.resize((50, 30), Image.Resampling.BICUBIC).save(path)
  code, out, err = encode(folder, "--image_size=24,40")
  assert code == 0, err
  assert "8 images" in out
  return folder


def encode(folder, *flags):
  return run(
    "mdt_jax.encode",
    f"--source={folder / 'images'}",
    f"--vae={VAE}",
    f"--output={folder / 'latents'}",
    "--batch_size=8",
    *flags,
  )


def latent_config(folder, source, **changes):
  return tiny_dit_config(
    **{
      "num_steps": 2,
      "model.input_size": (3, 5),
      "model.patch_size": 1,
      "model.in_channels": 4,
      "model.num_classes": 2,
      "data.source": source,
      "data.path": str(folder / source),
      "data.vae": str(VAE),
      "data.flip": True,
      **changes,
    }
  )


def test_set_of_latents_has_height_and_width(encoded):
  card = json.loads((encoded / "latents" / latents.CARD).read_text())
  assert (card["image_size"], card["latent_shape"]) == ([24, 40], [3, 5, 4])
  assert latents.verify(encoded / "latents") == 8


def test_same_encoding_command_has_nothing_to_do(encoded):
  code, out, err = encode(encoded, "--image_size=24,40")
  assert code == 0, err
  assert "nothing to do" in out
  assert_refused(encode(encoded, "--image_size=40,24"), "image_size = [24, 40], not")


def test_network_on_latents_trains_and_draws_decoded_images(encoded, tmp_path):
  trained = loop.train(latent_config(encoded, "latents"), tmp_path / "latents")
  visits = loop.train(latent_config(encoded, "images"), tmp_path / "images")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained.ema, visits.ema
  )
  pipeline = Pipeline.from_checkpoint(tmp_path / "latents")
  assert pipeline.draw([0, 1], num_steps=2).shape == (2, 24, 40, 3)
  mask = np.zeros((24, 40), bool)
  mask[:, 16:] = True
  image = np.zeros((24, 40, 3), np.uint8)
  painted = pipeline.draw([0], inpaint=image, mask=mask, num_steps=2)
  assert painted.shape == (1, 24, 40, 3)


def test_latents_of_the_transposed_size_are_refused(encoded, tmp_path):
  config = latent_config(encoded, "latents", **{"model.input_size": (5, 3)})
  with pytest.raises(SettingError, match=r"\(3, 5, 4\).* require \(5, 3, 4\)"):
    loop.train(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("flag", "texts"),
  [
    ("24,42", ["--image_size = (24, 42): must be divisible by 8"]),
    ("24,40,3", ["--image_size = '24,40,3': must be a whole number, or HEIGHT,WIDTH"]),
    ("24x40", ["--image_size = '24x40': must be a whole number, or HEIGHT,WIDTH"]),
    ("0,40", ["--image_size = (0, 40): must lie in [1, 16,384]"]),
    ("", ["--image_size = '': must be a whole number, or HEIGHT,WIDTH"]),
  ],
)
def test_bad_image_size_is_refused_in_one_line(encoded, flag, texts):
  assert_refused(encode(encoded, f"--image_size={flag}"), *texts)


def test_square_given_as_two_numbers_resumes_a_run_of_one_number(tmp_path, caplog):
  loop.train(tiny_dit_config(num_steps=2), tmp_path)
  config = tiny_dit_config(num_steps=4, **{"model.input_size": (8, 8)})
  with caplog.at_level("INFO", "mdt_jax"):
    loop.train(config, tmp_path)
  assert "resuming from the checkpoint at step 2" in caplog.text
  assert "config.model.input_size" not in caplog.text
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["model"]["input_size"] == 8


def test_default_network_of_a_rectangle_is_built_from_settings():
  config = default_config()
  config.model.input_size = (32, 48)
  assert Settings.from_config(config).model.input_size == (32, 48)
