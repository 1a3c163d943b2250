"""ArraySource: one .npy file per example."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.errors import SettingError
from tests.data.folders import open_arrays, values, write_array


def test_float32_array_is_unchanged(tmp_path):
  latent = np.random.default_rng(0).normal(size=(4, 4, 5)).astype(np.float32) * 30
  write_array(tmp_path / "x.npy", latent)
  np.testing.assert_array_equal(open_arrays(tmp_path, 4, 5)[0]["image"], latent)


def test_half_precision_array_becomes_float32(tmp_path):
  write_array(tmp_path / "x.npy", np.ones((4, 4, 4), np.float16))
  assert open_arrays(tmp_path)[0]["image"].dtype == np.float32


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
def test_invalid_array_is_skipped(tmp_path, array):
  write_array(tmp_path / "0.npy", np.ones((4, 4, 4), np.float32))
  write_array(tmp_path / "1.npy", array)
  assert values(open_arrays(tmp_path)) == [1, 1]


def test_truncated_array_file_is_skipped(tmp_path):
  for value in (0, 1):
    write_array(tmp_path / f"{value}.npy", np.full((4, 4, 4), value, np.float32))
  path = tmp_path / "0.npy"
  path.write_bytes(path.read_bytes()[:-8])
  assert values(open_arrays(tmp_path)) == [1, 1]


def test_arrays_that_do_not_fit_the_model_are_refused(tmp_path):
  write_array(tmp_path / "x.npy", np.zeros((4, 4, 3), np.float32))
  with pytest.raises(
    SettingError,
    match=r"^config.data.path = .*\(4, 4, 3\).*\(4, 4, 4\)",
  ):
    open_arrays(tmp_path)


def test_arrays_of_height_and_width_are_checked_in_this_order(tmp_path):
  write_array(tmp_path / "x.npy", np.ones((4, 6, 2), np.float32))
  assert open_arrays(tmp_path, (4, 6), 2)[0]["image"].shape == (4, 6, 2)
  with pytest.raises(SettingError, match=r"\(4, 6, 2\).*\(6, 4, 2\)"):
    open_arrays(tmp_path, (6, 4), 2)
