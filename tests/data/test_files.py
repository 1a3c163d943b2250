"""open_files: folders, tar files and TFDS data sets."""

from __future__ import annotations

import io
import os
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data.files import open_files
from mdt_jax.data.images import ImageSource
from mdt_jax.errors import SettingError
from tests.data.folders import (
  SIZE,
  labels,
  open_folder,
  values,
  write_array,
  write_image,
)


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
  """Maps the name of each file to (pixel value, label)."""
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


def test_each_tar_file_in_a_tar_file_is_a_class(tmp_path):
  """ILSVRC2012_img_train.tar has this layout."""
  members = {name: tar_bytes(files) for name, files in CLASSES.items()}
  files = open_files(write_tar(tmp_path / "train.tar", members))
  assert contents(files) == EXPECTED
  assert files.classes == ["n01", "n02"]


def test_each_tar_file_in_a_folder_is_a_class(tmp_path):
  for name, files in CLASSES.items():
    write_tar(tmp_path / name, files)
  assert contents(open_files(tmp_path)) == EXPECTED


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./train/"])
def test_each_folder_in_a_tar_file_is_a_class(tmp_path, prefix):
  members = {f"{prefix}{k}/{v}.png": image_bytes(v) for k, v in (("b", 1), ("a", 2))}
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert sorted(contents(files).values()) == [(1, 1), (2, 0)]
  assert files.classes == ["a", "b"]


def test_flat_tar_file_takes_classes_from_file_names(tmp_path):
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
def test_compressed_invalid_or_imageless_tar_file_is_refused(tmp_path, make, message):
  make(tmp_path / "x.tar")
  with pytest.raises(SettingError, match=message):
    open_files(tmp_path / "x.tar")


def test_error_names_a_tar_file_truncated_after_opening(tmp_path):
  path = write_tar(tmp_path / "x.tar", {"a.png": image_bytes(1)})
  files = open_files(path)
  path.write_bytes(path.read_bytes()[:520])
  with pytest.raises(OSError, match=r"x\.tar .* a\.png"):
    files.read(0)


MEMBERS = {f"{'ab'[i % 2]}/{i:02d}.png": image_bytes(i) for i in range(20)}
HEADER = 10 * 1024  # The eleventh: an entry is a block of header and one of data.


def flip_bit(data):
  return data[: HEADER + 10] + bytes([data[HEADER + 10] ^ 1]) + data[HEADER + 11 :]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (flip_bit, f"more data after the file that ends at byte {HEADER}"),
    (lambda data: data[: HEADER + 100], "after the file that ends at byte"),
    (lambda data: data[:HEADER], f"no end after byte {HEADER}"),
    (lambda data: data[:HEADER] + bytes(1024) + data[HEADER:], "more data after"),
    (lambda data: data + data, "more data after"),
  ],
  ids=["bit of a header", "cut in a header", "cut at a header", "zeros", "two files"],
)
def test_damaged_tar_file_is_refused(tmp_path, harm, message, outer):
  data = tar_bytes(MEMBERS)
  assert data[HEADER : HEADER + 8] == b"a/10.png"
  path = tmp_path / "x.tar"
  if outer:
    write_tar(path, {"a.tar": harm(data)})
  else:
    path.write_bytes(harm(data))
  with pytest.raises(SettingError, match=message):
    open_files(path)


def test_tar_file_without_padding_is_read(tmp_path):
  path = tmp_path / "x.tar"
  path.write_bytes(tar_bytes(MEMBERS)[: 20 * 1024 + 1024])  # two blocks of zeros
  assert len(open_files(path)) == 20


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """A TFDS data set of three images; TensorFlow is needed to write it."""
  pytest.importorskip("tensorflow")
  tfds = pytest.importorskip("tensorflow_datasets")

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


def test_tfds_data_set_is_opened_by_name(tfds_folder, monkeypatch):
  import tensorflow_datasets as tfds

  found = tfds.builder
  monkeypatch.setattr(tfds, "builder", lambda name: found(name, data_dir=tfds_folder))
  files = open_files("tfds:three_images")
  assert list(files.classes) == ["ant", "bee"]
  assert sorted(contents(files).values()) == [(0, 0), (10, 1), (20, 0)]
  assert files.name(1) == "three_images/train/1"


def test_missing_tensorflow_datasets_are_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # raises ImportError
  with pytest.raises(SettingError, match=r"^config.data.path = 'tfds:a': needs Tens"):
    open_files("tfds:a")


def test_unknown_tfds_data_set_is_refused():
  pytest.importorskip("tensorflow_datasets")
  with pytest.raises(SettingError, match=r"^config.data.path = 'tfds:no_such_set': "):
    open_files("tfds:no_such_set")


# Folders.


def test_empty_class_folder_keeps_its_label_and_is_logged(tmp_path, warnings):
  for name in ("ant", "bee", "cat"):
    (tmp_path / name).mkdir()
  write_image(tmp_path / "ant" / "1.png", 1)
  write_image(tmp_path / "cat" / "1.png", 2)
  files = open_files(tmp_path)
  assert [files.read(i)[1] for i in range(2)] == [0, 2]
  (line,) = warnings
  assert line == f"1 of 3 classes in {tmp_path} have no images: bee"


