"""NpzSource: a data set in one .npz file or two .npy files."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mdt_jax.data import npy_format, sources
from mdt_jax.data.npz import read_arrays
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from tests.data.folders import labels, values
from tests.training.tiny import tiny_config

VAE = Path(__file__).parents[1] / "fixtures" / "vae"
SIZE, CHANNELS = 8, 1
PIXELS = np.arange(4, dtype=np.uint8).repeat(SIZE * SIZE).reshape(4, SIZE, SIZE, 1)
LABELS = np.array([1, 0, 3, 1])
FLOATS = PIXELS.astype(np.float32) * 10


def open_source(path, name="npz", image_size=SIZE, channels=CHANNELS, max_unreadable=0):
  return sources.create_source(
    name,
    path=path,
    image_size=image_size,
    channels=channels,
    max_unreadable=max_unreadable,
  )


def save_npz(path, images=PIXELS, labels=LABELS, names=("arr_0", "arr_1")):
  np.savez(path, **dict(zip(names, (images, labels), strict=True)))
  return path


def assert_is_the_set(source, images=PIXELS):
  assert (len(source), source.num_classes) == (4, 4)
  assert source.image_shape == (SIZE, SIZE, CHANNELS)
  assert labels(source) == LABELS.tolist()
  found = np.stack([source[i]["image"] for i in range(4)])
  assert found.dtype == images.dtype
  np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize(
  "names", [("arr_0", "arr_1"), ("images", "labels"), ("x", "y")]
)
def test_npz_file_provides_images_and_labels(tmp_path, names):
  assert_is_the_set(open_source(save_npz(tmp_path / "a.npz", names=names)))


@pytest.mark.parametrize("name", ["npz", "arrays"])
def test_images_of_height_and_width_are_checked_in_this_order(tmp_path, name):
  dtype = np.uint8 if name == "npz" else np.float32
  path = save_npz(tmp_path / "a.npz", np.ones((4, 6, 10, 1), dtype))
  assert open_source(path, name, image_size=(6, 10)).image_shape == (6, 10, 1)
  with pytest.raises(SettingError, match=r"\(6, 10, 1\).* \(10, 6, 1\)"):
    open_source(path, name, image_size=(10, 6))


@pytest.mark.parametrize("beside", ["a_labels.npy", "labels.npy"])
def test_labels_are_read_from_a_file_beside_the_npy_file(tmp_path, beside):
  np.save(tmp_path / "a.npy", PIXELS)
  np.save(tmp_path / beside, LABELS)
  assert_is_the_set(open_source(tmp_path / "a.npy"))


def test_path_may_name_two_npy_files_separated_by_a_comma(tmp_path):
  np.save(tmp_path / "a.npy", PIXELS)
  np.save(tmp_path / "b.npy", LABELS)
  assert_is_the_set(open_source(f"{tmp_path}/a.npy,{tmp_path}/b.npy"))


def test_float_images_are_read_with_the_arrays_source(tmp_path):
  path = save_npz(tmp_path / "a.npz", FLOATS)
  assert_is_the_set(open_source(path, "arrays"), FLOATS)


def test_npy_file_is_memory_mapped(tmp_path):
  np.save(tmp_path / "a.npy", PIXELS)
  assert isinstance(open_source(tmp_path / "a.npy")._images, np.memmap)


def test_pickled_source_holds_the_path_not_the_images(tmp_path):
  np.save(tmp_path / "a.npy", np.zeros((1000, SIZE, SIZE, 1), np.uint8))
  sent = pickle.dumps(open_source(tmp_path / "a.npy"))
  assert len(sent) < 10_000
  assert len(pickle.loads(sent)) == 1000
  assert values(pickle.loads(sent))[:2] == [0, 0]


def test_missing_labels_give_one_class_and_a_warning(tmp_path, warnings):
  np.savez(tmp_path / "a.npz", PIXELS)
  np.save(tmp_path / "b.npy", PIXELS)
  for name in ("a.npz", "b.npy"):
    source = open_source(tmp_path / name)
    assert (labels(source), source.num_classes) == ([0] * 4, 1)
  assert "holds no array arr_1" in warnings[0]
  assert "no b_labels.npy or labels.npy" in warnings[1]


def test_nonfinite_image_is_skipped_with_a_warning(tmp_path, warnings):
  images = FLOATS.copy()
  images[1, 0, 0, 0] = np.nan
  source = open_source(save_npz(tmp_path / "a.npz", images), "arrays", max_unreadable=1)
  assert values(source) == [0, 20, 20, 30]
  assert "a.npz[1]" in warnings[0]


def save_error(folder, what):
  """Writes an invalid file of the kind `what` and returns its path."""
  path = folder / "a.npz"
  match what:
    case "other names":
      np.savez(path, pictures=PIXELS, targets=LABELS)
    case "labels of another name":
      np.savez(path, images=PIXELS, targets=LABELS)
    case "lengths":
      save_npz(path, labels=LABELS[:3])
    case "shape":
      save_npz(path, PIXELS[:, :4])
    case "rank":
      save_npz(path, PIXELS[..., 0])
    case "floats":
      save_npz(path, FLOATS)
    case "integers":
      save_npz(path, PIXELS.astype(np.int32))
    case "negative":
      save_npz(path, labels=-LABELS)
    case "pickle":
      save_npz(path, np.array([{"pickled": 1}] * 4, dtype=object))
    case "pickle alone":
      path.write_bytes(pickle.dumps([1, 2]))
    case "truncated":
      save_npz(path)
      path.write_bytes(path.read_bytes()[:-100])
    case "none":
      pass
    case "pickled npy":
      path = folder / "a.npy"
      np.save(path, np.array([{"pickled": 1}], dtype=object))
    case "truncated npy":
      path = folder / "a.npy"
      np.save(path, PIXELS)
      path.write_bytes(path.read_bytes()[:-8])
    case "no labels file":
      np.save(folder / "a.npy", PIXELS)
      path = f"{folder}/a.npy,{folder}/b.npy"
    case "folder":
      path = folder
    case "other extension":
      path = folder / "a.txt"
      path.write_text("")
  return path


def test_missing_and_damaged_members_raise_one_of_the_errors(tmp_path):
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
    archive.writestr("a.npy", bytes(range(256)) * 8)
  with zipfile.ZipFile(path) as archive:
    start = archive.getinfo("a.npy").header_offset + 30 + len("a.npy") + 9
  content = bytearray(path.read_bytes())
  content[start : start + 100] = b"\xff" * 100
  path.write_bytes(content)
  with zipfile.ZipFile(path) as archive:
    for name in ("a", "b"):
      with pytest.raises(npy_format.ERRORS):
        npy_format.read_member(archive, name)


@pytest.mark.parametrize(
  ("what", "message"),
  [
    ("other names", "arr_0 and arr_1, or images and labels, .*pictures, targets"),
    ("labels of another name", "array labels .* images, targets"),
    ("lengths", r"labels = \(3,\): .*\(4,\)"),
    ("shape", r"\(4, 8, 1\).* config.model.input_size .*\(8, 8, 1\)"),
    ("rank", r"images = \(4, 8, 8\): .*\(N, H, W, C\)"),
    ("floats", "uint8.* float32; .*config.data.source=arrays"),
    ("integers", "images = 'int32': must be uint8"),
    ("negative", "labels = -3: must be at least 0"),
    ("pickle", "cannot be read: .*pickled objects"),
    ("pickle alone", "cannot be read: "),
    ("truncated", "cannot be read: "),
    ("none", "a.npz does not exist"),
    ("pickled npy", "cannot be read: "),
    ("truncated npy", "cannot be read: "),
    ("no labels file", "b.npy does not exist"),
    ("folder", "must be an .npz or .npy file"),
    ("other extension", "must be an .npz or .npy file"),
  ],
)
def test_error_for_an_invalid_file_names_it_in_one_line(tmp_path, what, message):
  path = save_error(tmp_path, what)
  with pytest.raises(SettingError, match=rf"^config.data.path = .*{message}") as error:
    open_source(path)
  assert "\n" not in str(error.value)


def test_arrays_source_refuses_uint8_images(tmp_path):
  with pytest.raises(SettingError, match=r"uint8; .*config.data.source=npz"):
    open_source(save_npz(tmp_path / "a.npz"), "arrays")


@pytest.mark.parametrize(
  ("name", "images", "pixels"), [("npz", PIXELS, True), ("arrays", FLOATS, False)]
)
def test_source_decides_whether_the_network_sees_pixels(tmp_path, name, images, pixels):
  path = save_npz(tmp_path / "a.npz", images)
  experiment = build(tiny_config(**{"data.source": name, "data.path": str(path)}))
  assert len(experiment.source) == 4
  assert experiment.holds_pixels == pixels
  assert not experiment.encodes_images


def test_pixels_are_encoded_when_an_autoencoder_is_set(tmp_path):
  settings = {"data.source": "npz", "data.vae": str(VAE), "model.in_channels": 4}
  config = tiny_config(**settings, **{"data.path": str(tmp_path / "a.npz")})
  experiment = build(config)
  side = 8 * experiment.autoencoder.model.downsampling
  images = np.zeros((2, side, side, 3), np.uint8)
  save_npz(tmp_path / "a.npz", images, LABELS[:2])
  assert experiment.source.image_shape == (side, side, 3)
  assert experiment.encodes_images and not experiment.holds_pixels


@pytest.mark.parametrize("shape", [(10**10, 10**10), (0, 10**30)])
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_impossible_shape_is_refused(tmp_path, shape, name):
  header = {"descr": "<f4", "fortran_order": False, "shape": shape}
  with io.BytesIO() as file:
    np.lib.format.write_array_header_1_0(file, header)
    content = file.getvalue()
  path = tmp_path / name
  if name.endswith(".npy"):
    path.write_bytes(content)
  else:
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("images.npy", content)
  with pytest.raises(SettingError, match=r"^config\.data\.path = .*a\.np"):
    read_arrays(str(path))
