"""Sources: what they hold, what they refuse, and what they leave out."""

import os
import pickle
import threading

import numpy as np
import pytest
from absl import logging
from PIL import Image

from mdt_jax.data import sources
from mdt_jax.data.arrays import ArraySource
from mdt_jax.data.examples import Subset, split_indices
from mdt_jax.data.files import ARRAY_EXTENSIONS, open_files
from mdt_jax.data.images import ImageSource
from mdt_jax.errors import SettingError

SIZE = 8


def write_image(path, value=0, size=(SIZE, SIZE), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def write_array(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, array)


def open_folder(path, image_size=SIZE, channels=3, max_unreadable=10):
  return ImageSource(open_files(path), image_size, channels, max_unreadable)


def open_arrays(path, image_size=4, channels=4, max_unreadable=10):
  files = open_files(path, extensions=ARRAY_EXTENSIONS)
  return ArraySource(files, image_size, channels, max_unreadable)


def labels(source):
  return [int(example["label"]) for example in source]


def values(source):
  return [int(example["image"].flat[0]) for example in source]


@pytest.fixture
def three(tmp_path):
  """Three images of one class, filled with 1, 2 and 3."""
  for value in (1, 2, 3):
    write_image(tmp_path / f"{value}.png", value)
  return tmp_path


@pytest.fixture
def warnings(monkeypatch):
  """The lines that absl logs as warnings."""
  lines = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
  return lines


def test_an_empty_class_folder_keeps_its_label_and_is_named(tmp_path, warnings):
  for name in ("ant", "bee", "cat"):
    (tmp_path / name).mkdir()
  write_image(tmp_path / "ant" / "1.png", 1)
  write_image(tmp_path / "cat" / "1.png", 2)
  files = open_files(tmp_path)
  assert [files.read(i)[1] for i in range(2)] == [0, 2]
  (line,) = warnings
  assert line == f"1 of 3 classes in {tmp_path} have no images: bee"


# Digits.


@pytest.fixture(scope="module")
def digits():
  return sources.DigitsSource()


def test_digits_are_1797_images(digits):
  assert len(digits) == 1797


def test_digits_have_ten_classes(digits):
  assert set(labels(digits)) == set(range(digits.num_classes)) == set(range(10))


def test_digit_is_uint8_of_the_declared_shape(digits):
  image = digits[0]["image"]
  assert (
    (image.shape, image.dtype)
    == (digits.image_shape, np.uint8)
    == (
      (8, 8, 1),
      np.uint8,
    )
  )


def test_digit_label_is_int32(digits):
  assert digits[0]["label"].dtype == np.int32


def test_17_grey_levels_are_spread_over_a_byte(digits):
  found = np.unique([example["image"] for example in digits])
  np.testing.assert_array_equal(found, [round(v * 255 / 16) for v in range(17)])


# Folders: layouts and labels.


def test_subfolders_are_the_classes_in_sorted_order(tmp_path):
  for value, name in enumerate(["zebra", "ant", "cat"]):
    write_image(tmp_path / name / "x.png", value)
  source = open_folder(tmp_path)
  assert dict(zip(values(source), labels(source), strict=True)) == {0: 2, 1: 0, 2: 1}


def test_images_are_found_at_any_depth_below_a_class(tmp_path):
  write_image(tmp_path / "a" / "deep" / "deeper" / "x.png")
  write_image(tmp_path / "b" / "x.png")
  assert labels(open_folder(tmp_path)) == [0, 1]


def test_subfolder_without_images_still_is_a_class(tmp_path):
  (tmp_path / "a").mkdir()
  write_image(tmp_path / "b" / "x.png")
  source = open_folder(tmp_path)
  assert (labels(source), source.num_classes) == ([1], 2)


def test_flat_names_carry_the_class_before_the_first_underscore(tmp_path):
  for name in ("dog_1_a.jpg", "cat_1.jpg", "dog_2.jpg"):
    write_image(tmp_path / name)
  source = open_folder(tmp_path)
  assert (labels(source), source.num_classes) == ([0, 1, 1], 2)


def test_flat_names_without_underscores_are_one_class(three):
  source = open_folder(three)
  assert (labels(source), source.num_classes) == ([0, 0, 0], 1)


def test_all_extensions_are_read_whatever_their_case(tmp_path):
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


def test_linked_class_folder_is_followed(tmp_path):
  write_image(tmp_path / "elsewhere" / "x.png", 7)
  (tmp_path / "data").mkdir()
  os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "a")
  assert values(open_folder(tmp_path / "data")) == [7]


