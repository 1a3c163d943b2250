"""Where images lie: tar files and TFDS; folders are tested with the sources."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data.files import open_files
from mdt_jax.data.images import ImageSource
from mdt_jax.errors import SettingError


def image_bytes(value, extension="PNG"):
  held = io.BytesIO()
  Image.new("L", (8, 8), value).save(held, extension)
  return held.getvalue()


def write_tar(path, members, mode="w"):
  with tarfile.open(path, mode) as tar:
    for name, data in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return path


def tar_bytes(members):
  held = io.BytesIO()
  with tarfile.open(fileobj=held, mode="w") as tar:
    for name, data in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return held.getvalue()


def contents(files):
  """name -> (value, label)"""
  source = ImageSource(files, 8, 1, 0)
  examples = [source[i] for i in range(len(source))]
  return {
    files.name(i): (int(e["image"][0, 0, 0]), int(e["label"]))
    for i, e in enumerate(examples)
  }


CLASSES = {
  "n02.tar": {"n02_1.JPEG": image_bytes(30), "n02_2.JPEG": image_bytes(40)},
  "n01.tar": {"n01_9.JPEG": image_bytes(50), "notes.txt": b"no image"},
}
EXPECTED = {
  "n01/n01_9.JPEG": (50, 0),
  "n02/n02_1.JPEG": (30, 1),
  "n02/n02_2.JPEG": (40, 1),
}


def test_a_tar_file_of_tar_files_has_a_class_each(tmp_path):
  """As ILSVRC2012_img_train.tar."""
  members = {name: tar_bytes(files) for name, files in CLASSES.items()}
  files = open_files(write_tar(tmp_path / "train.tar", members))
  assert contents(files) == EXPECTED
  assert files.classes == ["n01", "n02"]


def test_a_folder_of_tar_files_has_a_class_each(tmp_path):
  for name, files in CLASSES.items():
    write_tar(tmp_path / name, files)
  assert contents(open_files(tmp_path)) == EXPECTED


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./train/"])
def test_a_tar_file_of_folders_has_a_class_each(tmp_path, prefix):
  members = {f"{prefix}{k}/{v}.png": image_bytes(v) for k, v in (("b", 1), ("a", 2))}
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert sorted(contents(files).values()) == [(1, 1), (2, 0)]
  assert files.classes == ["a", "b"]


def test_a_flat_tar_file_has_its_classes_in_the_names(tmp_path):
  members = {"dog_1.png": image_bytes(1), "cat_1.png": image_bytes(2)}
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert contents(files) == {"dog_1.png": (1, 1), "cat_1.png": (2, 0)}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda path: write_tar(path, {"a.png": b""}, "w:gz"), "an uncompressed tar file"),
    (lambda path: path.write_bytes(b"no tar file" * 100), "an uncompressed tar file"),
    (lambda path: write_tar(path, {"notes.txt": b"hello"}), "found none"),
  ],
)
def test_a_tar_file_that_cannot_be_read_in_place_is_refused(tmp_path, make, message):
  make(tmp_path / "x.tar")
  with pytest.raises(SettingError, match=message):
    open_files(tmp_path / "x.tar")


def test_a_tar_file_cut_short_afterwards_is_told(tmp_path):
  path = write_tar(tmp_path / "x.tar", {"a.png": image_bytes(1)})
  files = open_files(path)
  path.write_bytes(path.read_bytes()[:520])
  with pytest.raises(OSError, match=r"x\.tar ends within a\.png"):
    files.read(0)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """A data set of three images, prepared as TFDS does."""
  import tensorflow_datasets as tfds

  class ThreeImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      label = tfds.features.ClassLabel(names=["ant", "bee"])
      image = tfds.features.Image(shape=(8, 8, 3))
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict({"image": image, "label": label})
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(3):
        yield i, {"image": np.full((8, 8, 3), 10 * i, np.uint8), "label": i % 2}

  folder = tmp_path_factory.mktemp("tfds")
  builder = ThreeImages(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return folder


def test_a_set_of_tfds_is_read_by_name(tfds_folder, monkeypatch):
  import tensorflow_datasets as tfds

  found = tfds.builder
  monkeypatch.setattr(tfds, "builder", lambda name: found(name, data_dir=tfds_folder))
  files = open_files("tfds:three_images")
  assert list(files.classes) == ["ant", "bee"]
  assert sorted(contents(files).values()) == [(0, 0), (10, 1), (20, 0)]
  assert files.name(1) == "three_images/train/1"


def test_an_unknown_set_of_tfds_is_refused():
  with pytest.raises(SettingError, match=r"^config.data.path = 'tfds:no_such_set': "):
    open_files("tfds:no_such_set")
