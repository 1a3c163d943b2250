"""The commands of docs/finetune.md, on small pictures and a small network."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mdt_jax import create_model
from mdt_jax.pretrained.tensors import write_tensors
from mdt_jax.pretrained.torch_mdt import attributes_of, to_torch
from tests import forked, reference

ROOT = Path(__file__).parents[1]
VAE = reference.FIXTURES / "vae"
SIZES = dict(
  input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2
)


@pytest.fixture(scope="module")
def commands():
  """The commands of the page: module -> its flags."""
  page = (ROOT / "docs" / "finetune.md").read_text()
  block = re.search(r"```shell\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
  lines = re.findall(r"^python -m (mdt_jax\.\w+) (.*)$", block, re.MULTILINE)
  return {module: flags.replace("'", "").split() for module, flags in lines}


def run(module, flags, replaced, more=()):
  """Runs a command of the page with other values of some of its flags."""
  flags = dict(flag.split("=", 1) for flag in flags)
  unknown = {f"--{name}" for name in replaced} - flags.keys()
  assert not unknown, unknown  # the page and the test have the same flags
  flags |= {f"--{name}": value for name, value in replaced.items()}
  arguments = [f"{name}={value}" for name, value in flags.items()]
  process = forked.command(module, *arguments, *more)
  assert process.end() == 0, process.err
  return process.out + process.err


def test_commands_of_the_page_train_and_draw(commands, tmp_path):
  assert list(commands) == ["mdt_jax.encode", "mdt_jax.main", "mdt_jax.sample"]
  rng = np.random.default_rng(0)
  pictures = tmp_path / "pictures"
  for name in ("cat", "dog", "fox"):
    (pictures / name).mkdir(parents=True)
    for index in range(4):
      pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
      Image.fromarray(pixels).save(pictures / name / f"{index}.png")
  old = create_model(variant="DiT", num_classes=10, **SIZES)
  weights = tmp_path / "released.pt"
  params = jax.tree.map(np.asarray, reference.random_params(old))
  write_tensors(weights, to_torch(attributes_of(old), params))

  latents, workdir = tmp_path / "latents", tmp_path / "run"
  run(
    "mdt_jax.encode",
    commands["mdt_jax.encode"],
    {"source": pictures, "vae": VAE, "output": latents},
    ["--image_size=32", "--batch_size=4"],
  )
  small = {
    "config.init.path": weights,
    "workdir": workdir,
    "config.data.path": latents,
    "config.num_steps": 2,
    "config.batch_size": 4,
    "config.checkpoint_every": 2,
    "config.sample_every": 0,
    "config.model.remat": "none",
  }
  more = [f"--config.model.{name}={value}" for name, value in SIZES.items()]
  more += ["--config.data.num_threads=0", "--config.sampling.num_steps=2"]
  log = run("mdt_jax.main", commands["mdt_jax.main"], small, more)
  assert re.search(r"label_embed/table +\(11, 16\) -> \(4, 16\) .*null label kept", log)
  assert re.search(r"trained: [\d,]+ of [\d,]+ parameters", log)

  drawn = tmp_path / "drawn"
  run(
    "mdt_jax.sample",
    commands["mdt_jax.sample"],
    {"checkpoint": workdir, "vae": VAE, "num_images": 3, "output": drawn},
    ["--batch_size=3"],
  )
  with np.load(drawn / "samples.npz") as found:
    assert found["arr_0"].shape == (3, 32, 32, 3)
    assert found["arr_1"].tolist() == [0, 1, 2]
