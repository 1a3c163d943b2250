"""Folders and tar files of images to score."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data.class_labels import DataLabels
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.image_files import (
  FileImages,
  has_labels,
  label_of_named_class,
  open_image_stream,
)
from mdt_jax.evaluation.image_streams import NpzImages
from tests.cli.commands import assert_refused, run
from tests.data.folders import open_folder, write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


def save(folder, names, pixels=PIXELS):
  for name, image in zip(names, pixels, strict=False):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(folder / name)
  return folder


def read(stream, batch_size=4):
  images, labels = zip(*stream.batches(batch_size), strict=True)
  labels = None if labels[0] is None else np.concatenate(labels)
  return np.concatenate(images), labels


def test_numbers_before_an_underscore_are_labels_as_sample_writes_them(tmp_path):
  names = ["7_000000.png", "7_000003.png", "9_000001.png", "10_000002.png"]
  stream = FileImages(save(tmp_path, names))
  images, labels = read(stream)
  by_label = {7: [0, 1], 9: [2], 10: [3]}
  assert stream.shape == (4, 8, 8, 3) and len(stream) == 4
  assert sorted(labels) == [7, 7, 9, 10]
  for label, places in by_label.items():
    np.testing.assert_array_equal(images[labels == label], PIXELS[places])


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
  images, labels = read(FileImages(save(tmp_path, ["b/1.png", "a/1.png", "a/2.png"])))
  np.testing.assert_array_equal(labels, [0, 0, 1])
  np.testing.assert_array_equal(images, PIXELS[[1, 2, 0]])


def test_class_may_have_a_long_number_as_its_name(tmp_path):
  names = ["7/1.png", f"{'9' * 20}/1.png"]
  np.testing.assert_array_equal(read(FileImages(save(tmp_path, names)))[1], [0, 1])


def test_classes_of_a_run_have_the_labels_of_training(tmp_path):
  """Training sorts the names as text, so that class 10 has the label 2."""
  for i in range(12):
    write_image(tmp_path / f"{i}/0.png", i)
  source = open_folder(tmp_path)
  expected = {int(x["image"].flat[0]): int(x["label"]) for x in source}
  assert expected[10] == 2
  label_of = DataLabels.of(source).label_of
  images, labels = read(FileImages(tmp_path, label_of=label_of))
  assert dict(zip(images[:, 0, 0, 0], labels, strict=True)) == expected


def test_class_that_a_run_lacks_has_a_label_of_its_own(tmp_path, warnings):
  names = ["ant/0.png", "bee/0.png", "cow/0.png"]
  label_of = {"bee": 0, "cow": 3}
  _, labels = read(FileImages(save(tmp_path, names), label_of=label_of))
  np.testing.assert_array_equal(labels, [4, 0, 3])
  (line,) = warnings
  assert "ant" in line and str(tmp_path) in line


def test_warning_names_a_class_if_a_run_has_none_of_the_classes(tmp_path, warnings):
  stream = FileImages(save(tmp_path, ["x/0.png", "y/0.png"]), label_of={"ant": 0})
  np.testing.assert_array_equal(read(stream)[1], [0, 1])
  assert len(warnings) == 1 and "x" in warnings[0]


def test_samples_count_classes_as_the_reference_does(tmp_path):
  real = save(tmp_path / "real", ["ant/0.png", "bee/0.png", "cow/0.png"])
  fake = save(tmp_path / "fake", ["bee/0.png", "cow/0.png"])
  stream = open_image_stream(fake, label_of=label_of_named_class(None, real))
  np.testing.assert_array_equal(read(stream)[1], [1, 2])


def test_number_of_samples_is_a_label_of_the_run(tmp_path):
  """Sampling writes label 1 as 1_000000.png, whatever the name of its class."""
  held = DataLabels(np.arange(3), ["1", "10", "2"])
  fake = save(tmp_path, ["1_000000.png", "2_000001.png"])
  stream = open_image_stream(fake, label_of=label_of_named_class(held, None))
  np.testing.assert_array_equal(read(stream)[1], [1, 2])


def test_images_without_classes_have_no_labels(tmp_path):
  stream = FileImages(save(tmp_path, ["000.png", "001.png"]))
  assert not stream.has_labels
  assert read(stream)[1] is None


def test_grey_images_have_one_channel(tmp_path):
  images, _ = read(FileImages(save(tmp_path, ["1.png", "2.png"], PIXELS[..., :1])))
  np.testing.assert_array_equal(images, PIXELS[:2, ..., :1])


def test_tar_file_is_read(tmp_path):
  save(tmp_path / "images", ["1.png", "2.png"])
  with tarfile.open(tmp_path / "images.tar", "w") as tar:
    tar.add(tmp_path / "images", "images")
  images, _ = read(open_image_stream(tmp_path / "images.tar"))
  np.testing.assert_array_equal(images, PIXELS[:2])


def test_error_names_a_grey_image_among_coloured_ones_and_one_of_16_bits(tmp_path):
  save(tmp_path / "mixed", ["1.png"])
  save(tmp_path / "mixed", ["2.png"], PIXELS[..., :1])
  with pytest.raises(SettingError, match=r"2\.png is grey, the first image coloured"):
    read(FileImages(tmp_path / "mixed"))
  save(tmp_path / "deep", ["1.png"], PIXELS[..., :1].astype(np.uint16) * 257)
  with pytest.raises(SettingError, match="more than 8 bits"):
    FileImages(tmp_path / "deep")


def test_home_folder_is_expanded_and_a_missing_file_is_named_once(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path))
  save(tmp_path / "images", ["1.png", "2.png"])
  assert len(open_image_stream("~/images")) == 2
  with pytest.raises(SettingError) as error:
    has_labels("~/nowhere.npz", "samples")
  assert error.value.accepted == "must be a file"


def test_error_names_an_image_of_another_size_and_a_broken_one(tmp_path):
  save(tmp_path / "size", ["1.png"])
  save(tmp_path / "size", ["2.png"], PIXELS[:, :4])
  save(tmp_path / "broken", ["1.png", "2.png"])
  (tmp_path / "broken" / "2.png").write_bytes(b"no image")
  for name, text in (("size", "2.png is 4x8x3"), ("broken", "2.png cannot be read")):
    with pytest.raises(SettingError) as error:
      read(FileImages(tmp_path / name, "--samples"))
    assert error.value.setting == "--samples" and text in error.value.accepted


def test_npz_file_is_opened_as_such(tmp_path):
  np.savez(tmp_path / "a.npz", PIXELS)
  assert isinstance(open_image_stream(tmp_path / "a.npz"), NpzImages)
  assert not has_labels(tmp_path / "a.npz")
  np.savez(tmp_path / "b.npz", PIXELS, np.arange(6))
  assert has_labels(tmp_path / "b.npz")


def test_folder_is_scored_as_the_npz_file_of_its_images(tmp_path):
  save(tmp_path / "png", [f"{i}.png" for i in range(6)])
  np.savez(tmp_path / "same.npz", PIXELS)
  np.savez(tmp_path / "real.npz", PIXELS[::-1] // 2)
  (tmp_path / "real").mkdir()
  save(tmp_path / "real", [f"{i}.png" for i in range(6)], PIXELS[::-1] // 2)
  found = []
  for samples, real in (("png", "real"), ("same.npz", "real.npz")):
    flags = [f"--samples={tmp_path / samples}", f"--reference={tmp_path / real}"]
    code, out, err = run("mdt_jax.evaluate", *flags, f"--output={tmp_path}")
    assert code == 0, err
    assert "no accuracy and no diversity" in out
    found.append(json.loads((tmp_path / "scores.json").read_text())["scores"])
  assert found[0] == found[1] and list(found[0]) == ["frechet"]


def test_score_that_needs_labels_is_refused_without_them(tmp_path):
  np.savez(tmp_path / "a.npz", PIXELS)
  flags = [f"--samples={tmp_path / 'a.npz'}", f"--reference={tmp_path / 'a.npz'}"]
  result = run("mdt_jax.evaluate", *flags, "--metrics=accuracy")
  assert_refused(result, "labels")
