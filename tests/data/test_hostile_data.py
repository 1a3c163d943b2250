"""Hostile data files are used or refused: one line, within seconds, little memory."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdt_jax.data import latents
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.features import Convention, open_features
from mdt_jax.data.sources import create_source
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.image_streams import NpzImages
from tests.data import hostile_data
from tests.data.sets import Images, encode_fn, latent_set, write

# A picture of Pillow's largest size takes some 0.7 GB.
SECONDS, MEGABYTES, CHARACTERS = 10, 1000, 1000


def use(setting, path):
  """Reads all data of a path as a command does."""
  if setting == "--features":
    features = open_features(path, None, Convention(), max_unreadable=5)
    for index in range(len(features)):
      features[index]
    return
  if setting != "--config.data.path":
    for _ in NpzImages(path, setting).batches(4):
      pass
    return
  name = hostile_data.flags(setting, path)[0].split("=")[1]
  arguments = {"image_size": 8, "channels": 1, "max_unreadable": 5}
  source = create_source(name, path=path, **arguments)
  if source.num_classes <= 10:  # as config.model.num_classes
    DataLabels.of(source).describe()
    for index in range(len(source)):
      source[index]
  if name == "latents":
    latents.verify(path)


def memory():
  """The most memory that this process has used, in MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def check(folder, seed, count):
  """Uses `count` hostile paths; prints what is wrong."""
  for setting, path in hostile_data.cases(folder, seed, count):
    start, before = time.monotonic(), memory()
    try:
      use(setting, path)
    except SettingError as error:
      text = str(error)
      if len(text.splitlines()) > 1 or len(text) > CHARACTERS + 2 * len(str(path)):
        print(f"{path}: {text}")
    except BaseException as error:
      print(f"{path}: {type(error).__name__}: {error}")
    if time.monotonic() - start > SECONDS:
      print(f"{path}: {time.monotonic() - start:.0f} s")
    if memory() - before > MEGABYTES:
      print(f"{path}: {memory() - before:.0f} MB")


def test_every_kind_of_hostile_data_is_used_or_refused(tmp_path):
  """In a process of its own: ArrayRecord and Pillow's decoders are C and C++."""
  count = len(hostile_data.kinds())
  done = subprocess.run(
    [sys.executable, "-m", "tests.data.test_hostile_data", str(tmp_path), str(count)],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert done.stdout == "done\n", (done.stdout[-2000:], done.stderr[-2000:])
  assert done.returncode == 0


def test_cases_depend_on_the_seed_alone(tmp_path):
  found = []
  for name, seed in (("a", 1), ("b", 1), ("c", 2)):
    hostile_data.cases(tmp_path / name, seed, 40)
    files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
    # The file signature of an ArrayRecord is random.
    files = [p for p in files if p.suffix != ".array_record"]
    found.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in files])
  assert found[0] == found[1]
  assert found[0] != found[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return write(tmp_path_factory.mktemp("set"))


def edited(whole, folder, edit):
  shutil.copytree(whole, folder, dirs_exist_ok=True)
  card = json.loads((folder / "card.json").read_text())
  edit(card)
  (folder / "card.json").write_text(json.dumps(card))
  return folder


EDITS = {
  "no shards": (lambda card: card.update(shards=[]), "shards"),
  "no shape": (lambda card: card.pop("latent_shape"), "latent_shape"),
  "NaN in shape": (
    lambda card: card.update(latent_shape=[4, 4, float("nan")]),
    "shape",
  ),
  "huge shape": (lambda card: card.update(latent_shape=[10**30] * 3), "latent_shape"),
  "bool in shape": (
    lambda card: card.update(latent_shape=[4, 4, True]),
    "latent_shape",
  ),
  "dtype": (lambda card: card.update(dtype=["float16"]), "dtype"),
  "classes": (lambda card: card.update(classes=7), "classes"),
  "fewer classes": (lambda card: card.update(classes=["a"]), "labels"),
  "file elsewhere": (lambda card: card["shards"][0].update(file="../x"), "file"),
  "images": (lambda card: card["shards"][0].update(images=-1), "images"),
  "bytes": (lambda card: card["shards"][0].update(bytes="1"), "bytes"),
  "shard": (lambda card: card["shards"].__setitem__(1, None), "shard 1"),
  "labels": (lambda card: card["shards"][0].update(labels={"x": 1}), "labels"),
  "left out": (lambda card: card["shards"][0].update(left_out=[1]), "left_out"),
}


@pytest.mark.parametrize("case", EDITS)
def test_card_edited_by_hand_is_refused(whole, tmp_path, case):
  edit, word = EDITS[case]
  folder = edited(whole, tmp_path, edit)
  with pytest.raises(SettingError, match=f"^config.data.path = .*{word}") as caught:
    latents.open_set(folder)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("case", [c for c in EDITS if c not in ("no shape", "dtype")])
def test_encoding_refuses_to_resume_an_edited_set(whole, tmp_path, case):
  folder = edited(whole, tmp_path, EDITS[case][0])
  with pytest.raises(SettingError, match=r"^--output = ") as caught:
    write(folder)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"images": 1}', "[" * 100_000])
def test_damaged_entry_of_a_shard_is_refused(tmp_path, text):
  class Stop(Exception): ...

  def encode(images):
    if images[0, 0, 0, 0] >= 16:  # the last shard
      raise Stop
    return encode_fn(images)

  with pytest.raises(Stop):
    write(tmp_path, Images(), encode)
  entry = next(iter(sorted(tmp_path.glob("latents-*.json"))))
  entry.write_text(text)
  with pytest.raises(SettingError, match=f"^--output = .*{entry.name}"):
    write(tmp_path)
  assert latent_set(tmp_path).has_shard(0)


if __name__ == "__main__":
  check(
    sys.argv[1], seed=int(sys.argv[3]) if sys.argv[3:] else 0, count=int(sys.argv[2])
  )
  print("done")
