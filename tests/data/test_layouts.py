"""Layouts of other tools: WebDataset, EDM's dataset.json, macOS's archives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.files import open_files
from mdt_jax.errors import SettingError
from tests.data.folders import open_folder, values, write_image
from tests.data.test_files import contents, image_bytes, write_tar


def sample(key, value, suffix=None, label=None):
  """The files of a WebDataset sample: an image, and its label in a file beside it."""
  files = {f"{key}.jpg.png": image_bytes(value)}
  if suffix is not None:
    text = label if isinstance(label, str) else json.dumps(label)
    files[f"{key}.{suffix}"] = text.encode()
  return files


@pytest.mark.parametrize(
  ("suffix", "labels"),
  [
    ("cls", ["0", "3", "1\n"]),
    ("json", [{"label": 0}, {"label": 3, "id": 7}, {"label": 1, "cls": 9}]),
    ("json", [{"cls": 0}, {"cls": 3}, {"class": 1}]),
  ],
)
def test_shards_have_the_labels_beside_the_images(tmp_path, suffix, labels):
  parts = [sample(f"{i:06d}", i, suffix, labels[i]) for i in range(3)]
  write_tar(tmp_path / "train-0000.tar", {**parts[0], **parts[1]})
  write_tar(tmp_path / "train-0001.tar", parts[2])
  files = open_files(tmp_path)
  assert sorted(contents(files).values()) == [(0, 0), (1, 3), (2, 1)]
  assert DataLabels.of(open_folder(tmp_path)).labels.tolist() == [0, 1, 3]


def test_one_shard_has_the_labels_beside_the_images(tmp_path):
  members = {**sample("a/0", 5, "cls", "2"), **sample("b/0", 6, "cls", "0")}
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert sorted(contents(files).values()) == [(5, 2), (6, 0)]


def test_json_may_hold_names_of_classes(tmp_path):
  names = ["bee", "ant", "bee"]
  members = {}
  for i, name in enumerate(names):
    members |= sample(f"{i}", i, "json", {"label": name})
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert files.classes == ["ant", "bee"]
  assert sorted(contents(files).values()) == [(0, 1), (1, 0), (2, 1)]


def test_json_without_labels_is_one_class_and_logged(tmp_path, warnings):
  members = {**sample("0", 1, "json", {"caption": "a"}), **sample("1", 2, "json", {})}
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert [label for _, label in contents(files).values()] == [0, 0]
  assert any("label, cls, class" in line for line in warnings)


@pytest.mark.parametrize(
  ("second", "message"),
  [
    (sample("1", 2), r"1\.jpg\.png has no \.cls file"),
    (sample("1", 2, "cls", "ant"), r"1\.cls must hold a whole number"),
    (sample("1", 2, "cls", ""), r"1\.cls must hold a whole number"),
    (sample("1", 2, "cls", "-1"), "found -1"),
    (sample("1", 2, "cls", "1" * 5000), r"1\.cls must hold"),
    (sample("1", 2, "cls", str(10**15)), "whole numbers in"),
  ],
)
def test_image_without_a_usable_label_is_refused(tmp_path, second, message):
  members = {**sample("0", 1, "cls", "0"), **second}
  with pytest.raises(SettingError, match=f"config.data.path = .*{message}"):
    open_files(write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"label": [1]}'])
def test_json_that_cannot_be_used_is_refused_in_one_line(tmp_path, text):
  members = sample("0", 1, "json", text)
  with pytest.raises(SettingError) as caught:
    open_files(write_tar(tmp_path / "x.tar", members))
  assert len(str(caught.value).splitlines()) == 1


# EDM and StyleGAN.


def write_edm(folder, labels):
  for i in range(3):
    write_image(folder / f"00000/img{i:08d}.png", i)
  (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


LABELS = [[f"00000/img{i:08d}.png", label] for i, label in enumerate([6, 0, 6])]


def test_dataset_json_gives_the_labels(tmp_path, warnings):
  write_edm(tmp_path, [*LABELS, ["00000/gone.png", 1]])
  source = open_folder(tmp_path)
  assert [int(example["label"]) for example in source] == [6, 0, 6]
  assert source.num_classes == 7
  (line,) = warnings
  assert "1 files that are absent, such as 00000/gone.png" in line


def test_dataset_json_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  write_image(tmp_path / "a.png")
  (tmp_path / "dataset.json").touch()
  read = Path.read_bytes

  def fail(path):
    if path.name == "dataset.json":
      raise PermissionError(13, "Permission denied")
    return read(path)

  monkeypatch.setattr(Path, "read_bytes", fail)
  message = r"^config\.data\.path = .*: dataset\.json in it cannot be read: Permission"
  with pytest.raises(SettingError, match=message):
    open_folder(tmp_path)


def test_dataset_json_without_labels_is_one_class(tmp_path):
  write_edm(tmp_path, None)
  source = open_folder(tmp_path)
  assert [int(example["label"]) for example in source] == [0, 0, 0]


@pytest.mark.parametrize("prefix", ["", "./", "edm/"])
def test_dataset_json_in_a_tar_file_gives_the_labels(tmp_path, prefix):
  members = {f"{prefix}{name}": image_bytes(i) for i, (name, _) in enumerate(LABELS)}
  members[f"{prefix}dataset.json"] = json.dumps({"labels": LABELS}).encode()
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert sorted(contents(files).values()) == [(0, 6), (1, 0), (2, 6)]


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (LABELS[:2], r"no label for 1 of 3 .*img00000002\.png"),
    ([[name, float(label)] for name, label in LABELS], "found 6.0"),
    ([[name, [label]] for name, label in LABELS], r"found \[6\]"),
    ([[name, 10**15] for name, _ in LABELS], "found 1000000000000000"),
    ([["a", "b", "c"]], "NAME, LABEL"),
    ({"a": 1}, "NAME, LABEL"),
    ([[["a"], 1]], "NAME, LABEL"),
  ],
)
def test_unusable_dataset_json_is_refused(tmp_path, labels, message):
  write_edm(tmp_path, labels)
  with pytest.raises(SettingError, match=f"config.data.path = .*{message}"):
    open_files(tmp_path)


def test_dataset_json_of_another_kind_is_ignored(tmp_path):
  write_image(tmp_path / "ant/0.png")
  (tmp_path / "dataset.json").write_text('{"licence": "none"}')
  assert open_files(tmp_path).classes == ["ant"]


# What is left out.


def test_copies_of_macos_are_left_out(tmp_path, warnings):
  write_image(tmp_path / "ant/1.png", 1)
  write_image(tmp_path / "__MACOSX/ant/._1.png", 2)
  write_image(tmp_path / "ant/._1.png", 3)
  (tmp_path / ".DS_Store").write_bytes(b"x")
  source = open_folder(tmp_path)
  assert (values(source), source.num_classes) == ([1], 1)
  (line,) = warnings
  assert "hidden files or folders (3, such as .DS_Store)" in line


def test_copies_of_macos_in_a_tar_file_are_left_out(tmp_path, warnings):
  members = {
    "set/ant/1.png": image_bytes(1),
    "set/ant/._1.png": image_bytes(2),
    "__MACOSX/set/ant/1.png": image_bytes(3),
    "set/.cache/x/1.png": image_bytes(4),
  }
  files = open_files(write_tar(tmp_path / "x.tar", members))
  assert list(contents(files).values()) == [(1, 0)]
  assert "hidden files or folders (3, " in warnings[0]


def test_files_left_out_are_counted_by_kind_in_one_line(tmp_path, warnings):
  write_image(tmp_path / "ant/1.png", 1)
  for name in ("a.txt", "b.TXT", "c.xml", "README"):
    (tmp_path / "ant" / name).write_text("")
  open_folder(tmp_path)
  (line,) = warnings
  for text in (
    ".txt files (2, such as ant/a.txt)",
    ".xml files (1, ",
    "files without an ending (1, ",
  ):
    assert text in line


def test_what_stands_beside_tar_files_is_counted(tmp_path, warnings):
  write_tar(tmp_path / "ant.tar", {"1.png": image_bytes(1), "2.txt": b""})
  write_image(tmp_path / "bee/1.png", 2)
  open_files(tmp_path)
  (line,) = warnings
  assert ".txt files (1, " in line and "beside the .tar files (1, such as bee)" in line


def test_splits_as_classes_are_named(tmp_path, warnings):
  for part in ("train", "val"):
    write_image(tmp_path / part / "ant/1.png")
  source = open_folder(tmp_path)
  assert DataLabels.of(source).describe() == "2 classes of 1 image: train, val"
  assert "train, val: to train on one of these folders" in warnings[0]


def test_further_endings_are_read(tmp_path):
  for name in ("a.tif", "b.TIFF", "c.bmp"):
    write_image(tmp_path / name, 9)
  Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "d.jfif", format="JPEG")
  assert values(open_folder(tmp_path)) == [9, 9, 9, 9]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_tiff_of_16_bits_becomes_8_bits(tmp_path, kind):
  pixels = np.full((8, 8), 257 * 40, kind)
  Image.fromarray(pixels).save(tmp_path / "x.tif")
  assert values(open_folder(tmp_path)) == [40]


@pytest.mark.skipif(sys.platform == "win32", reason="tar files of Unix")
def test_sparse_member_is_refused(tmp_path):
  path = write_tar(tmp_path / "x.tar", {"a.png": image_bytes(1)})
  data = bytearray(path.read_bytes())
  data[156:157] = b"S"  # GNU's type of a sparse file
  data[148:156] = b" " * 8
  data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
  path.write_bytes(data)
  with pytest.raises(SettingError, match="sparse"):
    open_files(path)
