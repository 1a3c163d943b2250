"""A folder with everything that the commands read: for tests that damage some of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from mdt_jax.checkpoints.converted import to_torch_file
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.config import write_config
from mdt_jax.experiment import Experiment
from mdt_jax.settings import Settings
from tests import forked, reference
from tests.training.tiny import tiny_dit_config

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIG = """
from tests.training.tiny import tiny_dit_config

def get_config():
  return tiny_dit_config(num_steps=1, checkpoint_every=1)
"""


def make_world(folder: Path) -> None:
  """Writes a run, images, latents, samples, weights and a config file to a folder.

  run/: a network of digits; photos/: four images in two classes; vae/; latents/: the
  photos; vectors.npz and captions.json: for the photos; samples.npz, image.png,
  mask.png, weights.pt, config.py.
  """
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  (folder / "config.py").write_text(CONFIG)
  experiment = Experiment(Settings.from_config(tiny_dit_config()))
  params = reference.random_params(experiment.model)
  save_model(folder / "run", experiment.settings, params)
  write_config(experiment.settings, folder / "run")
  to_torch_file(folder / "run", folder / "weights.pt")
  for name in ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png"):
    (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photos" / name)
  vectors = {f"{name}/{i}": np.ones(5) for name in ("ant", "bee") for i in (1, 2)}
  np.savez(folder / "vectors.npz", **vectors)
  (folder / "captions.json").write_text('{"ant/1": "an ant"}')
  shutil.copytree(FIXTURES / "vae", folder / "vae")
  encode = forked.command(
    "mdt_jax.encode",
    f"--source={folder / 'photos'}",
    f"--vae={folder / 'vae'}",
    f"--output={folder / 'latents'}",
    "--image_size=16",
  )
  assert encode.end() == 0, encode.err
  grey = rng.integers(0, 256, (40, 8, 8, 1), np.uint8)
  np.savez(folder / "samples.npz", grey, np.arange(40) % 10)
  Image.fromarray(grey[0, ..., 0]).save(folder / "image.png")
  mask = np.zeros((8, 8), np.uint8)
  mask[2:6, 2:6] = 255
  Image.fromarray(mask).save(folder / "mask.png")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
  """Size and time of the last change of every file in a folder, and its folders.

  Python's cache of the compiled config file does not count.
  """
  found = {}
  for path in folder.rglob("*"):
    if "__pycache__" not in path.parts:
      stat = path.lstat()
      is_folder = path.is_dir() and not path.is_symlink()
      found[str(path)] = (0, 0) if is_folder else (stat.st_size, stat.st_mtime_ns)
  return found