def test_index_beyond_the_end_is_an_index_error(three):
  with pytest.raises(IndexError):
    open_folder(three)[3]


# Folders: content.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_the_declared_shape(tmp_path, mode, channels):
  write_image(
    tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), 9, (20, 11), mode=mode
  )
  source = open_folder(tmp_path, channels=channels)
  image = source[0]["image"]
  assert (image.shape, image.dtype) == ((SIZE, SIZE, channels), np.uint8)
  assert source.image_shape == image.shape


def test_sixteen_bits_become_eight(tmp_path):
  values = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
  Image.fromarray(values).save(tmp_path / "x.png")
  image = open_folder(tmp_path, image_size=4, channels=1)[0]["image"]
  np.testing.assert_array_equal(image[0, :, 0], [0, 1, 127, 255])


def test_a_palette_becomes_its_colours(tmp_path):
  Image.new("RGB", (SIZE, SIZE), (200, 10, 90)).quantize(4).save(tmp_path / "x.png")
  assert open_folder(tmp_path)[0]["image"][3, 4].tolist() == [200, 10, 90]


def test_an_animation_gives_its_first_frame(tmp_path):
  frames = [Image.new("L", (SIZE, SIZE), value) for value in (40, 80, 120)]
  frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
  assert values(open_folder(tmp_path, channels=1)) == [40]


@pytest.mark.parametrize("size", [(40, 1), (1, 40), (1, 1)])
def test_an_image_one_pixel_high_or_wide_is_cropped(tmp_path, size):
  write_image(tmp_path / "x.png", 5, size)
  assert (open_folder(tmp_path)[0]["image"] == 5).all()


def test_an_image_too_narrow_to_be_cropped_is_left_out(three, monkeypatch):
  """Its smaller side would be scaled to the size, and the other one to a billion."""
  write_image(three / "2.png", 2, (5000, 1))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
  assert values(open_folder(three)) == [1, 3, 3]


def test_sources_go_to_worker_processes(three):
  source = pickle.loads(pickle.dumps(open_folder(three)))
  assert values(source) == [1, 2, 3]


def test_a_split_shares_out_every_example_once():
  training, validation = split_indices(1000, 0.1)
  assert len(validation) == 100
  np.testing.assert_array_equal(
    np.sort(np.concatenate([training, validation])), np.arange(1000)
  )
  assert np.diff(validation).max() <= 11


def test_a_subset_holds_the_examples_asked_for(three):
  subset = Subset(open_folder(three), np.array([2, 0]))
  assert values(subset) == [3, 1]
  assert (subset.num_classes, subset.image_shape) == (1, (SIZE, SIZE, 3))


def test_image_is_centre_cropped(tmp_path):
  pixels = np.arange(SIZE * 12, dtype=np.uint8).reshape(SIZE, 12)
  Image.fromarray(pixels).save(tmp_path / "x.png")
  image = open_folder(tmp_path, channels=1)[0]["image"]
  np.testing.assert_array_equal(image[..., 0], pixels[:, 2:10])


def test_array_is_taken_unchanged(tmp_path):
  latent = np.random.default_rng(0).normal(size=(4, 4, 5)).astype(np.float32) * 30
  write_array(tmp_path / "x.npy", latent)
  np.testing.assert_array_equal(open_arrays(tmp_path, 4, 5)[0]["image"], latent)


