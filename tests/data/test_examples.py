"""Behaviour shared by all sources: unreadable examples, splits, subsets."""

from __future__ import annotations

import errno
import os
import pickle
import threading

import numpy as np
import pytest

from mdt_jax.data import examples
from mdt_jax.data.examples import Subset, split_indices
from mdt_jax.data.own_source import CheckedSource
from mdt_jax.errors import DataUnavailable, SettingError
from tests.data.folders import SIZE, labels, open_folder, values, write_image


def test_index_beyond_the_end_raises_index_error(three):
  with pytest.raises(IndexError):
    open_folder(three)[3]


def test_source_survives_pickling(three):
  source = pickle.loads(pickle.dumps(open_folder(three)))
  assert values(source) == [1, 2, 3]


def test_next_readable_image_replaces_an_unreadable_one(three):
  (three / "1.png").write_bytes(b"not an image")
  (three / "2.png").write_bytes(b"neither")
  assert values(open_folder(three)) == [3, 3, 3]


def test_first_image_replaces_an_unreadable_last_one(three):
  (three / "3.png").write_bytes(b"not an image")
  assert values(open_folder(three)) == [1, 2, 1]


def test_replacement_keeps_its_own_label(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x.png").write_bytes(b"not an image")
  write_image(tmp_path / "b" / "x.png")
  assert labels(open_folder(tmp_path)) == [1, 1]


def test_replacement_does_not_depend_on_the_read_order(three):
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


def test_max_unreadable_files_are_accepted(three):
  (three / "2.png").write_bytes(b"not an image")
  assert values(open_folder(three, max_unreadable=1)) == [1, 3, 3]


def test_more_than_max_unreadable_files_are_refused(three):
  for name in ("1.png", "2.png"):
    (three / name).write_bytes(b"not an image")
  with pytest.raises(
    SettingError, match=r"^config.data.max_unreadable = 1: 2 files .*2\.png .*higher"
  ):
    values(open_folder(three, max_unreadable=1))


def test_folder_of_only_unreadable_files_is_refused(three):
  for name in ("1.png", "2.png", "3.png"):
    (three / name).write_bytes(b"not an image")
  with pytest.raises(SettingError, match=r"^config.data.path = .* none .* 3 files"):
    values(open_folder(three))


def test_concurrent_reads_count_an_unreadable_file_once(three, warnings):
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


class Failing:
  """Replaces `files.read`: raises `error` for the first `count` reads."""

  def __init__(self, source, error, count):
    self._read, self._error, self.left = source.files.read, error, count
    source.files.read = self

  def __call__(self, index):
    if self.left:
      self.left -= 1
      raise self._error
    return self._read(index)


def system_error(number):
  return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
  "error",
  [
    system_error(errno.ESTALE),
    system_error(errno.EIO),
    system_error(errno.EMFILE),
    MemoryError(),
    RuntimeError("pread() failed: Input/output error; reading latents"),
  ],
)
def test_fault_of_the_machine_is_waited_for(three, monkeypatch, warnings, error):
  monkeypatch.setattr(examples, "PAUSES", (0.0, 0.0))
  source = open_folder(three, max_unreadable=0)
  Failing(source, error, 2)
  assert values(source) == [1, 2, 3]
  (line,) = warnings
  assert str(three / "1.png") in line and type(error).__name__ in line


@pytest.mark.parametrize("read", [values, lambda source: list(source.readable())])
def test_fault_of_the_machine_leaves_no_example_out(three, monkeypatch, read):
  monkeypatch.setattr(examples, "PAUSES", (0.0,))
  source = open_folder(three)
  Failing(source, system_error(errno.ESTALE), 2)
  with pytest.raises(DataUnavailable, match=r"1\.png .* 2 tries .*Stale file handle"):
    read(source)
  assert values(source) == [1, 2, 3]  # the disk is back


@pytest.mark.parametrize(
  "error",
  [
    FileNotFoundError(errno.ENOENT, "gone"),
    PermissionError(errno.EACCES, "denied"),
    IsADirectoryError(errno.EISDIR, "a folder"),
    OSError("image file is truncated"),
  ],
)
def test_fault_of_a_file_is_not_waited_for(three, monkeypatch, error):
  monkeypatch.setattr(examples, "PAUSES", (1e6,))
  source = open_folder(three)
  Failing(source, error, 1)
  assert values(source) == [2, 2, 3]


def test_error_of_a_machine_survives_pickling():
  error = pickle.loads(pickle.dumps(DataUnavailable("a.png cannot be read")))
  assert str(error) == "a.png cannot be read"


def test_split_assigns_every_example_once():
  training, validation = split_indices(1000, 0.1)
  assert len(validation) == 100
  np.testing.assert_array_equal(
    np.sort(np.concatenate([training, validation])), np.arange(1000)
  )
  assert np.diff(validation).max() <= 11


def test_subset_holds_the_requested_examples(three):
  subset = Subset(open_folder(three), np.array([2, 0]))
  assert values(subset) == [3, 1]
  assert (subset.num_classes, subset.image_shape) == (1, (SIZE, SIZE, 3))


def checked(source):
  return CheckedSource(source, source.image_shape)


@pytest.mark.parametrize("wrap", [lambda source: source, checked])
def test_replacement_stays_in_the_subset(tmp_path, wrap):
  for value in range(6):
    write_image(tmp_path / f"{value}.png", value)
  (tmp_path / "2.png").write_bytes(b"not an image")
  (tmp_path / "5.png").write_bytes(b"not an image")
  source = wrap(open_folder(tmp_path))
  assert values(Subset(source, np.array([0, 2, 4]))) == [0, 4, 4]
  assert values(Subset(source, np.array([1, 3, 5]))) == [1, 3, 1]


def test_subset_of_only_unreadable_examples_is_refused(three):
  (three / "2.png").write_bytes(b"not an image")
  with pytest.raises(SettingError, match=r"^config.data.path = "):
    Subset(open_folder(three), np.array([1]))[0]
