"""Arrays of conditions from files and functions, and captions: values and refusals."""

from __future__ import annotations

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdt_jax.data import condition_files, latents
from mdt_jax.data.captions import open_captions
from mdt_jax.data.condition_files import ImageNames, parse_conditions
from mdt_jax.data.latent_card import read_card
from mdt_jax.errors import SettingError
from tests.data import array_sets, sets

NAMES = array_sets.NAMES
STEMS = [name.removesuffix(".png") for name in NAMES]
VECTORS = np.stack([array_sets.vector(i) for i in range(sets.NUM_IMAGES)])


def by_name(names, values=VECTORS):
  return dict(zip(names, values, strict=True))


def save_folder(folder, arrays):
  for name, array in arrays.items():
    path = folder / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
  return folder


def save_npz(folder, arrays):
  np.savez(folder / "x.npz", **arrays)
  return folder / "x.npz"


def save_safetensors(folder, arrays):
  save_file(arrays, folder / "x.safetensors")
  return folder / "x.safetensors"


def save_npy(folder, names=None):
  np.save(folder / "x.npy", VECTORS if names is None else VECTORS[::-1])
  if names is not None:
    (folder / "x_names.txt").write_text("\n".join(names[::-1]) + "\n")
  return folder / "x.npy"


FORMS = {
  "npz of names": lambda folder: save_npz(folder, by_name(NAMES)),
  "npz of stems": lambda folder: save_npz(folder, by_name(STEMS)),
  "npz of rows": lambda folder: save_npz(
    folder, {"names": NAMES[::-1], "values": VECTORS[::-1]}
  ),
  "npz of rows, names in bytes": lambda folder: save_npz(
    folder, {"names": [s.encode() for s in STEMS], "values": VECTORS}
  ),
  "safetensors": lambda folder: save_safetensors(folder, by_name(STEMS)),
  "npy": save_npy,
  "npy with names": lambda folder: save_npy(folder, STEMS),
  "folder of stems": lambda folder: save_folder(folder / "x", by_name(STEMS)),
  "folder of names": lambda folder: save_folder(folder / "x", by_name(NAMES)),
  "function": lambda folder: lambda image, name: VECTORS[image[0, 0, 0]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_image_gets_its_array(form, tmp_path):
  arrays = array_sets.open_arrays({"clip": FORMS[form](tmp_path)})
  arrays.check(NAMES)
  for index, name in enumerate(NAMES):
    image = sets.Images().load(index)["image"]
    (found,), caption = arrays.read(name, image)
    np.testing.assert_array_equal(found, VECTORS[index])
    assert found.dtype == np.float16 and caption is None


def test_function_of_a_module_of_the_current_folder_is_called(tmp_path, monkeypatch):
  text = "import numpy as np\ndef embed(image, name): return np.full(3, len(name))\n"
  (tmp_path / "own_embedding.py").write_text(text)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  arrays = array_sets.open_arrays({"clip": "own_embedding:embed"})
  assert arrays.card["arrays"]["clip"]["source"] == "own_embedding:embed"
  (found,), _ = arrays.read(NAMES[10], np.zeros((4, 4, 3), np.uint8))
  np.testing.assert_array_equal(found, [12, 12, 12])


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("save", [save_npz, save_folder, save_safetensors])
def test_other_floats_are_stored_as_float32(tmp_path, dtype, save):
  values = np.arange(24).astype(dtype)[:, None] / 4
  arrays = array_sets.open_arrays({"x": save(tmp_path, by_name(NAMES, values))})
  assert arrays.card["arrays"]["x"]["dtype"] == "float32"
  (found,), _ = arrays.read(NAMES[9], None)
  assert found == 2.25


def test_name_without_extension_of_two_images_belongs_to_none():
  names = ImageNames(["a/1.png", "a/1.jpg", "a/2.png"])
  assert names.find("a/1.png", {"a/1"}) is None
  assert names.find("a/1.png", {"a/1", "a/1.png"}) == "a/1.png"
  assert names.find("a/2.png", {"a/2"}) == "a/2"


def test_flag_names_several_arrays():
  expected = {"clip": "a=b.npz", "t5": "folder", "p": "module:function"}
  assert parse_conditions("clip=a=b.npz,t5=folder,p=module:function") == expected


@pytest.mark.parametrize(
  "text", ["", "clip.npz", "clip=", "=x.npz", "a=x.npz,", "a=x.npz,a=y.npz", "label=x"]
)
def test_flag_of_another_form_is_refused(text):
  with pytest.raises(SettingError) as caught:
    parse_conditions(text)
  assert caught.value.setting == "condition"


# Images without an array.


def lacking(folder):
  """A file in which image 1 has no array, 2 another shape, and 3 NaN."""
  values = {name: value.astype(np.float32) for name, value in by_name(NAMES).items()}
  del values[NAMES[1]]
  values[NAMES[2]] = np.zeros((4, 5), np.float32)
  values[NAMES[3]] = np.full(5, np.nan, np.float32)
  return save_npz(folder, values)


def test_images_without_an_array_are_counted_and_refused(tmp_path):
  file = lacking(tmp_path)
  arrays = array_sets.open_arrays({"clip": file})
  with pytest.raises(SettingError) as caught:
    array_sets.write(tmp_path / "set", arrays)
  assert (caught.value.setting, caught.value.value) == ("condition", f"clip={file}")
  assert caught.value.accepted.startswith(
    "3 of 24 images have no array: class/1.png (missing), class/2.png (has the shape "
    "(4, 5), not (5,)), class/3.png (is not finite in float32)"
  )
  assert not (tmp_path / "set").exists()


def test_images_without_an_array_are_left_out(tmp_path, warnings):
  arrays = array_sets.open_arrays({"clip": lacking(tmp_path)}, missing="leave_out")
  array_sets.write(tmp_path / "set", arrays, sets.Images(unreadable=[9]))
  shards = read_card(tmp_path / "set")["shards"]
  left_out = [name for shard in shards for name in shard["left_out"]]
  assert left_out == [NAMES[i] for i in (1, 2, 3, 9)]
  source = latents.LatentSource(tmp_path / "set", 4, 3, 0)
  assert len(source) == 20
  np.testing.assert_array_equal(source[1]["clip"], array_sets.vector(4))
  (line,) = [line for line in warnings if "3 of 24 images" in line]
  assert "class/1.png (missing)" in line


def failing(image, name):
  if image[0, 0, 0] % 2:
    raise KeyError(name)
  return np.ones(3)


def test_image_whose_function_raises_is_refused(tmp_path):
  arrays = array_sets.open_arrays({"clip": failing})
  with pytest.raises(SettingError) as caught:
    array_sets.write(tmp_path / "set", arrays)
  assert caught.value.value == "clip=tests.data.test_condition_files:failing"
  assert "class/1.png has no array: the function raises KeyError" in str(caught.value)
  assert not (tmp_path / "set").exists()


def test_images_whose_function_raises_are_left_out(tmp_path, warnings):
  arrays = array_sets.open_arrays({"clip": failing}, missing="leave_out")
  source = latents.open_set(array_sets.write(tmp_path / "set", arrays))
  assert [source.read(i)[2] for i in range(len(source))] == NAMES[::2]
  assert len([line for line in warnings if "KeyError" in line]) == 3


# Refusals.


def write_bytes(name, data):
  def write(folder):
    (folder / name).write_bytes(data)
    return folder / name

  return write


def zip_with_damage(folder):
  path = save_npz(folder, {"names": NAMES, "values": VECTORS})
  with zipfile.ZipFile(path) as archive:
    info = archive.getinfo("values.npy")
  data = bytearray(path.read_bytes())
  data[info.header_offset + 250] ^= 255
  path.write_bytes(data)
  return path


PICKLED = np.array([{}] * 24)
REFUSED = {
  "no file": (lambda folder: folder / "no.npz", "is not a file that exists"),
  "unknown type": (write_bytes("x.csv", b"1"), "must be an .npz, .safetensors or"),
  "damaged npz": (write_bytes("x.npz", b"PK"), "cannot be read"),
  "damaged npy": (write_bytes("x.npy", b"\x93NUMPY"), "cannot be read"),
  "damaged safetensors": (write_bytes("x.safetensors", b"1"), "cannot be read"),
  "damaged member": (zip_with_damage, "cannot be read: Bad CRC-32"),
  "other names": (
    lambda folder: save_npz(folder, by_name([f"{name}x" for name in NAMES])),
    "has an array for none of 24 images, such as class/0.png: missing",
  ),
  "empty folder": (lambda folder: folder, "has an array for none of 24 images"),
  "pickle in values": (
    lambda folder: save_npz(folder, {"names": NAMES, "values": PICKLED}),
    "cannot be read: the array holds pickled objects",
  ),
  "pickles": (
    lambda folder: save_npz(folder, by_name(NAMES, PICKLED)),
    "the array holds pickled objects",
  ),
  "texts": (
    lambda folder: save_npz(folder, by_name(NAMES, STEMS)),
    "must hold numbers",
  ),
  "empty arrays": (
    lambda folder: save_npz(folder, by_name(NAMES, np.zeros((24, 0)))),
    "has the shape (0,)",
  ),
  "too few rows": (
    lambda folder: save_npz(folder, {"names": NAMES, "values": VECTORS[:3]}),
    "has 24 names for values of shape (3, 5)",
  ),
  "name twice": (
    lambda folder: save_npz(folder, {"names": ["x"] * 24, "values": VECTORS}),
    "holds the name x twice",
  ),
  "names of numbers": (
    lambda folder: save_npz(folder, {"names": np.arange(24), "values": VECTORS}),
    "names must hold one text for each row",
  ),
  "another number of rows": (
    lambda folder: np.save(folder / "x.npy", VECTORS[:5]) or folder / "x.npy",
    "has the shape (5, 5), but the data has 24 images",
  ),
  "bucket": (lambda folder: "gs://bucket/x.npz", "must be a local path"),
  "no module": (lambda folder: "no_such_module:f", "cannot be imported (ModuleNotF"),
  "no function": (lambda folder: "json:no", "the module json has no function no"),
  "not a function": (lambda folder: "json:__name__", "has no function __name__"),
  "function of nothing": (
    lambda folder: lambda image, name: None,
    "the image class/0.png has no array: must hold numbers, holds object",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_is_refused_in_one_line(case, tmp_path):
  write, message = REFUSED[case]
  with pytest.raises(SettingError) as caught:
    array_sets.open_arrays({"clip": write(tmp_path)}).check(NAMES)
  assert caught.value.setting == "condition"
  assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "form", ["npz of names", "npz of rows", "safetensors", "npy", "folder of names"]
)
def test_damaged_file_is_read_or_refused(form, tmp_path):
  rng = np.random.default_rng(0)
  path = FORMS[form](tmp_path)
  file = path / f"{NAMES[0]}.npy" if path.is_dir() else path
  data, num_refused = file.read_bytes(), 0
  for number in range(60):
    damaged = bytearray(data[: rng.integers(len(data))] if number % 3 == 0 else data)
    for place in rng.integers(0, max(len(damaged), 1), 1 + number % 5):
      damaged[place : place + 1] = rng.bytes(1)
    file.write_bytes(damaged)
    try:
      array_sets.open_arrays({"clip": path}).check(NAMES)
    except SettingError as error:
      assert "\n" not in str(error)
      num_refused += 1
  assert num_refused >= 20  # the truncated files


def test_module_that_raises_is_refused(tmp_path, monkeypatch):
  (tmp_path / "own_exit.py").write_text("raise SystemExit('no\\nway')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(SettingError, match=r"own_exit cannot be imported \(SystemExit"):
    array_sets.open_arrays({"clip": "own_exit:f"})


def test_pickle_is_never_loaded(tmp_path, monkeypatch):
  monkeypatch.setattr("pickle.loads", lambda *_: pytest.fail("unpickled"))
  monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
  file = save_npz(tmp_path, by_name(NAMES, PICKLED))
  with pytest.raises(SettingError, match="pickled"):
    array_sets.open_arrays({"clip": file})


@pytest.mark.parametrize("name", ["label", "image", "caption", "a b", "1", "ä", ""])
def test_array_name_is_refused(name):
  with pytest.raises(SettingError, match=r"^condition = "):
    condition_files.check_array_name(name)


def test_integers_that_the_first_type_does_not_hold_are_refused(tmp_path):
  values = {name: np.array([300 * (name == NAMES[5])], np.int64) for name in NAMES}
  values[NAMES[0]] = np.zeros(1, np.uint8)
  arrays = array_sets.open_arrays({"x": save_npz(tmp_path, values)})
  with pytest.raises(SettingError, match=r"1 of 24 .* class/5.png \(holds int64"):
    arrays.check(NAMES)


# Captions.


CAPTIONS = {
  "x.json": lambda texts: json.dumps(texts),
  "x.tsv": lambda texts: "".join(f"{name}\t{text}\n" for name, text in texts.items()),
  "x.txt": lambda texts: "\r\n".join(f"{n}\t{text}" for n, text in texts.items()),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_of_all_forms_are_read(name, tmp_path, warnings):
  texts = {"class/1": "a cat\tä", "class/2.png": "a dog"}
  (tmp_path / name).write_text(CAPTIONS[name](texts), newline="")
  captions = open_captions(tmp_path / name, ImageNames(NAMES))
  assert captions.of("class/1.png") == "a cat\tä"
  assert captions.of("class/2.png") == "a dog"
  assert captions.of("class/3.png") is None
  (line,) = warnings
  assert "22 of 24 images have no caption" in line


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("x.csv", "", "must be a .json file"),
    ("x.json", "{", "cannot be read"),
    ("x.json", "[]", "one text for each name"),
    ("x.json", '{"class/1": 3}', "one text for each name"),
    ("x.json", '{"class/1": "\\ud800"}', "surrogates not allowed"),
    ("x.json", '{"other": "a cat"}', "no caption of the images"),
    ("x.json", json.dumps({"class/1": "x" * 70_000}), "more than 65,536 bytes"),
    ("x.txt", "class/1.png a cat", "line 1 has no tab"),
    ("x.txt", "class/1\ta\n\nclass/1\tb", "line 3 holds the name class/1 again"),
  ],
)
def test_captions_are_refused_in_one_line(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(SettingError) as caught:
    open_captions(tmp_path / name, ImageNames(NAMES))
  assert caught.value.setting == "captions"
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_caption_file_is_refused(tmp_path):
  with pytest.raises(SettingError, match=r"^captions = .*No such file"):
    open_captions(tmp_path / "no.json", ImageNames(NAMES))