def test_half_precision_array_becomes_float32(tmp_path):
  write_array(tmp_path / "x.npy", np.ones((4, 4, 4), np.float16))
  assert open_arrays(tmp_path)[0]["image"].dtype == np.float32


# Unreadable files.


def test_next_readable_image_takes_the_place_of_an_unreadable_one(three):
  (three / "1.png").write_bytes(b"not an image")
  (three / "2.png").write_bytes(b"neither")
  assert values(open_folder(three)) == [3, 3, 3]


def test_first_image_takes_the_place_of_an_unreadable_last_one(three):
  (three / "3.png").write_bytes(b"not an image")
  assert values(open_folder(three)) == [1, 2, 1]


def test_replacement_brings_its_own_label(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x.png").write_bytes(b"not an image")
  write_image(tmp_path / "b" / "x.png")
  assert labels(open_folder(tmp_path)) == [1, 1]


def test_replacement_does_not_depend_on_the_order_of_reading(three):
  (three / "2.png").write_bytes(b"not an image")
  source = open_folder(three)
  backwards = [int(source[i]["image"].flat[0]) for i in (2, 1, 0)]
  assert backwards[::-1] == values(open_folder(three))


def test_unreadable_file_is_logged_once_with_path_and_reason(three, warnings):
  (three / "2.png").write_bytes(b"not an image")
  source = open_folder(three)
  values(source)
  values(source)
  (line,) = warnings
  assert str(three / "2.png") in line and "UnidentifiedImageError" in line


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp"])
def test_truncated_image_is_left_out(three, extension):
  path = three / f"0.{extension}"
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert values(open_folder(three)) == [1, 1, 2, 3]


def test_decompression_bomb_is_left_out(three, monkeypatch):
  write_image(three / "2.png", 2, (100, 100))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  assert values(open_folder(three)) == [1, 3, 3]


@pytest.mark.parametrize(
  "array",
  [
    np.zeros((4, 4, 3), np.float32),
    np.zeros((4, 4, 4), np.uint8),
    np.full((4, 4, 4), np.nan, np.float32),
    np.array([{"pickled": 1}], dtype=object),
  ],
  ids=["shape", "integers", "not finite", "pickle"],
)
def test_wrong_array_is_left_out(tmp_path, array):
  write_array(tmp_path / "0.npy", np.ones((4, 4, 4), np.float32))
  write_array(tmp_path / "1.npy", array)
  assert values(open_arrays(tmp_path)) == [1, 1]


def test_truncated_array_is_left_out(tmp_path):
  for value in (0, 1):
    write_array(tmp_path / f"{value}.npy", np.full((4, 4, 4), value, np.float32))
  path = tmp_path / "0.npy"
  path.write_bytes(path.read_bytes()[:-8])
  assert values(open_arrays(tmp_path)) == [1, 1]


def test_as_many_unreadable_files_as_allowed_are_accepted(three):
  (three / "2.png").write_bytes(b"not an image")
  assert values(open_folder(three, max_unreadable=1)) == [1, 3, 3]


def test_one_unreadable_file_more_than_allowed_is_refused(three):
  for name in ("1.png", "2.png"):
    (three / name).write_bytes(b"not an image")
  with pytest.raises(
    SettingError, match=r"^config.data.max_unreadable = 1: 2 files .*2\.png .*higher"
  ):
    values(open_folder(three, max_unreadable=1))


def test_folder_without_a_readable_file_is_refused(three):
  for name in ("1.png", "2.png", "3.png"):
    (three / name).write_bytes(b"not an image")
  with pytest.raises(SettingError, match=r"^config.data.path = .*none of the 3 there"):
    values(open_folder(three))


def test_threads_count_an_unreadable_file_once(three, warnings):
  (three / "1.png").write_bytes(b"not an image")
  source = open_folder(three, max_unreadable=1)
  start = threading.Barrier(8)
  found = []

  def read():
    start.wait()
    found.append(int(source[0]["image"].flat[0]))

  threads = [threading.Thread(target=read) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (found, len(warnings)) == ([2] * 8, 1)


# Settings that cannot be used.


def test_missing_folder_is_refused(tmp_path):
  with pytest.raises(SettingError, match=r"^config.data.path = '.*gone': .*a folder"):
    open_folder(tmp_path / "gone")


def test_file_in_place_of_a_folder_is_refused(three):
  with pytest.raises(SettingError, match=r"^config.data.path = .*1.png': .*a folder"):
    open_folder(three / "1.png")


def test_folder_without_images_is_refused(tmp_path):
  (tmp_path / "notes.txt").write_text("nothing here")
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*expected .*\.png.* files, found none"
  ):
    open_folder(tmp_path)


def test_images_both_at_the_top_and_in_subfolders_are_refused(three):
  write_image(three / "a" / "x.png")
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*subfolder for each class or a flat"
  ):
    open_folder(three)


