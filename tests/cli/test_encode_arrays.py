"""mdt_jax.encode with --condition and --captions: the set, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import latents
from tests import reference
from tests.cli.commands import assert_refused, run

VAE = reference.FIXTURES / "vae"
OWN_EMBEDDING = """
import numpy as np

def embed(image, name):
  if name == "bee/2.png":
    raise ValueError("no bee")
  return np.append(image.mean((0, 1)), name == "ant/2.png")
"""
ARRAYS = "--condition=clip=clip.npz,colours=own_embedding:embed"
ENCODE = (f"--vae={VAE}", "--source=photos", "--image_size=16", "--output=set")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Photos, own_embedding.py, clip.npz without ant/1, and captions.txt."""
  folder = tmp_path_factory.mktemp("work")
  rng = np.random.default_rng(0)
  for name in ("ant/1.png", "ant/2.png", "bee/1.png", "bee/2.png"):
    path = folder / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(path)
  (folder / "own_embedding.py").write_text(OWN_EMBEDDING)
  names = ["ant/2", "bee/1", "bee/2"]
  np.savez(folder / "clip.npz", names=names, values=np.eye(3))
  (folder / "captions.txt").write_text("ant/2.png\tan ant\n")
  return folder


def encode(folder, *flags):
  return run("mdt_jax.encode", *ENCODE, *flags, folder=folder)


def test_arrays_and_captions_are_stored_and_images_without_are_left_out(folder):
  flags = ["--captions=captions.txt", "--condition_missing=leave_out"]
  code, out, err = encode(folder, ARRAYS, *flags, "--output=left_out")
  assert code == 0, err
  assert "1 of 4 images have no array: ant/1.png (missing)" in out
  assert "bee/2.png has no array: the function raises ValueError: no bee" in out
  assert "2 images in left_out, 2 left out" in out
  source = latents.open_set(folder / "left_out")
  assert source.array_names == ("clip", "colours")
  assert [source.read(i)[2] for i in range(2)] == ["ant/2.png", "bee/1.png"]
  assert source[1]["clip"].tolist() == [0, 1, 0]
  assert source[0]["colours"][3] == 1
  assert source.caption(0) == "an ant"


@pytest.mark.parametrize(
  ("flags", "texts"),
  [
    (["--condition=no.npz"], ["--condition = 'no.npz': must be NAME=FILE"]),
    (["--condition="], ["--condition = '': must be NAME=FILE"]),
    (["--condition=a=no.npz"], ["--condition = 'a=no.npz': is not a file"]),
    (["--condition=a=no_module:f"], ["--condition = 'a=no_module:f'", "no_module"]),
    (
      ["--condition=a=captions.txt"],
      ["--condition = 'a=captions.txt': must be an .np"],
    ),
    (
      ["--condition=clip=clip.npz"],
      [
        "--condition = 'clip=clip.npz': 1 of 4 images have no array: ant/1.png (miss",
        "--condition_missing=leave_out",
      ],
    ),
    (["--condition=a=clip.npz", "--verify"], ["--condition = ", "with --verify"]),
    (["--captions=captions.txt", "--statistics"], ["--captions = ", "--statistics"]),
    (["--condition_missing=x"], ["--condition_missing=x", "refuse|leave_out"]),
    (["--condition_missing=leave_out"], ["'leave_out': needs --condition"]),
    (["--captions=clip.npz"], ["--captions = 'clip.npz': must be a .json file"]),
  ],
)
def test_bad_flags_are_refused_in_one_line(folder, flags, texts):
  assert_refused(encode(folder, *flags), *texts)
  assert not (folder / "set").exists()


def test_features_get_arrays_from_files_and_none_from_functions(folder):
  np.save(folder / "features.npy", np.ones((3, 4, 2, 2), np.float32))
  np.save(folder / "rows.npy", np.eye(3))
  flags = ["--features=features.npy", "--output=imported"]
  code, _, err = run(
    "mdt_jax.encode", *flags, "--condition=clip=rows.npy", folder=folder
  )
  assert code == 0, err
  source = latents.open_set(folder / "imported")
  np.testing.assert_array_equal([source[i]["clip"] for i in range(3)], np.eye(3))
  result = run(
    "mdt_jax.encode", *flags, ARRAYS.replace("clip.npz", "rows.npy"), folder=folder
  )
  assert_refused(result, "colours=own_embedding:embed", "a function needs images")
