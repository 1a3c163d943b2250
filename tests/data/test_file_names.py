"""Names of files that are not UTF-8, and processes whose locale is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdt_jax.data import file_names, latents
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.feature_import import import_features
from mdt_jax.data.files import open_files
from mdt_jax.errors import SettingError
from mdt_jax.paths import output_folder
from mdt_jax.sampling.labels import parse_labels
from tests.data.sets import Images, write
from tests.data.test_files import contents, image_bytes, write_tar

BYTES = "caf\udce9"  # the byte E9 is "é" in Latin-1, and is not UTF-8


@pytest.fixture
def folder(tmp_path):
  for i, name in enumerate([BYTES, "caf\u00e9", "\u65e5\u672c"]):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{i}{BYTES}.png").write_bytes(image_bytes(i))
  return tmp_path


def test_folder_is_read_in_the_order_of_bytes(folder):
  files = open_files(folder)
  # 63 61 66 C3, 63 61 66 E9, E6.
  assert list(files.classes) == ["caf\u00e9", BYTES, "\u65e5\u672c"]
  assert sorted(contents(files).values()) == [(0, 1), (1, 0), (2, 2)]


def test_tar_file_is_read(tmp_path):
  members = {f"{BYTES}/1.png": image_bytes(5), "a/\u00e9.png": image_bytes(6)}
  files = open_files(write_tar(tmp_path / f"{BYTES}.tar", members))
  assert contents(files) == {"a/\u00e9.png": (6, 0), f"{BYTES}/1.png": (5, 1)}
  assert list(files.classes) == ["a", BYTES]


class BadNames(Images):
  """Images whose names are not UTF-8; those of class 1 are unreadable."""

  def __init__(self):
    super().__init__(unreadable=range(1, 24, 5))

  def name(self, index):
    return f"{BYTES}/{index}.png"


def test_latent_set_keeps_such_names(tmp_path):
  write(tmp_path, BadNames())
  source = latents.open_set(tmp_path)
  assert source.read(0)[2] == f"{BYTES}/0.png"
  assert source.card["shards"][0]["left_out"] == [f"{BYTES}/1.png", f"{BYTES}/6.png"]
  assert latents.verify(tmp_path) == len(source)


def test_latent_set_at_such_a_path_is_refused(tmp_path):
  np.save(tmp_path / "x.npy", np.zeros((2, 4, 8, 8), np.float32))
  with pytest.raises(SettingError, match=r"^output = .*UTF-8"):
    import_features(tmp_path / "x.npy", tmp_path / BYTES)


def test_folder_of_a_run_at_such_a_path_is_refused(tmp_path):
  with pytest.raises(SettingError, match=r"--workdir = .*UTF-8"):
    output_folder("--workdir", tmp_path / BYTES)


def test_such_a_class_is_chosen_by_its_name(folder):
  held = DataLabels(np.arange(3), open_files(folder).classes)
  assert parse_labels("labels", [BYTES], 3, has_null=True, held=held).tolist() == [1]


PRINT = """
import sys
from mdt_jax.data.files import open_files
files = open_files(sys.argv[1])
sizes = [len(files.read(i)[0]) for i in range(len(files))]
print(ascii([list(files.classes), [files.name(i) for i in range(3)], sizes]))
"""


def test_files_do_not_depend_on_the_locale(folder):
  settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  found = [
    subprocess.run(
      [sys.executable, "-c", PRINT, os.fsencode(folder)],
      env={**os.environ, **locale, "PYTHONPATH": str(Path(__file__).parents[2])},
      capture_output=True,
      check=True,
    ).stdout
    for locale in (settings, {"PYTHONUTF8": "1"})
  ]
  assert found[0] == found[1]
  assert found[0].startswith(rb"[['caf\xe9', 'caf\udce9', '\u65e5\u672c']")


def test_names_become_bytes_and_back():
  assert file_names.to_bytes(BYTES) == b"caf\xe9"
  assert file_names.from_bytes(b"caf\xe9") == BYTES
  assert file_names.to_path(file_names.from_path(BYTES)) == BYTES
  assert file_names.is_utf8("caf\u00e9") and not file_names.is_utf8(BYTES)