def test_arrays_of_another_shape_than_the_model_s_are_refused(tmp_path):
  write_array(tmp_path / "x.npy", np.zeros((4, 4, 3), np.float32))
  with pytest.raises(
    SettingError,
    match=r"^config.data.path = .*holds arrays of shape \(4, 4, 3\), where",
  ):
    open_arrays(tmp_path)


def test_arrays_beside_images_are_ignored(three):
  write_array(three / "x.npy", np.zeros((SIZE, SIZE, 3), np.float32))
  assert len(open_folder(three)) == 3


def test_flat_names_of_which_some_have_underscores_are_refused(three):
  write_image(three / "cat_1.png")
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*ClassID_ImgID.*3 of 4 .*1\.png"
  ):
    open_folder(three)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_are_refused(three, channels):
  with pytest.raises(
    SettingError, match=rf"^config.model.in_channels = {channels}: accepted are 1, 3"
  ):
    open_folder(three, channels=channels)


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
  write_image(tmp_path / "a" / "x.png")
  listed = os.scandir

  def scandir(path):  # Root may list any folder, so the refusal is played.
    if os.fspath(path).endswith("a"):
      raise PermissionError(13, "Permission denied", os.fspath(path))
    return listed(path)

  monkeypatch.setattr(os, "scandir", scandir)
  with pytest.raises(SettingError, match=r"^config.data.path = .*Permission denied"):
    open_folder(tmp_path)


# create_source.


def create(name, path=None, image_size=SIZE, channels=1):
  return sources.create_source(
    name, path=path, image_size=image_size, channels=channels, max_unreadable=0
  )


def test_digits_are_created_by_name():
  assert isinstance(create("digits"), sources.DigitsSource)


def test_images_are_created_by_name(three):
  assert len(create("images", three)) == 3


def test_unknown_source_is_refused():
  with pytest.raises(
    SettingError,
    match=r"^config.data.source = 'imagenet': accepted are digits, images",
  ):
    create("imagenet")


@pytest.mark.parametrize("name", ["images", "latents", "arrays"])
@pytest.mark.parametrize("path", [None, ""])
def test_a_source_of_files_needs_a_path(name, path):
  message = rf"^config.data.path = {path!r}: must be given"
  with pytest.raises(SettingError, match=message):
    create(name, path)


def test_digits_of_another_size_are_refused():
  with pytest.raises(
    SettingError, match=r"^config.model.input_size = 32: accepted is 8 for digits"
  ):
    create("digits", image_size=32)


def test_digits_of_other_channels_are_refused():
  with pytest.raises(
    SettingError, match=r"^config.model.in_channels = 3: accepted is 1 for digits"
  ):
    create("digits", channels=3)


@pytest.mark.parametrize(
  ("name", "pixels"),
  [("digits", True), ("images", True), ("latents", False), ("arrays", False)],
)
def test_a_source_says_whether_it_holds_pixels(name, pixels):
  assert sources.SOURCES[name].pixels == pixels
