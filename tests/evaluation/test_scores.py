"""Scores by name, from files of every form. A cheap function stands for Inception."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.evaluation import metrics, scores
from mdt_jax.evaluation.features import FeatureExtractor, pixel_features
from mdt_jax.evaluation.image_streams import NpzImages
from mdt_jax.evaluation.metrics import INCEPTION_METRICS, METRICS, PIXEL_METRICS
from mdt_jax.evaluation.scores import (
  Summary,
  read_reference,
  save_statistics,
  score,
  summarize,
)


def features(params, images):
  pixels = pixel_features(params, images)
  x = pixels["pixels"].reshape(len(images), -1, 3)
  return pixels | {"pool3": x.mean(1), "spatial": x[:, 0], "logits": 9 * x.std(1)}


@functools.cache
def extractor():
  return FeatureExtractor(features, batch_size=8)


def photos(count, seed):
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % 3
  images = rng.integers(0, 150, (count, 4, 4, 3)) + 30 * labels[:, None, None, None]
  return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  np.savez(folder / "real.npz", *photos(60, 0))
  np.savez(folder / "fake.npz", *photos(45, 1))
  return folder


def summary(path, names=METRICS):
  return summarize(NpzImages(path), extractor(), names)


def by_hand(files, name):
  found = [
    features(None, jnp.asarray(np.load(files / file)["arr_0"]))[name]
    for file in ("real.npz", "fake.npz")
  ]
  return [np.asarray(x) for x in found]


def test_scores_are_those_of_the_features_in_one_piece(files):
  found = score(METRICS, summary(files / "real.npz"), summary(files / "fake.npz"))
  precision, recall = metrics.precision_recall(*by_hand(files, "pool3"))
  expected = {
    "fid": metrics.frechet_distance(*by_hand(files, "pool3")),
    "sfid": metrics.frechet_distance(*by_hand(files, "spatial")),
    "is": metrics.inception_score(by_hand(files, "logits")[1]),
    "precision": precision,
    "recall": recall,
    "frechet": metrics.frechet_distance(*by_hand(files, "pixels")),
  }
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-4), name
  assert tuple(found) == METRICS


def test_features_are_kept_for_the_scores_alone_that_need_them(files):
  found = summary(files / "real.npz", ["fid", "sfid", "is"])
  assert set(found.statistics) == {"pool3", "spatial"}
  assert set(found.features) == {"logits"}


def test_one_score_is_given_alone_and_in_the_order_asked_for(files):
  names = ["recall", "fid"]
  found = score(names, *(summary(files / f, names) for f in ("real.npz", "fake.npz")))
  assert list(found) == names


def test_saved_statistics_give_the_same_scores(files, tmp_path):
  real = read_reference(files / "real.npz", METRICS, extractor())
  save_statistics(tmp_path / "real.npz", real)
  saved = read_reference(tmp_path / "real.npz", METRICS, extractor())
  fake = summary(files / "fake.npz")
  assert score(METRICS, saved, fake) == score(METRICS, real, fake)
  assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


def test_statistics_are_saved_under_the_names_of_adm(files, tmp_path):
  real = read_reference(files / "real.npz", ["fid", "sfid"], extractor())
  save_statistics(tmp_path / "real.npz", real)
  with np.load(tmp_path / "real.npz") as saved:
    assert set(saved.files) == {"mu", "sigma", "mu_s", "sigma_s"}
    expected = np.cov(by_hand(files, "pool3")[0].T)
    np.testing.assert_allclose(saved["sigma"], expected, rtol=1e-5)


def test_a_reference_batch_of_adm_is_taken_at_its_statistics(files, tmp_path):
  """They are of more images than the 10,000 that lie beside them."""
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
  found = read_reference(tmp_path / "adm.npz", INCEPTION_METRICS, extractor())
  for name in ("pool3", "spatial"):
    np.testing.assert_array_equal(found.statistics[name].mean, mean)
  computed = summary(files / "real.npz").features["pool3"]
  np.testing.assert_array_equal(found.features["pool3"], computed)


def test_images_do_not_pass_through_the_network_for_statistics_that_are_there(
  files, tmp_path
):
  save_statistics(tmp_path / "a.npz", summary(files / "real.npz", ["fid"]))

  def unused(images):
    raise AssertionError

  found = read_reference(tmp_path / "a.npz", ["fid", "is"], unused)
  assert set(found.statistics) == {"pool3"}


def test_statistics_without_what_a_score_needs_are_refused(files, tmp_path):
  save_statistics(tmp_path / "a.npz", summary(files / "real.npz", ["fid"]))
  with pytest.raises(SettingError, match=r"neither images .* nor what precision, sfid"):
    read_reference(tmp_path / "a.npz", ["fid", "precision", "sfid"], extractor())


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"mu": np.ones(3), "sigma": np.ones((3, 2))}, r"shapes \(3,\) and \(3, 2\)"),
    ({"mu": np.ones((1, 3)), "sigma": np.eye(3)}, r"shapes \(1, 3\)"),
    ({"mu": np.array([np.nan]), "sigma": np.eye(1)}, "must be finite"),
    ({"mu": np.array([None]), "sigma": np.eye(1)}, "pickle"),
  ],
)
def test_statistics_that_are_none_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(SettingError, match=f"--reference = .*{message}"):
    read_reference(tmp_path / "a.npz", ["fid"], extractor())


@pytest.mark.parametrize("name", ["missing.npz", "text.npz", "array.npy"])
def test_a_reference_that_is_no_npz_is_refused(tmp_path, name):
  (tmp_path / "text.npz").write_text("no archive")
  np.save(tmp_path / "array.npy", np.ones(3))
  with pytest.raises(SettingError, match=f"--reference = .*{name}"):
    read_reference(tmp_path / name, ["fid"], extractor())


@pytest.mark.parametrize(
  ("name", "count", "fewest"), [("fid", 1, 2), ("recall", 3, 4), ("frechet", 1, 2)]
)
def test_too_few_images_are_refused_with_their_number(tmp_path, name, count, fewest):
  np.savez(tmp_path / "a.npz", *photos(count, 0))
  message = f"images = {count}: {name} needs at least {fewest}"
  with pytest.raises(SettingError, match=message):
    summary(tmp_path / "a.npz", [name])


def test_too_few_images_to_be_drawn_are_refused_by_their_setting(files):
  real = summary(files / "real.npz", ["recall"])
  with pytest.raises(SettingError, match="--num_images = 3: recall needs at least 4"):
    scores.check_comparable(["recall"], real, np.arange(3), {"pool3": 3})


@pytest.mark.parametrize("name", ["accuracy", "diversity"])
def test_scores_of_labelled_images_need_labels(files, name):
  real = summary(files / "real.npz", [name])
  unlabelled = Summary(real.statistics, real.features)
  with pytest.raises(SettingError, match=f"generated images = None: {name} needs"):
    score([name], real, unlabelled)


def test_both_kinds_of_scores_are_taken_in_one_pass():
  extract = scores.make_extractor(PIXEL_METRICS)
  assert set(extract(photos(3, 0)[0])) == {"pixels"}