def test_subfolders_are_the_classes_in_sorted_order(tmp_path):
  for value, name in enumerate(["zebra", "ant", "cat"]):
    write_image(tmp_path / name / "x.png", value)
  source = open_folder(tmp_path)
  assert dict(zip(values(source), labels(source), strict=True)) == {0: 2, 1: 0, 2: 1}


def test_images_are_found_at_any_depth_below_a_class(tmp_path):
  write_image(tmp_path / "a" / "deep" / "deeper" / "x.png")
  write_image(tmp_path / "b" / "x.png")
  assert labels(open_folder(tmp_path)) == [0, 1]


def test_subfolder_without_images_counts_as_a_class(tmp_path):
  (tmp_path / "a").mkdir()
  write_image(tmp_path / "b" / "x.png")
  source = open_folder(tmp_path)
  assert (labels(source), source.num_classes) == ([1], 2)


def test_flat_file_names_start_with_the_class_and_an_underscore(tmp_path):
  for name in ("dog_1_a.jpg", "cat_1.jpg", "dog_2.jpg"):
    write_image(tmp_path / name)
  source = open_folder(tmp_path)
  assert (labels(source), source.num_classes) == ([0, 1, 1], 2)


def test_flat_file_names_without_underscores_are_one_class(three):
  source = open_folder(three)
  assert (labels(source), source.num_classes) == ([0, 0, 0], 1)


def test_image_extensions_are_case_insensitive(tmp_path):
  for name in ("a.jpg", "b.JPEG", "c.Png", "d.webp", "e.GIF", "f.bmp"):
    write_image(tmp_path / name)
  assert len(open_folder(tmp_path)) == 6


def test_hidden_files_and_folders_are_ignored(three):
  write_image(three / ".4.png")
  write_image(three / ".cache" / "5.png")
  assert len(open_folder(three)) == 3


def test_other_files_are_ignored(three):
  (three / "notes.txt").write_text("three images")
  assert len(open_folder(three)) == 3


def test_symlink_to_a_class_folder_is_followed(tmp_path):
  write_image(tmp_path / "elsewhere" / "x.png", 7)
  (tmp_path / "data").mkdir()
  os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "a")
  assert values(open_folder(tmp_path / "data")) == [7]


def test_links_to_folders_above_are_left_out(tmp_path, warnings):
  for name in "ab":
    write_image(tmp_path / name / "0.png")
  (tmp_path / "a" / "up").symlink_to(tmp_path)
  (tmp_path / "b" / "here").symlink_to(tmp_path / "b")
  (tmp_path / "c").symlink_to(tmp_path)
  files = open_files(tmp_path)
  assert [files.name(i) for i in range(len(files))] == ["a/0.png", "b/0.png"]
  assert files.classes == ["a", "b"]
  (warning,) = warnings
  assert "links to a folder above (3, such as a/up)" in warning


def test_pipes_and_devices_are_left_out(tmp_path, warnings):
  write_image(tmp_path / "0.png")
  os.mkfifo(tmp_path / "1.png")
  (tmp_path / "2.png").symlink_to("/dev/zero")
  (tmp_path / "3.png").symlink_to(tmp_path / "nothing")  # Counts as unreadable.
  files = open_files(tmp_path)
  assert [files.name(i) for i in range(len(files))] == ["0.png", "3.png"]
  assert "devices or links to them (2, such as 1.png)" in warnings[0]


def test_missing_folder_is_refused(tmp_path):
  with pytest.raises(SettingError, match=r"^config.data.path = '.*gone': .*a folder"):
    open_folder(tmp_path / "gone")


def test_file_in_place_of_a_folder_is_refused(three):
  with pytest.raises(SettingError, match=r"^config.data.path = .*1.png': .*a folder"):
    open_folder(three / "1.png")


def test_folder_without_images_is_refused(tmp_path):
  (tmp_path / "notes.txt").write_text("nothing here")
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*\.png.* files, found none"
  ):
    open_folder(tmp_path)


def test_images_at_the_top_and_in_subfolders_are_refused(three):
  write_image(three / "a" / "x.png")
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*3 files at the top and 1 in subfolders"
  ):
    open_folder(three)


def test_arrays_beside_images_are_ignored(three):
  write_array(three / "x.npy", np.zeros((SIZE, SIZE, 3), np.float32))
  assert len(open_folder(three)) == 3


def test_flat_file_names_need_underscores_in_all_or_none(three):
  write_image(three / "cat_1.png")
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*ClassID_ImgID.*3 of 4 .*1\.png"
  ):
    open_folder(three)


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
  write_image(tmp_path / "a" / "x.png")
  listed = os.scandir

  def scandir(path):  # Root may list any folder, so this function raises the error.
    if os.fspath(path).endswith("a"):
      raise PermissionError(13, "Permission denied", os.fspath(path))
    return listed(path)

  monkeypatch.setattr(os, "scandir", scandir)
  with pytest.raises(SettingError, match=r"^config.data.path = .*Permission denied"):
    open_folder(tmp_path)
