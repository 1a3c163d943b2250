"""Reference files: images, statistics, or both."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath

from mdt_jax.errors import SettingError
from mdt_jax.evaluation.references import read_reference, save_statistics
from mdt_jax.evaluation.registry import inception_metrics
from mdt_jax.evaluation.scores import score
from tests.evaluation.cheap import OF_FILES, extractor, features, photos, summary

ALL = list(OF_FILES)


def test_saved_statistics_give_the_same_scores(files, tmp_path):
  real = read_reference(files / "real.npz", ALL, extractor())
  save_statistics(tmp_path / "real.npz", real)
  saved = read_reference(tmp_path / "real.npz", ALL, extractor())
  fake = summary(files / "fake.npz")
  assert score(ALL, saved, fake) == score(ALL, real, fake)
  assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


def test_reference_and_statistics_in_a_bucket_give_the_same_scores(files, bucket):
  folder = epath.Path(bucket)
  for name in ("real.npz", "fake.npz"):
    (folder / name).write_bytes((files / name).read_bytes())
  real = read_reference(f"{bucket}/real.npz", ALL, extractor())
  save_statistics(f"{bucket}/statistics.npz", real)
  saved = read_reference(folder / "statistics.npz", ALL, extractor())
  expected = read_reference(files / "real.npz", ALL, extractor())
  fake, local = summary(f"{bucket}/fake.npz"), summary(files / "fake.npz")
  assert score(ALL, saved, fake) == score(ALL, expected, local)


@pytest.mark.parametrize("name", ["missing.npz", "text.npz", "photos", "x.tar"])
def test_object_that_is_no_npz_file_is_refused(bucket, name):
  for other in ("text.npz", "photos/a.png", "x.tar"):
    epath.Path(f"{bucket}/{other}").write_bytes(b"no archive")
  with pytest.raises(SettingError, match=r"must be a|is not a readable") as error:
    read_reference(f"{bucket}/{name}", ["fid"], extractor(), setting="reference")
  assert (error.value.setting, error.value.value) == ("reference", f"{bucket}/{name}")


def test_saved_statistics_have_the_names_of_adm(files, tmp_path):
  real = read_reference(files / "real.npz", ["fid", "sfid"], extractor())
  save_statistics(tmp_path / "real.npz", real)
  pool3 = features(None, np.load(files / "real.npz")["arr_0"])["pool3"]
  with np.load(tmp_path / "real.npz") as saved:
    assert set(saved.files) == {"mu", "sigma", "mu_s", "sigma_s"}
    np.testing.assert_allclose(saved["sigma"], np.cov(pool3.T), rtol=1e-5)


def test_statistics_of_an_adm_reference_file_are_used(files, tmp_path):
  """ADM computed them from more images than the 10,000 in the same file."""
  images, labels = photos(60, 0)
  mean, covariance = np.full(3, 5.0), np.eye(3)
  np.savez(
    tmp_path / "adm.npz",
    images,
    labels,
    mu=mean,
    sigma=covariance,
    mu_s=mean,
    sigma_s=covariance,
  )
  found = read_reference(tmp_path / "adm.npz", inception_metrics(), extractor())
  for name in ("pool3", "spatial"):
    np.testing.assert_array_equal(found.statistics[name].mean, mean)
  computed = summary(files / "real.npz").features["pool3"]
  np.testing.assert_array_equal(found.features["pool3"], computed)


def test_saved_statistics_need_no_feature_extraction(files, tmp_path):
  save_statistics(tmp_path / "a.npz", summary(files / "real.npz", ["fid"]))

  def unused(images):
    raise AssertionError

  found = read_reference(tmp_path / "a.npz", ["fid", "is"], unused)
  assert set(found.statistics) == {"pool3"}


def test_error_names_scores_that_the_reference_cannot_serve(files, tmp_path):
  save_statistics(tmp_path / "a.npz", summary(files / "real.npz", ["fid"]))
  with pytest.raises(SettingError, match=r"^path = .*arr_0.*precision, sfid"):
    read_reference(tmp_path / "a.npz", ["fid", "precision", "sfid"], extractor())


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"mu": np.ones(3), "sigma": np.ones((3, 2))}, r"shapes \(3,\) and \(3, 2\)"),
    ({"mu": np.ones((1, 3)), "sigma": np.eye(3)}, r"shapes \(1, 3\)"),
    ({"mu": np.array([np.nan]), "sigma": np.eye(1)}, "must be finite"),
    ({"mu": np.array([None]), "sigma": np.eye(1)}, "pickle"),
    ({"mu": np.zeros(2), "sigma": np.full((2, 2), 1e308)}, "must be finite"),
    ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "sigma must be symmetric"),
    ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "sigma must be"),
    ({"mu": np.zeros(2), "sigma": 1j * np.eye(2)}, "sigma must hold real .* complex"),
    ({"features_pool3": np.full((3, 2), np.nan)}, "features_pool3 must"),
    ({"features_pool3": np.ones(3)}, "features_pool3 must"),
    ({"labels": np.ones(3)}, "labels must be integers"),
  ],
)
def test_invalid_statistics_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(SettingError, match=f"^path = .*{message}"):
    read_reference(tmp_path / "a.npz", ["fid"], extractor())


@pytest.mark.parametrize("name", ["missing.npz", "text.npz", "array.npy"])
def test_reference_that_is_not_an_npz_file_is_refused(tmp_path, name):
  (tmp_path / "text.npz").write_text("no archive")
  np.save(tmp_path / "array.npy", np.ones(3))
  with pytest.raises(SettingError, match=f"^path = .*{name}"):
    read_reference(tmp_path / name, ["fid"], extractor())
